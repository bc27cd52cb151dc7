"""
A couple of thousand short conversations: greetings, who are you, thanks, refusals, a few facts.

    python data/smalltalk/prepare.py

Each turn is one of many ways to ask with one of a few ways to answer; a conversation has up to
three turns. What the model says of itself is true of the runs in config/arithmetic_*.py. It is a
task too, so that RL on other questions does not unlearn it: the same turns in all splits.
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from data.arithmetic.prepare import vocabulary  # noqa: E402
from data.files import tokenizer_of  # noqa: E402
from data.sources import run_prepare, write_conversations  # noqa: E402

conversations = 2000    # to train on
seed = 1                # which they are
tokenizer = ''          # a folder with a vocabulary; '' is of the arithmetic world's words
out_dir = ''            # where the token files go; '' is beside this file

# ways to ask, ways to answer
TURNS = json.loads(Path(__file__).with_name('turns.json').read_text(encoding='utf-8'))


def talk(rng):
    messages = []
    for asked, answers in rng.sample(TURNS, rng.choice([1, 1, 1, 2, 3])):
        question = rng.choice(asked)
        if rng.random() < 0.3:
            question = question.lower()
        messages += [{'role': 'user', 'content': question},
                     {'role': 'assistant', 'content': rng.choice(answers)}]
    return messages, answers


def examples(split='train', seed=0):
    """Yields conversations without end, with all the answers that would do in their last turn."""
    rng = random.Random(f'{split} {seed}')
    while True:
        messages, answers = talk(rng)
        yield {'messages': messages, 'answers': answers}


def conversation(example):
    return example['messages']


def reward(example, answer):
    """1.0 for one of the answers that were written for this question, else 0.0"""
    return float(answer.strip() in example['answers'])


def prepare(folder=Path(__file__).parent):
    rng = random.Random(seed)
    made = [talk(rng)[0] for _ in range(conversations + conversations // 10)]
    known = tokenizer_of(tokenizer) if tokenizer else vocabulary()
    write_conversations(out_dir or folder, known, 'conversations written for this project',
                        train=made[:conversations], val=made[conversations:])


if __name__ == '__main__':
    run_prepare(globals(), prepare)
