"""Reading windows of token files, of any size, without holding a file in memory."""
import math
from pathlib import Path

import numpy as np

from data.files import read_meta


class Tokens:
    """
    One split of a data set: a long sequence, on disk. A window never spans two of its files, and
    files shorter than length are left out.
    """

    def __init__(self, folder, split, length=1, vocab_size=None):
        self.meta, self.length, self.truncated = read_meta(folder), length, 0
        self.vocab_size = vocab_size or self.meta['vocab_size']
        self.dtype = np.dtype(self.meta['dtype'])
        one = Path(folder) / f'{split}.bin'
        self.paths = [one] if one.exists() else sorted(Path(folder).glob(f'{split}_*.bin'))
        if not self.paths:
            raise ValueError(f'{folder}: there is no {split}.bin')
        for path in self.paths:
            if path.stat().st_size % self.dtype.itemsize:
                raise ValueError(f'{path}: cut in the middle of a token; prepare it again')
            start = np.fromfile(path, np.uint16, 1000)
            if 'counts' not in self.meta and start[::2].any() and not start[1::2].any():
                raise ValueError(f'{path}: looks like uint32 tokens; without a meta.json uint16 '
                                 'is assumed')
        sizes = {path: path.stat().st_size // self.dtype.itemsize for path in self.paths}
        self.paths = [path for path in self.paths if sizes[path] >= length]
        if not self.paths:
            raise ValueError(f'{folder}: {max(sizes.values())} tokens in {split} are too few for a '
                             f'row of {length - 1}; make --block_size smaller or the text longer')
        known = self.meta.get('counts', {}).get(split, sum(sizes.values()))
        if known != sum(sizes.values()):
            raise ValueError(f'{folder}: {split} has {sum(sizes.values()):,} tokens, {known:,} by '
                             'its meta.json: a file is cut or not its own; prepare it again')
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

    def rows(self, numbers, seed):
        """Row numbers, counted from a run's start -> x, y: all is in play"""
        window = self.windows(self.shuffled(numbers, self.length - 1, seed), self.length)
        return window[:, :-1], window[:, 1:]

    def held_out(self):
        """-> how many rows hold all of it"""
        return len(self.cover(self.length - 1)[0])

    def held_out_rows(self, numbers):
        """-> x, y: every target once"""
        offsets, repeats = (values[numbers] for values in self.cover(self.length - 1))
        window = self.windows(offsets, self.length)
        x, y = window[:, :-1], window[:, 1:].copy()
        y[np.arange(self.length - 1) < repeats[:, None]] = -1
        return x, y

    def shuffled(self, rows, length, seed):
        """Row numbers, counted from a run's start -> offsets: in an epoch each window once."""
        windows = max(1, (len(self) - 1) // length - 1)     # one less, to have room for a phase
        offsets = np.empty_like(rows)
        for epoch in np.unique(rows // windows):
            rng = np.random.default_rng((seed, epoch))
            stride, first, phase = rng.integers(1, (windows + 1, windows + 1, length + 1))
            while math.gcd(stride, windows) > 1:    # now row -> stride * row is a permutation
                stride += 1
            here = rows // windows == epoch
            offsets[here] = (stride * (rows[here] % windows) + first) % windows * length + phase
        return offsets

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
