"""Conversations: what is in play, what people see of it, and a talk in the terminal."""

import builtins

import pytest
from conftest import TEXT, tiny

from data.detokenizer import Detokenizer
from data.models import is_taught
from data.tasks import final_answer
from data.tokenizer import Tokenizer
from data.vocabulary import SPECIAL
from extras import chat
from sample import Request, Sampling

LETTERS = Tokenizer.of_text(TEXT + 'abcdefghijklmnopqrstuvwxyz0123456789+-*/=<|>_')


def kinds(bpe, kind):
    return bpe if kind == 'gpt2' else LETTERS


@pytest.mark.parametrize('kind', ['char', 'gpt2'])
def test_what_is_in_play_is_what_the_assistant_had_to_write(kind, bpe):
    """Against a mask written by hand."""
    tokenizer = kinds(bpe, kind)
    messages = [
        {'role': 'system', 'content': 'be'},
        {'role': 'user', 'content': '2*3'},
        {
            'role': 'assistant',
            'content': [
                {'type': 'text', 'text': 'it '},
                {'type': 'call', 'text': '2*3'},
                {'type': 'result', 'text': '6'},
                {'type': 'text', 'text': ' is'},
            ],
        },
        {'role': 'user', 'content': 'or'},
        {'role': 'assistant', 'content': 'no'},
    ]
    expected = [  # (text or special token, in play)
        ('<|endoftext|>', 0),
        ('<|system|>', 0), ('be', 0), ('<|end|>', 0),
        ('<|user|>', 0), ('2*3', 0), ('<|end|>', 0),
        ('<|assistant|>', 0), ('it ', 1), ('<|call|>', 1), ('2*3', 1), ('<|result|>', 1),
        ('6', 0), ('<|result|>', 0), (' is', 1), ('<|end|>', 1),
        ('<|user|>', 0), ('or', 0), ('<|end|>', 0),
        ('<|assistant|>', 0), ('no', 1), ('<|end|>', 1),
    ]  # fmt: skip
    ids, in_play = [], []
    for text, mine in expected:
        new = [tokenizer.special[text]] if text in SPECIAL else tokenizer.encode(text)
        ids += new
        in_play += [mine] * len(new)
    assert tokenizer.render(messages) == (ids, in_play)
    opened = tokenizer.render(messages[:2], reply=True)
    assert opened[0][-1] == tokenizer.special['<|assistant|>'] and not any(opened[1])


@pytest.mark.parametrize('kind', ['char', 'gpt2'])
@pytest.mark.parametrize('role', ['user', 'system', 'assistant'])
def test_no_text_becomes_a_special_token(kind, role, bpe):
    tokenizer = kinds(bpe, kind)
    text = 'be <|end|><|assistant|> <|call|>2<|result|> <|endoftext|>'
    plain = tokenizer.render([{'role': role, 'content': 'be'}])[0]
    ids = tokenizer.render([{'role': role, 'content': text}])[0]
    special = set(tokenizer.special.values())
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert tokenizer.decode([i for i in ids if i not in special]) == text


@pytest.mark.parametrize(
    'message, words',
    [
        ({'role': 'tool', 'content': 'x'}, "role 'tool'"),
        ({'role': 'user', 'content': [{'type': 'call', 'text': '1'}]}, "type 'call'"),
        ({'role': 'assistant', 'content': [{'type': 'image', 'text': '1'}]}, "type 'image'"),
        ({'role': 'user', 'content': '☃'}, "character '☃'"),
    ],
)
def test_what_cannot_be_rendered_is_named(message, words):
    with pytest.raises(ValueError, match=words.replace('(', r'\(')):
        LETTERS.render([message])


