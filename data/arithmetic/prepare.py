"""
Our own world of questions, endless and checkable: sums, word problems, spelling, counting letters.

    python data/arithmetic/prepare.py                       # 2,000 worked answers to learn from
    python data/arithmetic/prepare.py --demonstrations=500

A word problem has an opening, one or two events (maybe of no consequence) and an ending, each in
one of many wordings. A worked answer goes through it sentence by sentence: who, how many, and if
that matters a call of the calculator, or what the head makes of it; then, as in GSM8K, #### and the
result. No question is in two splits: its checksum says where it belongs.
"""
import json
import random
import re
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.files import tokenizer_of  # noqa: E402
from data.sources import run_prepare, write_conversations  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from data.tools import calculate  # noqa: E402

demonstrations = 2000   # worked answers in train.bin; at least 1
held_out = 500          # and in val.bin; at least 1
difficulty = 2          # digits of the numbers, at most; from 1 to 9
in_head = 0.5           # share of easy steps done in the head, as people do; from 0 to 1
tokenizer = ''          # a folder with a vocabulary; '' is of this world's words
out_dir = ''            # where the token files go; '' is beside this file

WORDINGS = json.loads((HERE / 'wordings.json').read_text(encoding='utf-8'))
NAMES, ITEMS, WORDS, ONSETS, VOWELS, CODAS, WHEN = (WORDINGS[kind] for kind in (
    'names', 'items', 'words', 'onsets', 'vowels', 'codas', 'when'))
# What a wording does to the number so far is its key: + x, - x, * x, or nothing. NEW are events in
# wordings that only the test's variants have.
OPENINGS, EVENTS, ENDINGS, NEW, SUMS = (WORDINGS[kind] for kind in (
    'openings', 'events', 'endings', 'new', 'sums'))
# What it does to the number is all that there is to learn of a verb. The file has 120 for more, for
# less, for neither; 2,000 worked answers show one two to four times on average, a few never.
GAINS, LOSSES, KEEPS = (part.split() for part in (HERE / 'verbs.txt').read_text().split('\n\n'))


def vocabulary():
    """A token for each word of this world; other words, as those to be spelled, are letters."""
    wordings = [text for part in (OPENINGS, EVENTS, ENDINGS, SUMS)
                for texts in part.values() for text in texts]
    others = ('The numbers are notes For it was It began with ended again Again is in begins ends '
              'and written the word Spell How do you spell many letters Count letter so ####')
    verbs = GAINS + LOSSES + KEEPS
    return Tokenizer.of_words(' '.join([*NAMES, *ITEMS, *verbs, *WHEN, *wordings, others]))


def number(rng, digits):
    return rng.randrange(2, 10 ** rng.randint(1, digits))


def factor(rng):
    return rng.randrange(2, 10)


def wording(rng, choices, sign=None):
    """-> what it does to the number, text with places for names, verbs, things, times, numbers"""
    sign = rng.choice(list(choices)) if sign is None else sign
    return sign, rng.choice(choices[sign])


def told(rng, text, **words):
    """The text with its places filled: the words given, any verb of the kind, any time."""
    return text.format(gain=rng.choice(GAINS), loss=rng.choice(LOSSES), keep=rng.choice(KEEPS),
                       w=rng.choice(WHEN), **words)


def quoted(sentence):
    """Who it is about, and each number with the word before it: what a worked answer quotes."""
    numbers = re.findall(r'\w+ \d+', sentence)
    who = [word for word in re.findall(r'\w+', sentence) if word in NAMES and numbers]
    return ' '.join(who[:1] + numbers)


def word_problem(rng, digits, events, most):
    """-> question, steps (quote, call or ''), answer. Numbers stay positive."""
    (n, m), i = rng.sample(NAMES, 2), rng.choice(ITEMS)
    sign, text = wording(rng, OPENINGS)
    x, y = number(rng, digits), factor(rng) if sign == '*' else number(rng, digits)
    said = [told(rng, text, n=n, i=i, x=x, y=y)]
    steps = [(quoted(said[0]), f'{x}{sign}{y}' if sign else '')]
    so_far = int(calculate(steps[0][1])) if sign else x
    parts = [events] * rng.randint(1, most) + [ENDINGS]
    for part in parts:
        sign, text = wording(rng, part)
        if so_far < 3 or sign == '*' and so_far > 10000:
            sign, text = wording(rng, part, '+')
        x = factor(rng) if sign == '*' else number(rng, digits)
        if sign == '-' or '{keep}' in text:     # some of what there is
            x = rng.randrange(2, min(x, so_far - 1) + 1)
        said.append(told(rng, text, n=n, m=m, i=i, x=x))
        steps.append((quoted(said[-1]), f'{so_far}{sign}{x}' if sign else ''))
        so_far = int(calculate(steps[-1][1])) if sign else so_far
    return ' '.join(said), steps, str(so_far)


