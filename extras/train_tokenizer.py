"""
A vocabulary of one's own: byte pairs (arXiv:1508.07909), learned from text by rustbpe.

    pip install rustbpe
    python -m extras.train_tokenizer --source="folder/*.parquet" --out_dir=data/bpe
    python data/fineweb/prepare.py --source="folder/*.parquet" --tokenizer=data/bpe

It is written to out_dir/meta.json, as plain data; data sets that take --tokenizer=out_dir, and the
checkpoints of runs on them, hold a copy. The same bytes give the same vocabulary.
"""
import glob
from pathlib import Path

from tqdm import tqdm

from configurator import configure
from data.files import program, write
from data.sources import meta_of
from data.tokenizer import Tokenizer
from data.vocabulary import PATTERN, SPECIAL
from data.web import FINEWEB_EDU, groups_of, hub_files, texts_of

source = ''              # files: 'folder/*.parquet', '*.jsonl' or '*.txt'; '': FineWeb-Edu's
vocab_size = 32768       # tokens, bytes and special ones too; from 264 to 1e6
out_dir = 'data/bpe'     # where meta.json goes
max_bytes = 2000000000   # of text to learn from; 0: all of it; at least 0


def documents(paths, most):
    """Yields the texts of files, until they are `most` bytes (0: all)."""
    total = 0
    with tqdm(unit='B', unit_scale=True) as bar:
        for path in paths:
            for group in groups_of(path):
                for text in texts_of(path, group):
                    yield text
                    size = len(text.encode())
                    total += size
                    bar.update(size)
                    if 0 < most <= total:
                        return


def learn(texts, size):
    """
    The pairs of tokens that are most frequent, one after the other, become tokens.
    -> the Tokenizer of `size` tokens; fewer if the texts have not as many pairs
    """
    import rustbpe
    learned = rustbpe.Tokenizer()
    learned.train_from_iterator(texts, size - len(SPECIAL), pattern=PATTERN)
    ranks = sorted(learned.get_mergeable_ranks(), key=lambda pair: pair[1])
    # Two ways to merge may lead to the same bytes: these are one token.
    tokens = dict.fromkeys(bytes(token).decode('latin-1') for token, rank in ranks if rank > 255)
    return Tokenizer({'kind': 'bpe', 'pattern': PATTERN, 'tokens': list(tokens)})


def main():
    configure(globals())
    paths = sorted(glob.glob(source)) if source else hub_files(*FINEWEB_EDU)
    if not paths:
        raise FileNotFoundError(f'--source={source}: no such file')
    if list(Path(out_dir).glob('*.bin')):
        raise ValueError(f'--out_dir={out_dir}: a data set is there, with a vocabulary of its own')
    tokenizer = learn(documents(paths, max_bytes), vocab_size)
    if not tokenizer.spec['tokens']:
        raise ValueError(f'--source={source}: no text to learn from')
    write(Path(out_dir, 'meta.json'), meta_of(tokenizer, source or FINEWEB_EDU[0], {}, {}))
    fewer = '' if tokenizer.vocab_size == vocab_size else ': the texts have no more pairs'
    print(f'{tokenizer.vocab_size:,} tokens in {out_dir}/meta.json{fewer}')


if __name__ == '__main__':
    program(main)
