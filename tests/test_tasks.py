"""The worlds to ask about: questions, worked answers, rewards, conversations."""

import itertools
import json
import random
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT

from data.arithmetic import prepare as arithmetic
from data.arithmetic_text.prepare import text_of
from data.detokenizer import Detokenizer
from data.files import DATA, script_of
from data.rows import Conversations
from data.tasks import task_of, tasks_of

WORLD = arithmetic.vocabulary()


def take(count, *how, **world):
    return list(itertools.islice(arithmetic.examples(*how, **world), count))


def as_people_see_it(tokenizer, messages):
    ids, in_play = tokenizer.render(messages)
    return Detokenizer(tokenizer).push(ids[np.argmax(in_play) :], last=True)


def test_worked_answers_earn_their_reward_and_nothing_else_does():
    for example in take(300) + take(200, 'test', events=arithmetic.NEW, digits=4):
        text = as_people_see_it(WORLD, arithmetic.conversation(example))
        assert arithmetic.reward(example, text) == 1.0
        assert arithmetic.reward(example, text + '0') == 0.0
        assert arithmetic.reward(example, text.replace('####', '')) == 0.0
        assert arithmetic.reward(example, example['answer']) == 0.0
        steps = [part['text'] for part in example['parts'] if part['type'] == 'call']
        assert all(re.fullmatch(r'\d+[-+*]\d+|"\w+"\.count\("\w"\)', step) for step in steps)


def test_a_worked_answer_quotes_what_it_computes_with():
    """Each number of a call was quoted just before, or is the last result; each sentence with a
    number is quoted, in its own words, with the call that its verb asks for."""
    idle = 'years', 'year', 'street'
    signs = {'+': [*arithmetic.GAINS, 'gets'], '-': [*arithmetic.LOSSES, 'gives'],
             '': [*arithmetic.KEEPS, *idle]}  # fmt: skip
    seen = set()
    rng = random.Random(1)
    for _ in range(300):
        question, steps, answer = arithmetic.word_problem(rng, 2, arithmetic.EVENTS, 2)
        assert all(quote or not call for quote, call in steps)
        steps = [step for step in steps if step[0]]
        sentences = [said for said in re.split('[.?]', question) if arithmetic.quoted(said)]
        assert [quote for quote, _ in steps] == [arithmetic.quoted(said) for said in sentences]
        known = re.findall(r'\d+', steps[0][0])
        for place, (said, (quote, call)) in enumerate(zip(sentences, steps)):
            mine = re.findall(r'\d+', quote) if place else []
            if place and set(said.split()) & {*arithmetic.LOSSES, *arithmetic.KEEPS}:
                assert 1 < int(mine[0]) < int(known[0])  # some of what there is
            if call:
                assert sorted(re.split(r'[-+*]', call)) == sorted(known + mine)
                known = [arithmetic.calculate(call)]
            for sign in [s for s in signs if place and set(signs[s]) & set(said.split())]:
                assert re.sub(r'\d', '', call) == sign
                seen.add(sign)
        assert known == [answer]
    assert seen == set(signs)


def test_half_of_the_easy_steps_of_a_worked_answer_are_done_in_the_head_and_rightly():
    """'34 and 7 so 41': what stands after 'so' is the sum, difference or product of what stands
    before, so the answer is that of the same question with all its calls."""
    heads = calls = 0
    for example in take(1000):
        so_far = []
        for part in example['parts']:
            said, in_head, result = part['text'].rpartition(' so ')
            numbers = re.findall(r'\d+', said if in_head else part['text'])
            if in_head and numbers:
                x, y = map(int, so_far + numbers)
                assert int(result) in {x + y, x - y, x * y} and len(result) < 3
            heads += bool(in_head)
            calls += part['type'] == 'call' and arithmetic.is_easy(part['text'])
            so_far = [result] if in_head else numbers if part['type'] == 'result' else so_far
            if part is example['parts'][0] and not in_head:
                so_far = numbers
        if example['kind'] in ('problem', 'sum'):
            assert so_far == [example['answer']]
    assert 0.45 < heads / (heads + calls) < 0.55
    assert not arithmetic.is_easy('"aa".count("a")') and not arithmetic.is_easy('60+40')


@pytest.mark.parametrize('share', [0, 1])
def test_in_head_is_the_share_of_easy_steps_without_a_call(monkeypatch, share):
    monkeypatch.setattr(arithmetic, 'in_head', share)
    parts = [part for example in take(200) for part in example['parts']]
    heads = sum(' so ' in part['text'] for part in parts)
    calls = sum(part['type'] == 'call' and arithmetic.is_easy(part['text']) for part in parts)
    assert bool(heads) == bool(share) and bool(calls) != bool(share)


