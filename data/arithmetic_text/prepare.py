"""
Text of the world that data/arithmetic asks about, to learn writing from: who has what, what was
noted, sums, spelled words. It holds no question and no worked answer.

    python data/arithmetic_text/prepare.py
"""
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from configurator import configure  # noqa: E402
from data.arithmetic.prepare import (  # noqa: E402
    EVENTS,
    ITEMS,
    NAMES,
    OPENINGS,
    factor,
    number,
    quoted,
    tokenizer,
    told,
    word_of,
    wording,
)
from data.files import run_prepare, write_tokens  # noqa: E402

characters = 4_000_000  # of text to train on


def story(rng):
    """Something happens to the things of n, which nobody counts; then it is noted."""
    (n, m), i = rng.sample(NAMES, 2), rng.choice(ITEMS)
    said = []
    for part in [OPENINGS] + [EVENTS] * rng.randint(0, 2):
        sign, text = wording(rng, part)
        x = factor(rng) if sign == '*' and part is EVENTS else number(rng, 3)
        y = factor(rng) if sign == '*' else number(rng, 3)
        said.append(told(rng, text, n=n, m=m, i=i, x=x, y=y))
    notes, numbers = ' '.join(map(quoted, said)), re.findall(r'\d+', ' '.join(said))
    return ' '.join(said + rng.sample([
        f'The notes are {notes}.', f'{n} notes {notes}: {", ".join(numbers)}.',
        f'For {n} it was {", ".join(numbers)}.',
        f'It began with {numbers[0]}, it ended with {numbers[-1]}.'], 2))


def fact(rng):
    """Of numbers or of a word; most of it can be copied from where it was said before."""
    x, y, z, word = number(rng, 4), number(rng, 3), number(rng, 5), word_of(rng)
    letter, spelled = rng.choice(word), '-'.join(word)
    return rng.choice([
        f'{x}+{y} is {x + y}. Again: {x}+{y} is {x + y}.', f'{x} {y} {z}, again {x} {y} {z}.',
        f'{word} begins with {word[0]} and ends with {word[-1]}: {spelled}.',
        f'"{word}" is the word {word}. Again: "{word}".',
        f'{word} is written {spelled}, {word}.', f'{spelled} is {word}, "{word}".',
        f'"{letter}" is in "{word}", {letter} in {word}.'])


def text_of(count, seed):
    rng, lines, size = random.Random(seed), [], 0
    while size < count:
        lines.append(story(rng) if rng.random() < 0.45 else fact(rng))
        size += len(lines[-1]) + 1
    return '\n'.join(lines)


def prepare(folder=Path(__file__).parent):
    encode = tokenizer().encode
    write_tokens(folder, tokenizer(), 'sentences made up from a seed',
                 train=encode(text_of(characters, 'train')),
                 val=encode(text_of(characters // 20, 'val')))


if __name__ == '__main__':
    configure(globals())
    run_prepare(prepare)
