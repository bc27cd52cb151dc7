"""
Tiny Shakespeare in GPT-2's tokens, to finetune GPT-2 on: 301,966 tokens, and 36,059 to validate.

    python data/shakespeare/prepare.py [--source=a/local/input.txt]
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.shakespeare_char.prepare import shakespeare  # noqa: E402
from data.sources import run_prepare, write_tokens  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

source = ''  # a text file to read; '' is tiny Shakespeare, downloaded if it is not there


def prepare(source='', folder=HERE):
    text = shakespeare(source)
    tokenizer = Tokenizer({'kind': 'gpt2'})
    cut = int(len(text) * 0.9)
    write_tokens(folder, tokenizer, source or 'tiny Shakespeare',
                 train=tokenizer.encode(text[:cut]), val=tokenizer.encode(text[cut:]))


if __name__ == '__main__':
    run_prepare(globals(), prepare, 'source')