def test_a_quote_says_who_and_each_number_with_the_word_before_it():
    assert arithmetic.quoted('At first Anna has 7 pens.') == 'Anna has 7'
    assert arithmetic.quoted('On Monday Ben makes 3 eggs, on Tuesday 4.') == 'Ben makes 3 Tuesday 4'
    assert arithmetic.quoted('Emma gives 5 coins to Rosa.') == 'Emma gives 5'
    assert arithmetic.quoted('Soon there are 4 times as many.') == 'are 4'
    assert arithmetic.quoted('How many eggs does Ben have now?') == ''


def test_words_of_the_world_are_tokens_and_those_to_be_spelled_are_letters():
    question = next(e['question'] for e in take(100) if e['kind'] == 'problem')
    assert len(WORLD.encode(question)) < len(question) / 2
    assert WORLD.encode('strawberry') == list(b'strawberry')
    lone = [w for w in arithmetic.NAMES + arithmetic.ITEMS + arithmetic.GAINS + arithmetic.LOSSES
            + arithmetic.KEEPS if len(WORLD.encode(' ' + w)) > 1]  # fmt: skip
    assert not lone


def test_a_verb_has_one_meaning():
    told = set(re.findall(r'\w+', ' '.join(e['question'] for e in take(9000))))
    verbs = arithmetic.GAINS, arithmetic.LOSSES, arithmetic.KEEPS
    assert all(set(words) <= told and len(words) == 120 for words in verbs)
    assert len(set(sum(verbs, []))) == 360


def test_no_question_is_in_both_splits():
    train, test = ({e['question'] for e in take(3000, split)} for split in ('train', 'test'))
    assert len(train) > 2500 and len(test) > 2000 and not train & test
    assert not train & {e['question'] for e in take(500, 'test', 'eval', digits=3)}


def test_questions_are_endless_and_made_from_the_seed():
    assert take(50, 'train', 1) == take(50, 'train', 1) != take(50, 'train', 2)


def test_new_wordings_are_in_no_training_question():
    known = ' '.join(e['question'] for e in take(2000)) + text_of(100_000, 'train')
    new = [e['question'] for e in take(300, 'test', events=arithmetic.NEW)]
    for texts in arithmetic.NEW.values():
        for text in texts:
            rare = max(re.split(r'{\w}', text), key=len)
            assert rare not in known
            assert any(rare in question for question in new)


def test_difficulty_is_the_digits_of_the_numbers():
    def digits(questions):
        return max(len(n) for e in questions for n in re.findall(r'\d+', e['question']))

    assert [digits(take(300, digits=d)) for d in (1, 2, 4)] == [1, 2, 4]


def test_longer_stories_have_more_events():
    def sentences(**world):
        return {e['question'].count('. ') for e in take(300, **world)}

    usual = sentences(kinds=['problem'])
    longer = sentences(**arithmetic.VARIANTS['longer stories'])
    assert max(usual) == 4 < max(longer) and min(usual) == min(longer)


def test_what_is_harder_is_asked_of_word_problems_alone():
    assert {e['kind'] for e in take(300)} == set(arithmetic.KINDS)
    for world in arithmetic.VARIANTS.values():
        assert {e['kind'] for e in take(100, 'test', **world)} == {'problem'}


def test_notes_are_the_quotes_of_the_story():
    noted = 0
    for line in text_of(100_000, 'a').splitlines():
        note = re.search(r' \w+ notes ([^:.]+): ([^.]+)\.', line)
        if note:
            story = re.split(r' The notes are| It began| \w+ notes| For \w+ it was', line)[0]
            quotes = filter(None, map(arithmetic.quoted, story.split('.')))
            assert ' '.join(quotes) == note[1]
            assert re.findall(r'\d+', note[1]) == note[2].split(', ')
            noted += 1
    assert noted > 50


def test_a_row_of_256_tokens_holds_any_question_with_its_answer():
    for world in {}, *arithmetic.VARIANTS.values(), {'most': 4, 'digits': 8}:
        asked = take(250, 'test', **world)
        assert max(len(WORLD.render(arithmetic.conversation(e))[0]) for e in asked) <= 256


def test_the_text_to_learn_writing_from_holds_no_question_and_no_worked_answer():
    text = text_of(100_000, 'train')
    assert '?' not in text and '####' not in text and '<' not in text
    assert text.isascii()
    asked = re.compile('|'.join(re.escape(t.split('{')[0]) for group in
                                arithmetic.SUMS.values() for t in group))  # fmt: skip
    assert not asked.search(text)


