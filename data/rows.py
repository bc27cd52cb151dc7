"""
Rows to train on: conversations packed side by side, data sets mixed.

A row is x, y of the same length: y is -1 where the token is not in play.
"""
from pathlib import Path

import numpy as np

from data.files import Tokens


def side_by_side(texts, length=0):
    """
    Texts as (ids, in play, weight), a row each, padded at the right to length or to the longest
    -> x, y, w: (texts, length - 1)
    """
    length = length or max(len(ids) for ids, _, _ in texts)
    x = np.zeros((len(texts), length), np.int64)
    y, w = x - 1, np.zeros(x.shape, np.float32)
    for i, (ids, in_play, weight) in enumerate(texts):
        x[i, :len(ids)] = ids
        y[i, :len(ids)] = np.where(in_play, ids, -1)
        w[i] = weight
    return x[:, :-1], y[:, 1:], w[:, 1:]


class Conversations:
    """
    One split of a data set of conversations. Each begins with the begin token and is kept whole in
    a row where it fits; the rest of a row is not in play.
    """

    def __init__(self, folder, split, length, vocab_size=None):
        """length: of a row, in tokens. cut: how many conversations are longer, and are cut."""
        self.length, path = length, Path(folder) / f'{split}.bin'
        if not path.with_suffix('.mask.bin').exists():
            raise ValueError(f'{folder}: there is no {split}.mask.bin, so these are no '
                             'conversations')
        self.tokens = Tokens(folder, split, 2, vocab_size)
        ids = np.memmap(path, self.tokens.dtype, 'r')
        self.in_play = np.memmap(path.with_suffix('.mask.bin'), np.uint8, 'r')
        if len(ids) != len(self.in_play):
            raise ValueError(f'{path}: not as long as its mask; prepare it again')
        begins = np.flatnonzero((ids == ids[0]) & (self.in_play[:] == 0))
        self.spans = np.stack((begins, np.append(begins[1:], len(ids))), 1)
        self.cut = int((self.spans[:, 1] - self.spans[:, 0] > length).sum())
        self.spans[:, 1] = np.minimum(self.spans[:, 1], self.spans[:, 0] + length)
        self.plans, self.sizes = {}, {}

    def plan(self, epoch, seed):
        """-> list of rows, each a list of conversations, in the order of this epoch (-1: as is)"""
        if (epoch, seed) not in self.plans:
            order = np.arange(len(self.spans))
            if epoch >= 0:
                order = np.random.default_rng((seed, epoch)).permutation(order)
            rows, room, sizes = [], 0, self.spans[:, 1] - self.spans[:, 0]
            for i in order.tolist():
                if sizes[i] > room:
                    rows.append([])
                    room = self.length
                rows[-1].append(i)
                room -= sizes[i]
            self.plans = {(epoch, seed): rows}      # the last one alone is kept
            self.sizes[epoch, seed] = len(rows)
        return self.plans[epoch, seed]

    def conversation(self, i):
        """-> ids, in play"""
        start, stop = self.spans[i]
        return self.tokens.windows(np.array([start]), stop - start)[0], self.in_play[start:stop]

    def beside(self, rows):
        """Rows, each a list of conversations -> x, y: (rows, length - 1), -1 what is not in play"""
        texts = []
        for row in rows:
            ids, in_play = zip(*map(self.conversation, row), strict=True)
            texts.append((np.concatenate(ids), np.concatenate(in_play), 1.0))
        return side_by_side(texts, self.length)[:2]

    def rows(self, numbers, seed):
        """Row numbers, counted from a run's start, epoch after epoch -> x, y"""
        chosen = []
        for number in numbers.tolist():
            epoch = 0
            while number >= self.sizes.get((epoch, seed), 0):
                if (epoch, seed) in self.sizes:
                    number, epoch = number - self.sizes[epoch, seed], epoch + 1
                else:
                    self.plan(epoch, seed)
            chosen.append(self.plan(epoch, seed)[number])
        return self.beside(chosen)

    def held_out(self):
        """-> how many rows hold all of it"""
        return len(self.plan(-1, 0))

    def held_out_rows(self, numbers):
        return self.beside([self.plan(-1, 0)[number] for number in numbers])


class Mixture:
    """
    One split of the data sets in parts, {folder: share}: of every CYCLE rows each has its share.
    packed: conversations as such, only what the assistant wrote in play.
    """
    CYCLE = 100

    def __init__(self, parts, split, length, vocab_size=None, packed=False):
        self.sources = [
            (Conversations if packed and (Path(folder) / f'{split}.mask.bin').exists() else Tokens)
            (folder, split, length, vocab_size) for folder in parts]
        self.length = length
        self.cut = sum(source.cut for source in self.sources)
        self.shares = np.array(list(parts.values())) / sum(parts.values())
        turns = (np.arange(self.CYCLE) + 0.5) / self.CYCLE
        turns = np.random.default_rng(0).permutation(turns)     # so that every batch is mixed
        self.turns = np.searchsorted(np.cumsum(self.shares) - 1e-9, turns)      # whose turn it is
        for i, folder in enumerate(parts):
            if i not in self.turns:
                raise ValueError(f'{folder}: a share of less than 1 in {self.CYCLE}')

    def rows(self, numbers, seed):
        """Row numbers, counted from a run's start -> x, y: (numbers, length - 1)"""
        whose = self.turns[numbers % self.CYCLE]
        x = np.empty((len(numbers), self.length - 1), np.int64)
        y = np.empty_like(x)
        for i, source in enumerate(self.sources):
            mine, before = numbers[whose == i], np.cumsum(self.turns == i) - 1
            if len(mine):
                own = mine // self.CYCLE * (self.turns == i).sum() + before[mine % self.CYCLE]
                x[whose == i], y[whose == i] = source.rows(own, seed)
        return x, y
