"""
GSM8K (arXiv:2110.14168): 8.5 thousand word problems with worked answers.

    python data/gsm8k/prepare.py [--source=a/folder/with/train.jsonl/and/test.jsonl]

The marks of the calculator, <<48/2=24>>, become calls of ours where both agree.
"""
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data import sources  # noqa: E402
from data.files import tokenizer_of  # noqa: E402
from data.tools import calculate  # noqa: E402

source = ''     # a folder with train.jsonl and test.jsonl; '' fetches openai/gsm8k from the hub
tokenizer = ''  # a folder with a vocabulary, of extras/train_tokenizer.py; '' is GPT-2's
strict = False  # stop at a row that cannot be read, instead of leaving it out


def worked(answer):
    """'48/2 = <<48/2=24>>24 clips' -> its parts: text, call, result, text"""
    parts = []
    for i, piece in enumerate(re.split('<<(.*?)>>', answer)):
        call, _, result = piece.rpartition('=')
        if i % 2 and calculate(call) == result:
            parts += [{'type': 'call', 'text': call}, {'type': 'result', 'text': result}]
        elif i % 2 == 0:
            parts.append({'type': 'text', 'text': piece})
    return parts


def final(text):
    """What follows the last ####, as a number if it is one: 1,000 is 1000.0; None without ####."""
    found = re.search(r'.*####\s*(\S.*)', text, re.DOTALL)
    if not found:
        return None
    words = found[1].strip().strip('$').replace(',', '')
    try:
        return float(words)
    except ValueError:
        return words


def simple(row):
    """A row of the data set -> {question, answer}. ValueError if there is no final answer."""
    row = {name: row[name].strip() for name in ('question', 'answer')}
    if final(row['answer']) is None or not row['question']:
        raise ValueError('no question, or no #### and a result')
    return row


def examples(split='train', seed=0):
    """Yields {question, answer}."""
    return sources.read_questions(HERE, split, seed)


def conversation(example):
    """-> messages, with the worked answer"""
    return [{'role': 'user', 'content': example['question']},
            {'role': 'assistant', 'content': worked(example['answer'])}]


def reward(example, answer):
    """1.0 if the number behind the last #### is right, else 0.0."""
    return float(final(answer) is not None and final(answer) == final(example['answer']))


def prepare(source='', folder=HERE):
    found = sources.load_splits(source, 'openai/gsm8k', 'main', read=simple, strict=strict)
    sources.write_questions(folder, tokenizer_of(tokenizer), source or 'openai/gsm8k',
                          conversation, **found)


if __name__ == '__main__':
    sources.run_prepare(globals(), prepare, 'source')
