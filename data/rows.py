"""
Rows to train on: windows of a text, conversations packed side by side, mixtures of data sets.

A row is x, y of the same length; y is -1 where the token is not in play. read_rows() makes batches
and the validation loss of them, for every stage that learns from token files.
"""
import math
from pathlib import Path

import numpy as np
import torch

from data.files import say
from data.processes import all_max, all_sum
from data.tokens import Tokens

TEXT_STAGES = 'pretrain', 'finetune'    # in which all of a conversation is in play


def read_rows(run):
    """
    Rows of a run's data sets, each once an epoch: all of a text is in play, of conversations what
    the assistant had to write (in TEXT_STAGES all of them). Each token weighs 1.
    -> batches(step), evaluate()
    """
    batch_size, block_size = run.config['batch_size'], run.config['block_size']
    train, val = (Mixture(run.data, split, block_size + 1, run.model.config.vocab_size,
                          packed=run.config['stage'] not in TEXT_STAGES)
                  for split in ('train', 'val'))
    if run.config['stage'] not in TEXT_STAGES:
        for folder, source in zip(run.data, train.sources, strict=True):
            if isinstance(source, Tokens):
                say(f'{folder}: it has no masks, so all of it is in play')
    if train.truncated + val.truncated:
        say(f'{train.truncated + val.truncated} conversations are longer than '
            f'--block_size={block_size}: truncated')

    def batches(step):
        """A step's microbatches (x, y, w) for this process, of rows shared out among all."""
        count = batch_size * run.config['gradient_accumulation_steps']
        numbers = np.arange(step * count, (step + 1) * count)[run.rank::run.world]
        for i in range(0, len(numbers), batch_size):
            x, y = train.rows(numbers[i:i + batch_size], run.config['seed'])
            yield torch.from_numpy(x), torch.from_numpy(y), None

    def evaluate():
        """Of a mixture: the losses of its parts, weighted by their shares. -> metrics, score"""
        found = [validation_loss(run, held_out_batches(run, source)) for source in val.sources]
        metrics = {name: float(np.dot(val.shares, [part[name] for part in found]))
                   for name in found[0]}
        if len(found) > 1:
            metrics |= {f'val_loss_{folder.name}': part['val_loss']
                        for folder, part in zip(run.data, found, strict=True)}
        return metrics, metrics['val_loss']

    return batches, evaluate


def held_out_batches(run, source):
    """All held-out rows of a data set, or eval_iters batches spread evenly over them."""
    count, batch_size, most = (source.held_out(), run.config['batch_size'],
                               run.config['eval_iters'] * run.config['batch_size'])
    numbers = np.arange(count)
    if 0 < most < count:
        numbers = np.linspace(0, count - 1, most).astype(int)
    unit = batch_size * run.world           # the last batch is filled up, with rows not in play
    numbers = np.append(numbers, np.full(-len(numbers) % unit, -1))
    for i in range(run.rank * batch_size, len(numbers), unit):
        batch = numbers[i:i + batch_size]
        x, y = map(torch.from_numpy, source.held_out_rows(batch.clip(min=0)))
        y[torch.from_numpy(batch) < 0] = -1
        yield x, y


@torch.no_grad()
def validation_loss(run, batches):
    """Mean loss over the tokens in play in all processes' batches, and in bits per byte."""
    byte_counts = torch.tensor(run.tokenizer.byte_lengths() + [0] * run.model.config.table_rows)
    total = torch.zeros(3, dtype=torch.float64)
    for x, y in batches:
        loss = run.forward(run.network, x, y, None)[1].item()
        total += torch.tensor([loss, (y >= 0).sum(), byte_counts[y[y >= 0]].sum()])
    loss, count, size = all_sum(total)
    if not count:
        raise ValueError(f'--dataset={run.config["dataset"]}: nothing in its validation data is in '
                         'play')
    return {'val_loss': loss / count, 'val_bits_per_byte': loss / max(size, 1) / math.log(2)}


def pad(texts, length=0):
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
    return tuple(map(torch.from_numpy, (x[:, :-1], y[:, 1:], w[:, 1:])))


def microbatches(run, examples):
    """Examples as x, y, w, those of like lengths together; as many batches in every process."""
    batch_size = run.config['batch_size']
    examples = sorted(examples, key=lambda example: len(example[0]))
    count = all_max(-(-len(examples) // batch_size))
    for i in range(0, count * batch_size, batch_size):
        yield pad(examples[i:i + batch_size] or [([0, 0], [False] * 2, 0)])


class Conversations:
    """
    One split of a data set of conversations. Each begins with the begin token and is kept whole in
    a row where it fits; the rest of a row is not in play.
    """

    def __init__(self, folder, split, length, vocab_size=None):
        """length: of a row, in tokens. truncated: how many are longer, and were cut."""
        self.length, path = length, Path(folder) / f'{split}.bin'
        if not path.with_suffix('.mask.bin').exists():
            raise ValueError(f'{folder}: there is no {split}.mask.bin, so these are no '
                             'conversations')
        self.tokens = Tokens(folder, split, 2, vocab_size)
        ids = np.memmap(path, self.tokens.dtype, 'r')
        self.mask = np.memmap(path.with_suffix('.mask.bin'), np.uint8, 'r')
        if len(ids) != len(self.mask):
            raise ValueError(f'{path}: not as long as its mask; prepare it again')
        if not (self.mask[:] & 1).any():
            raise ValueError(f'{path}: nothing is in play by its mask; prepare it again')
        begins = np.flatnonzero(self.mask[:] & 2)
        if not len(begins):     # written before there were marks
            begins = np.flatnonzero((ids == ids[0]) & (self.mask[:] == 0))
        self.spans = np.stack((begins, np.append(begins[1:], len(ids))), 1)
        self.truncated = int((self.spans[:, 1] - self.spans[:, 0] > length).sum())
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
        return self.tokens.windows(np.array([start]), stop - start)[0], self.mask[start:stop] & 1

    def assemble(self, rows):
        """Rows, each a list of conversations -> x, y: (rows, length - 1), -1 what is not in play"""
        texts = []
        for row in rows:
            ids, in_play = zip(*map(self.conversation, row), strict=True)
            texts.append((np.concatenate(ids), np.concatenate(in_play), 1.0))
        x, y, _ = pad(texts, self.length)
        return x.numpy(), y.numpy()

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
        return self.assemble(chosen)

    def held_out(self):
        """-> how many rows hold all of it"""
        return len(self.plan(-1, 0))

    def held_out_rows(self, numbers):
        return self.assemble([self.plan(-1, 0)[number] for number in numbers])


class Mixture:
    """
    One split of the data sets in parts, {folder: share}: each gets its share of every CYCLE rows.
    packed: conversations as such, only what the assistant wrote in play.
    """
    CYCLE = 100

    def __init__(self, parts, split, length, vocab_size=None, packed=False):
        self.sources = [
            (Conversations if packed and (Path(folder) / f'{split}.mask.bin').exists() else Tokens)
            (folder, split, length, vocab_size) for folder in parts]
        self.length = length
        self.truncated = sum(source.truncated for source in self.sources)
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
