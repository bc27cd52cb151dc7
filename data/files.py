"""
Token files: getting a text, writing its tokens, reading windows of them without ever holding a file in memory.

data/<name>/{train,val}.bin (or train_*.bin, val_*.bin) are flat arrays of token ids; data/<name>/meta.json says of which
type and vocabulary. A nanoGPT folder works as it is: no meta.json means GPT-2 tokens, or the characters in its meta.pkl.
"""
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent


def download(urls, path, sha256, timeout=30):
    """Fetch the first of urls that answers with the text whose checksum this is, and put it at path, whole or not at all."""
    import requests
    problems = []
    for url in urls:
        try:
            reply = requests.get(url, timeout=timeout)
            reply.raise_for_status()
            if hashlib.sha256(reply.content).hexdigest() == sha256:
                return write(path, reply.content)
            problems.append(f'{url}: not the expected text (checksum differs)')
        except requests.RequestException as error:
            problems.append(f'{url}: {type(error).__name__}')
    raise ConnectionError(f'cannot download {Path(path).name}: ' + '; '.join(problems))


def write(path, content):
    """Write bytes under a temporary name, then rename: path is never half-written."""
    path = Path(path)
    path.with_suffix('.tmp').write_bytes(content)
    os.replace(path.with_suffix('.tmp'), path)


def write_tokens(folder, tokenizer, source, **splits):
    """Write {split}.bin for every split (a list of ids, or an array) and then meta.json, which says that all is there."""
    dtype = 'uint16' if tokenizer.vocab_size <= 2 ** 16 else 'uint32'
    arrays = {split: np.asarray(ids, dtype=dtype) for split, ids in splits.items()}
    for split, array in arrays.items():
        if len(array) < 2:
            raise ValueError(f'{source}: too short, {len(array)} tokens for {split}.bin')
    for split, array in arrays.items():
        write(Path(folder) / f'{split}.bin', array.tobytes())
        print(f'{split} has {len(array):,} tokens')
    write_meta(folder, tokenizer, source, dtype, {split: len(array) for split, array in arrays.items()},
               {split: hashlib.sha256(array).hexdigest() for split, array in arrays.items()})


def write_meta(folder, tokenizer, source, dtype, counts, sha256):
    meta = dict(dtype=dtype, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.spec, counts=counts, source=str(source),
                sha256=sha256)
    write(Path(folder) / 'meta.json', json.dumps(meta, indent=1).encode())


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; a pickle that names any class or function is refused unexecuted."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'refused: it wants to load {module}.{name}')


def read_meta(folder):
    """-> meta of a data set's folder; for a nanoGPT folder, what its meta.pkl or its absence implies."""
    folder = Path(folder)
    if (folder / 'meta.json').exists():
        return json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    if (folder / 'meta.pkl').exists():
        with open(folder / 'meta.pkl', 'rb') as file:
            try:
                itos = PlainUnpickler(file).load()['itos']
                chars = ''.join(itos[i] for i in range(len(itos)))
            except (pickle.UnpicklingError, LookupError, TypeError, EOFError, ValueError) as error:
                raise ValueError(f"{folder / 'meta.pkl'}: not nanoGPT's table of characters ({error})") from None
        spec = {'kind': 'char', 'chars': chars, 'special': []}
        return {'dtype': 'uint16', 'vocab_size': len(itos), 'tokenizer': spec}
    return {'dtype': 'uint16', 'vocab_size': 50304, 'tokenizer': {'kind': 'gpt2'}}


def is_ready(folder):
    """Whether a data set can be read: meta.json is written last, and nanoGPT's folders have a train.bin."""
    return (Path(folder) / 'meta.json').exists() or (Path(folder) / 'train.bin').exists()


class Tokens:
    """One split of a data set, as one long sequence that stays on the disk. A window never spans two files."""

    def __init__(self, folder, split):
        self.meta = read_meta(folder)
        self.dtype = np.dtype(self.meta['dtype'])
        self.paths = [p for p in [Path(folder) / f'{split}.bin'] if p.exists()] or sorted(Path(folder).glob(f'{split}_*.bin'))
        if not self.paths:
            raise ValueError(f'{folder}: there is no {split}.bin')
        for path in self.paths:
            if path.stat().st_size % self.dtype.itemsize:
                raise ValueError(f'{path}: cut in the middle of a token; prepare it again')
        self.sizes = np.array([path.stat().st_size // self.dtype.itemsize for path in self.paths])
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)))

    def __len__(self):
        return int(self.starts[-1])

    def windows(self, offsets, length):
        """offsets: places in the sequence -> (len(offsets), length) int64. At the end of a file a window slides back."""
        files = np.searchsorted(self.starts, offsets, side='right') - 1
        out = np.empty((len(offsets), length), dtype=np.int64)
        for i in np.unique(files):
            if self.sizes[i] < length:
                raise ValueError(f'{self.paths[i]}: {self.sizes[i]} tokens are too few for a window of {length}')
            # A fresh memmap each time: its pages are given back, so that memory stays flat over a file of any size.
            data = np.memmap(self.paths[i], dtype=self.dtype, mode='r')
            for row in np.flatnonzero(files == i):
                start = min(offsets[row] - self.starts[i], self.sizes[i] - length)
                out[row] = data[start:start + length]
        if out.size and out.max() >= self.meta['vocab_size']:
            raise ValueError(f"{self.paths[0].parent}: token {out.max()} is beyond the vocabulary of "
                             f"{self.meta['vocab_size']}; prepare it again")
        return out

    def cover(self, length):
        """-> offsets, repeats: windows of length + 1 whose targets are every token but each file's first, once, if the
        first repeats[i] targets of window i (which a file's last window, slid back, shares) are left out."""
        places = [np.arange(0, size - 1, length) for size in self.sizes]
        repeats = [np.maximum(0, place + length + 1 - size) for place, size in zip(places, self.sizes)]
        return np.concatenate([p + s for p, s in zip(places, self.starts)]), np.concatenate(repeats)