def test_small_talk_is_in_the_vocabulary_and_alternates():
    smalltalk = script_of(DATA / 'smalltalk')
    rng = random.Random(3)
    for _ in range(300):
        messages, _ = smalltalk.talk(rng)
        assert [m['role'] for m in messages] == ['user', 'assistant'] * (len(messages) // 2)
        WORLD.render(messages)


def test_small_talk_is_rewarded_for_an_answer_to_this_very_question():
    smalltalk = task_of(DATA / 'smalltalk')
    asked = list(itertools.islice(smalltalk.examples(), 200))
    assert asked == list(itertools.islice(smalltalk.examples(), 200))
    for one, other in itertools.pairwise(asked):
        said = smalltalk.conversation(one)[-1]['content']
        assert smalltalk.reward(one, said) == 1 == smalltalk.reward(one, f' {said}')
        assert smalltalk.reward(one, said[:-1]) == 0
        assert smalltalk.reward(other, said) == (said in other['answers'])


def test_a_mixture_of_tasks_asks_by_the_shares_and_rewards_each_in_its_own_way(tmp_path):
    for name in 'one', 'other':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'prepare.py').write_text(
            'from itertools import count\n'
            'def examples(split, seed):\n'
            f'    return (f"{name} {{split}} {{seed}} {{i}}" for i in count())\n'
            'def conversation(example): return [example]\n'
            f'def reward(example, answer): return answer == "{name}"\n'
        )
    for shares in {'one': 9, 'other': 1}, {'one': 0.2, 'other': 0.8}:
        mixed = tasks_of({tmp_path / name: share for name, share in shares.items()})
        drawn = list(itertools.islice(mixed.examples('val', 3), 1000))
        assert drawn == list(itertools.islice(mixed.examples('val', 3), 1000))
        for name, share in shares.items():
            mine = [example for example in drawn if mixed.reward(example, name)]
            said = [mixed.conversation(example) for example in mine]
            assert said == [[f'{name} val 3 {i}'] for i in range(len(mine))]  # none is left out
            assert abs(len(mine) - 1000 * share / sum(shares.values())) < 50


def test_a_mixture_with_a_task_that_has_no_more_questions_ends(gsm8k):
    few = [question['question'] for question in gsm8k.examples('val')]
    mixed = tasks_of({gsm8k.HERE: 1.0, DATA / 'arithmetic': 1.0})
    asked = [example['question'] for _, example in mixed.examples('val', 1)]
    assert few and set(few) < set(asked)


@pytest.mark.parametrize('name', ['arithmetic', 'smalltalk'])
def test_conversations_are_prepared_with_their_masks(tmp_path, name):
    made = script_of(DATA / name)
    made.demonstrations, made.conversations, made.held_out = 40, 40, 10
    made.prepare(tmp_path)
    texts = Conversations(tmp_path, 'train', 400)
    assert len(texts.spans) == 40
    end, user = WORLD.special['<|end|>'], WORLD.special['<|user|>']
    for i in range(40):
        ids, mask = texts.conversation(i)
        assert ids[1] == user and mask[1] == 0 and ids[-1] == end and mask[-1] == 1


@pytest.fixture
def gsm8k(tmp_path, bpe):
    folder = tmp_path / 'gsm8k'
    folder.mkdir()
    shutil.copy(ROOT / 'data' / 'gsm8k' / 'prepare.py', folder)
    rows = [
        ('Half of 48?', 'It is 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n'
         '#### 72'),  # fmt: skip
        ('A wrong mark?', 'One is $<<3*4=13>>13.\n#### 1,000'),
        ('No mark?', 'It is so.\n#### -5'),
    ]
    for split in 'train', 'test':
        lines = [json.dumps({'question': q, 'answer': a}) for q, a in rows]
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(lines))
    task = task_of(folder)
    task.prepare(str(tmp_path), folder)
    return task


def test_gsm8k_calls_the_calculator_where_it_agrees(gsm8k, bpe):
    first, second, third = itertools.islice(gsm8k.examples('test'), 3)
    text = as_people_see_it(bpe, gsm8k.conversation(first))
    assert text == 'It is 48/2 = [48/2 = 24]24 clips.\nIn all 48+24 = [48+24 = 72]72.\n#### 72'
    assert [part['type'] for part in gsm8k.conversation(second)[1]['content']] == ['text', 'text']
    texts = Conversations(gsm8k.HERE, 'train', 400)
    ids, mask = texts.conversation(0)
    result = bpe.encode('24') + [bpe.special['<|result|>']]
    at = [i for i, token in enumerate(ids) if token == bpe.special['<|result|>']][0]
    assert ids[at + 1 : at + 1 + len(result)].tolist() == result
    assert mask[at] == 1 and not mask[at + 1 : at + 1 + len(result)].any()


