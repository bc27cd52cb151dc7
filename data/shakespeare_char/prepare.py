"""
Tiny Shakespeare, a token a character: 1.1 MB; 1,003,854 tokens to train on, 111,540 to validate.

    python data/shakespeare_char/prepare.py [--source=a/local/input.txt]
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.files import read_text  # noqa: E402
from data.sources import download, run_prepare, write_tokens  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

source = ''  # a text file to read; '' is input.txt beside this file, downloaded if it is not there

URLS = ['https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
        'https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt']
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def shakespeare(source=''):
    """-> the whole of tiny Shakespeare, or of another text at source."""
    path = Path(source or HERE.parent / 'shakespeare_char' / 'input.txt')
    if not source and not path.exists():
        download(URLS, path, SHA256)
    return read_text(path)


def prepare(source='', folder=HERE):
    text = shakespeare(source)
    tokenizer = Tokenizer.of_text(text)
    cut = int(len(text) * 0.9)
    print(f'{len(text):,} characters, {len(tokenizer.chars)} different ones')
    write_tokens(folder, tokenizer, source or 'tiny Shakespeare',
                 train=tokenizer.encode(text[:cut]), val=tokenizer.encode(text[cut:]))


if __name__ == '__main__':
    run_prepare(globals(), prepare, 'source')
