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
from data.arithmetic import prepare as world  # noqa: E402
from data.sources import run_prepare, write_tokens  # noqa: E402

characters = 4_000_000  # of text to train on


def story(rng):
    """Something happens to the things of n, which nobody counts; then it is noted."""
    (n, m), i = rng.sample(world.NAMES, 2), rng.choice(world.ITEMS)
    said = []
    for part in [world.OPENINGS] + [world.EVENTS] * rng.randint(0, 2):
        sign, text = world.wording(rng, part)
        x = world.factor(rng) if sign == '*' and part is world.EVENTS else world.number(rng, 3)
        y = world.factor(rng) if sign == '*' else world.number(rng, 3)
        said.append(world.told(rng, text, n=n, m=m, i=i, x=x, y=y))
    notes, numbers = ' '.join(map(world.quoted, said)), re.findall(r'\d+', ' '.join(said))
    return ' '.join(said + rng.sample([
        f'The notes are {notes}.', f'{n} notes {notes}: {", ".join(numbers)}.',
        f'For {n} it was {", ".join(numbers)}.',
        f'It began with {numbers[0]}, it ended with {numbers[-1]}.'], 2))


def fact(rng):
    """Of numbers or of a word; most of it can be copied from where it was said before."""
    x, y, z = (world.number(rng, digits) for digits in (4, 3, 5))
    word = world.word_of(rng)
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
    encode = world.vocabulary().encode
    write_tokens(folder, world.vocabulary(), 'sentences made up from a seed',
                 train=encode(text_of(characters, 'train')),
                 val=encode(text_of(characters // 20, 'val')))


if __name__ == '__main__':
    run_prepare(globals(), prepare)