def test_gsm8k_rewards_no_answer_where_neither_has_a_number(gsm8k):
    assert gsm8k.reward({'answer': 'no mark'}, 'nor here') == 0.0


def test_rows_that_cannot_be_read_are_left_out_and_counted_or_refused(gsm8k, tmp_path, capsys):
    path = tmp_path / 'train.jsonl'
    good = path.read_text()
    bad = [{'question': 'Q', 'answer': None}, {'question': 'Q', 'answer': 'no mark'},
           {'question': ' ', 'answer': '#### 1'}]  # fmt: skip
    path.write_text(good + ''.join('\n' + json.dumps(row) for row in bad))
    gsm8k.prepare(str(tmp_path), tmp_path / 'out')
    text = capsys.readouterr().out
    assert 'train: 3 of 6 rows are left out, the first is row 4: AttributeError' in text
    gsm8k.strict = True
    with pytest.raises(ValueError, match='train: row 4: AttributeError'):
        gsm8k.prepare(str(tmp_path), tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
    gsm8k.strict = False
    for rows, words in [
        (bad, 'train: row 1'),
        ([{'question': 'Q'}], "train: row 1: KeyError: 'answer'"),
        ([{'question': 3, 'answer': [4]}], 'train: row 1: AttributeError'),
    ]:
        for split in 'train', 'test':
            (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        with pytest.raises(ValueError, match=words):
            gsm8k.prepare(str(tmp_path), tmp_path / 'new')
    path.write_text('{"question":')
    with pytest.raises(ValueError, match='train.jsonl.*: cannot be loaded: .'):
        gsm8k.prepare(str(tmp_path), tmp_path / 'new')


def test_gsm8k_rewards_the_number_and_goes_on_without_end(gsm8k):
    first, second, third = gsm8k.examples('test')
    for example, good, bad in [
        (first, '#### 72', '#### 73'),
        (first, 'so #### $72.0\n', '72'),
        (second, '####1000', '#### 1'),
        (third, '#### -5', '#### 5'),
        (third, '#### -5', '####'),
    ]:
        assert (gsm8k.reward(example, good), gsm8k.reward(example, bad)) == (1.0, 0.0)
    many = list(itertools.islice(gsm8k.examples('train', 4), 7))
    assert len(many) == 7 and sorted(e['question'] for e in many[:3]) == sorted(
        e['question'] for e in (first, second, third)
    )


def test_smoltalk_takes_local_conversations(tmp_path, bpe):
    folder = tmp_path / 'smoltalk'
    folder.mkdir()
    shutil.copy(ROOT / 'data' / 'smoltalk' / 'prepare.py', folder)
    talk = [
        {'role': 'system', 'content': 'be kind'},
        {'role': 'user', 'content': 'the <|end|>?'},
        {'role': 'assistant', 'content': 'that one'},
    ]
    with open(tmp_path / 'talk.jsonl', 'w') as file:
        for i in range(20):
            print(json.dumps({'messages': talk[i % 2 :]}), file=file)
    script_of(folder).fetch(str(tmp_path / '*.jsonl'), folder)
    texts = [Conversations(folder, split, 99) for split in ('train', 'val')]
    assert [len(split.spans) for split in texts] == [19, 1]
    assert texts[0].truncated == 0
    for i in range(19):
        ids, mask = texts[0].conversation(i)
        played = [token for token, mine in zip(ids.tolist(), mask, strict=True) if mine]
        assert played == bpe.encode('that one') + [bpe.special['<|end|>']]


def test_arc_is_questions_with_lettered_choices(tmp_path, bpe):
    folder = tmp_path / 'arc'
    folder.mkdir()
    shutil.copy(ROOT / 'data' / 'arc' / 'prepare.py', folder)
    rows = [
        {'question': q, 'answerKey': key, 'choices': {'text': texts, 'label': labels}}
        for q, key, texts, labels in [
            ('Hot?', 'B', ['ice', 'fire'], ['A', 'B']),
            ('Wet?', '1', ['sea', 'sun'], ['1', '2']),
        ]
    ]
    for split in 'train', 'test':
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    task = task_of(folder)
    task.prepare(str(tmp_path), folder)
    hot, wet = task.examples('test')
    assert hot == {'question': 'Hot?\nA. ice\nB. fire', 'answer': 'B'} and wet['answer'] == 'A'
    assert (task.reward(hot, 'B'), task.reward(hot, 'A'), task.reward(hot, 'B.')) == (1, 0, 0)
    ids, mask = Conversations(folder, 'train', 99).conversation(0)
    played = [token for token, mine in zip(ids.tolist(), mask) if mine]
    assert played == bpe.encode('B') + [bpe.special['<|end|>']]
    assert len(list(itertools.islice(task.examples('train'), 9))) == 9
