"""
ARC (arXiv:1803.05457): science questions with four choices or so, in GPT-2's tokens.

    python data/arc/prepare.py [--challenge=True] [--source=a/folder]   # train.jsonl, test.jsonl
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.files import load_splits, read_questions, run_prepare, write_questions  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

source = ''         # a folder with train.jsonl and test.jsonl; '' fetches allenai/ai2_arc
challenge = False   # ARC-Challenge instead of ARC-Easy
strict = False      # stop at a row that cannot be read, instead of leaving it out

LETTERS = 'ABCDEFGH'


def simple(row):
    """A row of the data set -> {question: with its choices, a line each, answer: a letter}"""
    texts, labels = row['choices']['text'], row['choices']['label']     # A to D, or 1 to 4
    lines = [f'{letter}. {text}' for letter, text in zip(LETTERS, texts)]
    return {'question': '\n'.join([row['question'].strip(), *lines]),
            'answer': LETTERS[labels.index(row['answerKey'])]}


def examples(split='train', seed=0):
    """Yields {question, answer}."""
    return read_questions(HERE, split, seed)


def conversation(example):
    return [{'role': 'user', 'content': example['question']},
            {'role': 'assistant', 'content': example['answer']}]


def reward(example, answer):
    """1.0 for the right letter, and nothing else."""
    return float(answer.strip() == example['answer'])


def prepare(source='', folder=HERE):
    found = load_splits(source, 'allenai/ai2_arc', 'ARC-Challenge' if challenge else 'ARC-Easy',
                        read=simple, strict=strict)
    write_questions(folder, Tokenizer({'kind': 'gpt2'}), source or 'allenai/ai2_arc', conversation,
                    **found)


if __name__ == '__main__':
    run_prepare(globals(), prepare, 'source')