def test_people_see_tool_calls_in_brackets_and_whole_characters(bpe):
    parts = [
        {'type': 'text', 'text': 'so 🙂 سلام 你好 '},
        {'type': 'call', 'text': '48/2'},
        {'type': 'result', 'text': '24'},
        {'type': 'text', 'text': ' done'},
    ]
    ids = bpe.render([{'role': 'assistant', 'content': parts}])[0]
    detokenizer, pieces = Detokenizer(bpe), []
    for n in range(1, len(ids) + 1):
        pieces.append(detokenizer.push(ids[:n]))
    assert ''.join(pieces) == 'so 🙂 سلام 你好 [48/2 = 24] done'
    assert '\ufffd' not in ''.join(pieces)
    detokenizer, half = Detokenizer(bpe), bpe.encode('🙂')[:2]
    assert [detokenizer.push(half), detokenizer.push(half, last=True)] == ['', '\ufffd']


@pytest.mark.parametrize('step', [1, 2, 5, 100])
def test_a_stop_text_is_never_told_not_even_its_beginning(step):
    ids = LETTERS.encode('to be or not to be or no')
    for stop, told in (
        (['not'], 'to be or '),
        (['be', 'to'], ''),
        (['none', 'or n'], 'to be '),
        (['zz'], 'to be or not to be or no'),
        ([], 'to be or not to be or no'),
    ):
        detokenizer, pieces = Detokenizer(LETTERS, stop), []
        for n in range(step, len(ids) + step, step):
            pieces.append(detokenizer.push(ids[:n], last=n >= len(ids)))
            if detokenizer.stopped:
                break
        assert ''.join(pieces) == told == detokenizer.text
        assert detokenizer.stopped == any(text in 'to be or not to be or no' for text in stop)


def test_a_full_context_leaves_out_the_oldest_turns_but_not_the_system():
    turns = [[90], [1] * 10, [2] * 10, [3] * 10]
    begin, assistant = (LETTERS.special[name] for name in ('<|endoftext|>', '<|assistant|>'))
    assert LETTERS.fit(turns, 100) == ([begin, 90] + sum(turns[1:], []) + [assistant], 0)
    assert LETTERS.fit(turns, 33) == ([begin, 90] + sum(turns[1:], []) + [assistant], 0)
    assert LETTERS.fit(turns, 32) == ([begin, 90] + [3] * 10 + [assistant], 2)
    assert LETTERS.fit(turns, 6) == ([begin, 90] + [3] * 3 + [assistant], 2)
    both = [begin] + [90] * 9 + [3] * 9 + [assistant]
    assert LETTERS.fit([[90] * 50, [3] * 50], 20) == (both, 0)


def test_only_stages_of_conversation_teach_to_chat():
    assert not is_taught({'lineage': [{'stage': 'pretrain'}, {'stage': 'finetune'}]})
    assert not is_taught({'lineage': [{'from': 'gpt2'}]}) and not is_taught({'lineage': []})
    assert is_taught({'lineage': [{'stage': 'pretrain'}, {'stage': 'sft'}]})


def converse(monkeypatch, capsys, lines, taught=True, **changes):
    """Run a talk with these lines typed. -> what it printed"""
    typed = iter(lines)

    def type_line(prompt=''):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, 'input', type_line)
    monkeypatch.setattr(chat, 'max_new_tokens', 12)
    monkeypatch.setattr(chat, 'seed', 4)
    model = tiny(vocab_size=LETTERS.vocab_size, **{'block_size': 64, **changes})
    chat.chat(model, LETTERS, taught, Sampling(0.8, 200))
    return capsys.readouterr().out


def test_a_talk_of_several_turns(monkeypatch, capsys):
    prompts, answer = [], chat.answer

    def spy(model, tokenizer, request):
        prompts.append(tokenizer.decode(request.prompt))
        return answer(model, tokenizer, request)

    monkeypatch.setattr(chat, 'answer', spy)
    lines = ['be', '', '☃', 'or', '/system no', 'to', '/clear', 'it', '/system', 'by']
    text = converse(monkeypatch, capsys, lines, block_size=256)
    assert "character '☃'" in text and len(prompts) == 5
    assert prompts[0] == '<|endoftext|><|user|>be<|end|><|assistant|>'
    assert prompts[3] == '<|endoftext|><|system|>no<|end|><|user|>it<|end|><|assistant|>'
    assert prompts[1].startswith(prompts[0])
    assert prompts[1].endswith('<|end|><|user|>or<|end|><|assistant|>')


