"""
Token files: getting a text, writing its tokens, reading windows without holding a file in memory.

data/<name>/{train,val}.bin (or train_*.bin, val_*.bin) are flat arrays of token ids, meta.json says
of which type and vocabulary. A nanoGPT folder works as it is: no meta.json means GPT-2 tokens, or
the characters in its meta.pkl.
"""
import hashlib
import importlib
import json
import os
import pickle
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent


def download(urls, path, sha256, timeout=30):
    """Put at path, whole or not at all, the first of urls that gives the text of this checksum."""
    import requests
    problems = []
    for url in urls:
        try:
            print(f'downloading {url}', flush=True)
            reply = requests.get(url, timeout=timeout)
            reply.raise_for_status()
            if hashlib.sha256(reply.content).hexdigest() == sha256:
                return write(path, lambda file, text=reply.content: file.write(text))
            problems.append(f'{url}: not the expected text (checksum differs)')
        except requests.RequestException as error:
            problems.append(f'{url}: {type(error).__name__}')
    raise ConnectionError(f'cannot download {Path(path).name}: ' + '; '.join(problems))


def write(path, put):
    """Let put(file) write under a temporary name, flush, rename: path is never half-written."""
    path, temporary = Path(path), Path(path).with_suffix(f'.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f'{path}: cannot be written ({str(error).splitlines()[0]}); what was there '
                      'before is intact. Make room and go on') from None


def write_tokens(folder, tokenizer, source, **splits):
    """Write meta.json, then {split}.bin for every split (its ids), train.bin last."""
    dtype = 'uint16' if tokenizer.vocab_size <= 2 ** 16 else 'uint32'
    arrays = {split: np.asarray(ids, dtype=dtype) for split, ids in splits.items()}
    for split, array in arrays.items():
        if len(array) < 2:
            raise ValueError(f'{source}: too short, {len(array)} tokens for {split}.bin')
    write_meta(folder, tokenizer, source, dtype,
               counts={split: len(array) for split, array in arrays.items()},
               sha256={split: hashlib.sha256(array).hexdigest() for split, array in arrays.items()})
    for split, array in sorted(arrays.items(), reverse=True):   # train.bin last: then all is there
        write(Path(folder) / f'{split}.bin', array.tofile)
        print(f'{split} has {len(array):,} tokens')


def write_meta(folder, tokenizer, source, dtype, counts, sha256):
    meta = dict(dtype=dtype, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.spec,
                counts=counts, source=str(source), sha256=sha256)
    text = json.dumps(meta, indent=1).encode()
    write(Path(folder) / 'meta.json', lambda file: file.write(text))


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings, numbers; a pickle that names a class or function is refused unrun."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'refused: it wants to load {module}.{name}')


def read_meta(folder):
    """-> meta of a data set; for a nanoGPT folder, what its meta.pkl or its absence implies."""
    folder = Path(folder)
    if (folder / 'meta.json').exists():
        try:
            return json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        except ValueError as error:
            raise ValueError(f'{folder}/meta.json: damaged ({error}); prepare it again') from None
    if (folder / 'meta.pkl').exists():
        with open(folder / 'meta.pkl', 'rb') as file:
            try:
                itos = PlainUnpickler(file).load()['itos']
                chars = ''.join(itos[i] for i in range(len(itos)))
            except (pickle.UnpicklingError, LookupError, TypeError, EOFError, ValueError) as error:
                raise ValueError(f'{folder}/meta.pkl: no table of characters ({error})') from None
        spec = {'kind': 'char', 'chars': chars, 'special': []}
        return {'dtype': 'uint16', 'vocab_size': len(itos), 'tokenizer': spec}
    return {'dtype': 'uint16', 'vocab_size': 50304, 'tokenizer': {'kind': 'gpt2'}}


def is_ready(folder):
    """Whether a data set can be read: of one file, train.bin comes last; of many, meta.json."""
    shards = any(Path(folder).glob('train_*.bin')) and (Path(folder) / 'meta.json').exists()
    return shards or (Path(folder) / 'train.bin').exists()


def find(name, prepare=True):
    """
    Prepare the data set if it is not there yet and small; the large ones are prepared by hand.
    -> '' or what is wrong. Raises ValueError if there is no such data set.
    """
    folder = DATA / name
    if not folder.is_dir():
        there = ' '.join(sorted(path.parent.name for path in DATA.glob('*/prepare.py')))
        raise ValueError(f'--dataset={name}: there is no data/{name}; there are: {there}')
    if prepare and not is_ready(folder) and (DATA / name / 'prepare.py').exists():
        module = importlib.import_module(f'data.{name}.prepare')
        try:
            if hasattr(module, 'prepare'):
                module.prepare()
        except (OSError, ValueError) as error:
            return f'data/{name}: {error}'
    return '' if is_ready(folder) else f'data/{name}: not there; python data/{name}/prepare.py'


class Tokens:
    """
    One split of a data set: a long sequence, on disk. A window never spans two of its files, and
    files shorter than length are left out.
    """

    def __init__(self, folder, split, length=1, vocab_size=None):
        self.meta = read_meta(folder)
        self.vocab_size = vocab_size or self.meta['vocab_size']
        self.dtype = np.dtype(self.meta['dtype'])
        one = Path(folder) / f'{split}.bin'
        self.paths = [one] if one.exists() else sorted(Path(folder).glob(f'{split}_*.bin'))
        if not self.paths:
            raise ValueError(f'{folder}: there is no {split}.bin')
        for path in self.paths:
            if path.stat().st_size % self.dtype.itemsize:
                raise ValueError(f'{path}: cut in the middle of a token; prepare it again')
        sizes = {path: path.stat().st_size // self.dtype.itemsize for path in self.paths}
        self.paths = [path for path in self.paths if sizes[path] >= length]
        if not self.paths:
            raise ValueError(f'{folder}: {max(sizes.values())} tokens in {split} are too few for a '
                             f'row of {length - 1}; make --block_size smaller or the text longer')
        self.sizes = np.array([sizes[path] for path in self.paths])
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)))

    def __len__(self):
        return int(self.starts[-1])

    def windows(self, offsets, length):
        """Places in the sequence -> (places, length) int64. One at a file's end slides back."""
        files = np.searchsorted(self.starts, offsets, side='right') - 1
        out = np.empty((len(offsets), length), dtype=np.int64)
        for i in np.unique(files):
            if self.sizes[i] < length:
                raise ValueError(f'{self.paths[i]}: too short for a window of {length} tokens')
            # A fresh memmap each time gives its pages back: memory stays flat over any size.
            data = np.memmap(self.paths[i], dtype=self.dtype, mode='r')
            for row in np.flatnonzero(files == i):
                start = min(offsets[row] - self.starts[i], self.sizes[i] - length)
                out[row] = data[start:start + length]
        if out.size and out.max() >= self.vocab_size:
            raise ValueError(f'{self.paths[0].parent}: token {out.max()} is beyond the vocabulary '
                             f'of {self.vocab_size}; prepare it again')
        return out

    def cover(self, length):
        """
        -> offsets, repeats: windows of length + 1 whose targets are every token (but each file's
        first) once, if window i leaves out its first repeats[i]: a file's last window slides back.
        """
        places = [np.arange(0, size - 1, length) for size in self.sizes]
        repeats = [np.maximum(0, place + length + 1 - size)
                   for place, size in zip(places, self.sizes, strict=True)]
        offsets = [place + start for place, start in zip(places, self.starts[:-1], strict=True)]
        return np.concatenate(offsets), np.concatenate(repeats)
