"""
ARC (arXiv:1803.05457): science questions with four choices or so.

    python data/arc/prepare.py [--challenge=True] [--source=a/folder]   # train.jsonl, test.jsonl
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data import sources  # noqa: E402
from data.files import tokenizer_of  # noqa: E402

source = ''         # a folder with train.jsonl and test.jsonl; '' fetches allenai/ai2_arc
challenge = False   # ARC-Challenge instead of ARC-Easy
tokenizer = ''      # a folder with a vocabulary, of extras/train_tokenizer.py; '' is GPT-2's
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
    return sources.read_questions(HERE, split, seed)


def conversation(example):
    return [{'role': 'user', 'content': example['question']},
            {'role': 'assistant', 'content': example['answer']}]


def reward(example, answer):
    """1.0 for the right letter, and nothing else."""
    return float(answer.strip() == example['answer'])


def prepare(source='', folder=HERE):
    name = 'ARC-Challenge' if challenge else 'ARC-Easy'
    found = sources.load_splits(source, 'allenai/ai2_arc', name, read=simple, strict=strict)
    sources.write_questions(folder, tokenizer_of(tokenizer), source or 'allenai/ai2_arc',
                          conversation, **found)


if __name__ == '__main__':
    sources.run_prepare(globals(), prepare, 'source')