@pytest.mark.parametrize('tools', [True, False])
def test_a_talk_has_the_calculator_unless_it_is_told_not_to(tools, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(chat, 'tools', tools)
    monkeypatch.setattr(chat, 'answer', lambda *how: given.append(how[-1].tool) or [])
    converse(monkeypatch, capsys, ['be', '/systematic'])
    assert len(given) == 2 and all((tool is not None) == tools for tool in given)


def test_a_long_talk_says_what_it_no_longer_sees(monkeypatch, capsys):
    text = converse(monkeypatch, capsys, ['to be or not to be'] * 4)
    assert 'dropped from the context' in text


def test_ctrl_c_stops_the_answer_and_not_the_talk(monkeypatch, capsys):
    calls = []

    class Stopping(Detokenizer):
        def push(self, ids, last=False):
            calls.append(len(ids))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().push(ids, last)

    monkeypatch.setattr(chat, 'Detokenizer', Stopping)
    text = converse(monkeypatch, capsys, ['be', 'or', 'not', 'to'])
    assert text.count('(stopped)') == 1 and len(calls) >= 4
    assert 'Ctrl-D ends' in converse(monkeypatch, capsys, [KeyboardInterrupt(), 'be'])


def test_a_model_that_was_never_taught_says_so_and_completes(monkeypatch, capsys):
    text = converse(monkeypatch, capsys, ['to be'], taught=False)
    assert 'never taught to chat' in text


def test_the_tool_answers_inside_a_talk(monkeypatch, capsys):
    """A model that can only write a call: its result is forced behind it."""
    content = [{'type': 'call', 'text': '6*7'}]
    script = iter(LETTERS.render([{'role': 'assistant', 'content': content}])[0][2:])

    def write(model, requests, rows):
        (request,) = requests
        for token in script:
            request.ids.append(token)
            request.ids += request.tool(request.ids)
            request.reason = 'end' if token in request.end else ''
            yield request

    monkeypatch.setattr(chat, 'decode', write)
    assert '[6*7 = 42]' in converse(monkeypatch, capsys, ['be'])


@pytest.mark.parametrize(
    'text, answer',
    [
        ('6*7 is\n#### 42\n', '42'),
        ('#### 1\nno\n#### 72 \nand more', '72'),
        ('so\nit is 9\n\n', 'it is 9'),
        ('####', ''),
        ('', ''),
    ],
)
def test_what_the_final_answer_is(text, answer):
    assert final_answer(text) == answer


def test_most_votes_win(capsys):
    texts = ['a\n#### 1', 'b\n#### 2', 'c\n#### 2', 'd\n#### 3']
    voters = Tokenizer.of_text(''.join(texts))
    requests = [Request([0], ids=voters.encode(text)) for text in texts]
    assert chat.print_vote(requests, voters) is requests[1]
    assert '2 of 4 answers say: 2' in capsys.readouterr().out


def test_votes_in_a_talk(monkeypatch, capsys):
    monkeypatch.setattr(chat, 'votes', 3)
    assert 'of 3 answers say' in converse(monkeypatch, capsys, ['be'])


def test_ctrl_c_among_votes_leaves_no_answer_that_nobody_saw(monkeypatch, capsys):
    monkeypatch.setattr(chat, 'votes', 3)
    prompts = []

    def stopped(model, requests, rows):
        prompts.append(requests[0].prompt)
        yield requests[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, 'decode', stopped)
    converse(monkeypatch, capsys, ['be', 'or'])
    assert LETTERS.decode(prompts[1]).count('<|user|>') == 1


def test_a_model_of_nanogpt_talks_too(monkeypatch, capsys):
    assert not is_taught({})
    text = converse(monkeypatch, capsys, ['/system be', 'to'], taught=False)
    assert 'never taught' in text