def sum_of_two(rng, digits):
    sign, text = wording(rng, SUMS)
    x, y = number(rng, digits), factor(rng) if sign == '*' else number(rng, digits)
    x, y = (max(x, y), min(x, y)) if sign == '-' else (x, y)
    return text.format(x=x, y=y), f'{x}{sign}{y}'


def word_of(rng):
    """A word, half of the time of no language, so that any word can be copied."""
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    return ''.join(rng.choice(ONSETS) + rng.choice(VOWELS)
                   for _ in range(rng.randint(1, 3))) + rng.choice(CODAS)


def letters_of(rng):
    word = word_of(rng)
    letter = rng.choice(word if rng.random() < 0.9 else 'abcdefghijklmnopqrstuvwxyz')
    text = rng.choice(['How many letters {l} are in {w}?', "How many {l}'s are in {w}?",
                       'Count the letter {l} in the word {w}.'])
    return text.format(l=letter, w=word), f'"{word}".count("{letter}")'


def spelling_of(rng):
    word = word_of(rng)
    return rng.choice(['Spell the word {}.', 'How do you spell {}?']).format(word), '-'.join(word)


def is_easy(call):
    """Whether a person might do it in the head: the result is below 100."""
    return call[0].isdigit() and len(calculate(call)) < 3


def example(rng, digits, events, most):
    """-> kind, question, parts of the worked answer, the final answer"""
    kind = rng.choices(KINDS, [15, 2, 2, 1])[0]
    if kind == 'problem':
        question, steps, answer = word_problem(rng, digits, events, most)
    elif kind == 'spelling':
        question, answer = spelling_of(rng)
        steps = []
    else:
        question, call = sum_of_two(rng, digits) if kind == 'sum' else letters_of(rng)
        steps, answer = [('', call)], calculate(call)
    parts = []
    for quote, call in steps:
        text = f' {quote}' if quote else ''
        if call and is_easy(call) and rng.random() < in_head:
            text, call = f'{text} so {calculate(call)}', ''
        if text:
            parts.append({'type': 'text', 'text': f'{text} ' if call else text})
        if call:
            parts += [{'type': 'call', 'text': call}, {'type': 'result', 'text': calculate(call)}]
    parts.append({'type': 'text', 'text': f' #### {answer}'})
    return dict(kind=kind, question=question, parts=parts, answer=answer)


KINDS = ['problem', 'sum', 'letters', 'spelling']
LONGEST = 400   # characters of a question and its answer: a row of 256 tokens holds them
VARIANTS = {    # for the test alone, of word problems alone
    'new wordings': {'events': NEW, 'kinds': ['problem']},
    'harder numbers': {'digits': 4, 'kinds': ['problem']},
    'longer stories': {'most': 4, 'kinds': ['problem']}}


def prepared_digits():
    """-> the digits of the world that was prepared here: all its questions are of one difficulty"""
    made = HERE / 'world.json'
    return json.loads(made.read_text())['digits'] if made.exists() else difficulty


def split_of(question):
    """Of ten questions eight are to train on, one is to choose by (val), one to report (test)."""
    return {0: 'test', 1: 'val'}.get(zlib.crc32(question.encode()) % 10, 'train')


def examples(split='train', seed=0, digits=None, events=EVENTS, most=2, kinds=KINDS):
    """Yields questions of a split without end: {kind, question, parts, answer}, by seed. A word
    problem has at most so many events; kinds: which of them."""
    rng, digits = random.Random(f'{split} {seed}'), digits or prepared_digits()
    while True:
        made = example(rng, digits, events, most)
        size = len(made['question']) + sum(len(part['text']) + 1 for part in made['parts'])
        if split_of(made['question']) == split and size < LONGEST and made['kind'] in kinds:
            yield made


def conversation(example):
    """-> messages, with the worked answer"""
    return [{'role': 'user', 'content': example['question']},
            {'role': 'assistant', 'content': example['parts']}]


def reward(example, answer):
    """1.0 if what follows the last #### is right, else 0.0. answer: the text as people see it"""
    return float('####' in answer and answer.rpartition('####')[2].strip() == example['answer'])


def prepare(folder=HERE):
    made = {split: examples(split, digits=difficulty) for split in ('train', 'val')}
    counts = {'train': demonstrations, 'val': held_out}
    write_conversations(
        out_dir or folder, tokenizer_of(tokenizer) if tokenizer else vocabulary(),
        f'{demonstrations} made-up questions',
        {'world.json': json.dumps({'digits': difficulty}).encode()},
        **{split: [conversation(next(made[split])) for _ in range(count)]
           for split, count in counts.items()})


if __name__ == '__main__':
    run_prepare(globals(), prepare)
