"""
The one decoding loop: weights in, text out.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5

A row's context is at most block_size tokens; a longer prompt keeps its last ones. When a row has
filled that window, its later half is read again as the new context, so text can be of any length.
"""
from data.detokenizer import Detokenizer  # isort: skip  (before torch: see data/__init__.py)
import copy
import sys
import time
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from configurator import auto_device, auto_dtype, configure
from data.files import extra, program, read_text
from data.models import load_model

init_from = 'resume'    # resume: the run in out_dir; or a model's folder or name (gpt2, a/b)
out_dir = 'out'         # the run to sample from
start = '\n'            # the prompt, or FILE:prompt.txt; <|endoftext|> in it is the token
num_samples = 10        # how many, side by side in one batch; from 1 to 1e5
max_new_tokens = 500    # in each sample; at least 1
ignore_end = False      # continue after the end token
seed = 1337             # sample i depends on seed + i alone; from 0 to 1e18
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: the fastest here
quantize = ''           # int8 or int4: weights of 8 or 4 bits (extras/quantize.py)
compile = False         # torch.compile the model

MOVED = dict.fromkeys(['chat', 'votes'], 'use python -m extras.chat') | {     # former settings
    'serve': 'use python -m extras.serve', 'task': 'use python -m extras.evaluate',
    'write': 'use python -m extras.write_answers'}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the command line, the API and decode() share these."""
    temperature: float = 1.0    # 1: the model's own distribution, 0: the likeliest; from 0 to 100
    top_k: int = 0              # draw from the k likeliest tokens only; 0: all; from 0 to 1e9
    top_p: float = 1.0          # draw from the likeliest with this sum of p; from 1e-6 to 1

    @classmethod
    def of(cls, config):
        """-> Sampling with what {name: value} has of its fields"""
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})


@dataclass(eq=False)
class Request:
    """A prompt, how to continue it and, after decode(), what was written."""
    prompt: list                # of ids, at least one
    max_new_tokens: int = 500
    sampling: Sampling = Sampling()
    seed: int = 0               # the result depends on it, not on the other rows
    end: tuple = ()             # the ids that end it; they are written too
    tool: object = None         # a function: ids written so far -> ids to append to them
    cancelled: bool = False     # the caller may set this at any time
    ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)    # of each id when drawn; None: from the tool
    reason: str = ''            # why it ended: end, length, cancelled; '': it has not

    def __post_init__(self):
        if not self.prompt:
            raise ValueError('a request needs a prompt of at least one token')


class KVCache:
    """Keys and values of every layer for a fixed number of rows, each at a position of its own, so
    that texts of different lengths decode side by side. What lies beyond pos is never read."""
    overwrites = False      # whether a row's first tokens are gone once it has read on

    def __init__(self, config, rows, device='cpu', dtype=torch.float32):
        self.block_size = config.block_size     # and one slot more, which padding is written to
        shape = (config.n_layer, rows, config.block_size + 1, config.n_kv_head,
                 config.head_width)
        self.kv = torch.zeros((2, *shape), device=device, dtype=dtype)
        self.pos = torch.zeros(rows, device=device, dtype=torch.long)           # tokens held
        self.tail = torch.full((rows, config.ngrams - 1), -1, device=device)    # the last ids
        self.row = torch.arange(rows, device=device)[:, None]

    def part(self, first, last):
        """-> rows first .. last - 1 as a cache, in the same memory."""
        part = copy.copy(self)
        part.kv = self.kv[:, :, first:last]
        part.pos, part.tail = self.pos[first:last], self.tail[first:last]
        part.row = self.row[:last - first]
        return part

    def copy_row(self, source, target, count):
        """Let row target hold the first count tokens of row source."""
        self.kv[:, :, target, :count] = self.kv[:, :, source, :count]
        self.pos[target], self.tail[target] = count, self.tail[source]

    def truncate(self, row, ids):
        """Let a row hold only its first len(ids) tokens, which are ids."""
        tail = [-1] * self.tail.shape[1] + ids
        self.pos[row] = len(ids)
        self.tail[row] = torch.tensor(tail[len(ids):], device=self.tail.device)

    def place(self, idx):
        """Find slots for idx: (B, T), -1: padding. -> their positions (B, T), those of keys (S)"""
        positions = self.pos[:, None] + torch.arange(idx.shape[1], device=idx.device)
        self.lengths, self.span = (idx >= 0).sum(1), self.block_size
        if idx.device.type == 'cpu':    # elsewhere, to look at positions is to wait for the device
            self.span = int((self.pos + self.lengths).max())
            if self.span > self.block_size:
                raise ValueError(f'{self.span} tokens are more than block_size={self.block_size}')
        self.slots = positions.where(idx >= 0, self.block_size)
        return positions, torch.arange(self.span, device=idx.device)

    def extend(self, layer, k, v):
        """Write k, v: (B, T, G, D) into their slots. -> all of a layer's, (B, S, G, D) each"""
        self.kv[0, layer].index_put_((self.row, self.slots), k)
        self.kv[1, layer].index_put_((self.row, self.slots), v)
        return self.kv[0, layer, :, :self.span], self.kv[1, layer, :, :self.span]

    def advance(self, x, recent):
        """Count what was read. x: (B, T, C), recent: tail, idx -> each row's last x, (B, 1, C)"""
        self.pos += self.lengths
        last = torch.arange(self.tail.shape[1], device=x.device) + self.lengths[:, None]
        self.tail.copy_(recent.gather(1, last))
        return x[self.row, (self.lengths[:, None] - 1).clamp(min=0)]


def make_cache(config, rows, device='cpu', dtype=torch.float32):
    if min(config.windows) == config.block_size:
        return KVCache(config, rows, device, dtype)
    from extras.windows import window_cache
    return window_cache(KVCache)(config, rows, device, dtype)


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits: (B, V), Sampling's fields, numbers or (B, 1) -> (B, V), what a token is drawn from:
    the top_k likeliest, of them the likeliest with top_p. At temperature 0: one-hot."""
    temperature, top_k, top_p = (torch.as_tensor(value, device=logits.device).expand(len(logits), 1)
                                 for value in (temperature, top_k, top_p))
    greedy = temperature < 1e-4     # less would divide beyond what fp32 can hold
    probs = (logits.float() / temperature.masked_fill(greedy, 1.0)).softmax(1)
    if (top_k > 0).any() or (top_p < 1).any():
        most = int(top_k.max()) if (top_k > 0).all() else probs.shape[1]
        ordered, order = probs.topk(min(most, probs.shape[1]))
        rank = torch.arange(ordered.shape[1], device=logits.device)
        ordered = ordered.masked_fill((rank >= top_k) & (top_k > 0), 0)
        ordered /= ordered.sum(1, keepdim=True)
        before = ordered.cumsum(1) - ordered        # the token that crosses top_p is in
        ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), 0)
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
        probs /= probs.sum(1, keepdim=True)
    if greedy.any():
        likeliest = torch.zeros_like(probs).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        probs = torch.where(greedy, likeliest, probs)
    return probs


def draw(logits, rows):
    """logits: (B, V), of B Rows -> list of B ids, list of their log-probabilities"""
    if all(row.request.sampling.temperature == 0 for row in rows):
        return logits.argmax(1).tolist(), [0.0] * len(rows)
    settings = torch.tensor([[*vars(row.request.sampling).values()] for row in rows])
    probs = probabilities(logits, *settings.to(logits.device).T[:, :, None])
    probs = probs if probs.device.type != 'mps' else probs.cpu()    # it has no float64
    # The first token whose cumulative probability exceeds the draw: no token of probability 0.
    sums = probs.double().cumsum(1)
    draws = torch.tensor([[row.rng.random()] for row in rows]).to(sums)
    ids = torch.searchsorted(sums, draws * sums[:, -1:], right=True).clamp(max=sums.shape[1] - 1)
    return ids[:, 0].tolist(), probs.gather(1, ids)[:, 0].log().tolist()


@dataclass(eq=False)
class Row:
    """A row of the cache while a request has it: read_pending() reads its pending ids, emit()
    writes the token drawn then, which becomes pending, until release() frees the row."""
    request: Request
    rng: np.random.Generator
    context: list           # the ids that its window began with: the prompt, until it slides
    pending: list           # ids to be read before its next token can be drawn
    held: int = 0           # number of ids that the cache holds


@torch.inference_mode()
def decode(model, requests, rows):
    """
    The decoding loop. Takes Requests from an iterator, as many at a time as there are rows, and
    yields a request whenever a token was added to its ids. A row whose request has ended is given
    to the next one, whatever the others do. The iterator may give None for "nothing now"; None is
    yielded when every row is idle. Memory: rows * block_size keys and values.
    """
    weight = model.transformer.wte.weight
    cache = make_cache(model.config, rows, weight.device, weight.dtype)
    live, source, more = [], iter(requests), True   # live[i] is in row i of the cache: no gaps
    while live or more:
        yield from release(live, cache)
        more = admit(live, source, cache)
        if not live and more:
            yield None
        for i, row in enumerate(live):
            if row.held == 0:
                share_context(live, i, cache)
            # A context is read in one pass; if a token then fills it, its later half is read too.
            while row.held == 0 and len(row.pending) > 1:
                yield from step(model, cache, live, i, i + 1)
        if any(row.pending for row in live):
            yield from step(model, cache, live, 0, len(live) if cache.kv.is_cpu else rows)


def admit(live, source, cache):
    """Give free rows to the next requests. -> whether there may be more"""
    while len(live) < len(cache.pos):
        request = next(source, False)
        if not request:
            return request is None
        context = request.prompt[-cache.block_size:]
        cache.truncate(len(live), [])
        live.append(Row(request, np.random.default_rng(request.seed), context, context))
    return True


def step(model, cache, live, first, last):
    """Let rows first .. last - 1 read; rows with nothing pending then get a token. Yields
    their requests"""
    ready, logits = read_pending(model, cache.part(first, last), live[first:last])
    for row, token, logprob in zip(ready, *draw(logits, ready), strict=True):
        emit(row, token, logprob)
        if row.held + len(row.pending) > cache.block_size:      # full: keep the later half
            text = row.request.prompt + row.request.ids
            row.context = row.pending = text[-max(1, cache.block_size // 2):]
            row.held = 0
            cache.truncate(live.index(row), [])
        yield row.request


def read_pending(model, cache, live):
    """A single row reads all its pending ids; of several rows, each reads one.
    -> rows that have read all, their logits"""
    rows = len(cache.pos)       # on a GPU there may be more than live ones: they read padding
    idx = np.full((rows, len(live[0].pending) if rows == 1 else 1), -1)
    ready = []
    for i, row in enumerate(live):
        ids, row.pending = row.pending[:idx.shape[1]], row.pending[idx.shape[1]:]
        idx[i, :len(ids)] = ids
        row.held += len(ids)
        if ids and not row.pending:
            ready.append(i)
    logits = model(torch.from_numpy(idx).to(cache.kv.device), cache=cache)[0]
    return [live[i] for i in ready], logits[ready, 0]


def emit(row, token, logprob):
    """Write a token, and what the request's tool puts after it; end the request where it ends."""
    request = row.request
    request.ids.append(token)
    request.logprobs.append(logprob)
    forced = request.tool(request.ids) if request.tool else []
    forced = forced[:max(0, request.max_new_tokens - len(request.ids))]
    request.ids += forced
    request.logprobs += [None] * len(forced)
    if token in request.end:
        request.reason = 'end'
    elif len(request.ids) >= request.max_new_tokens:
        request.reason = 'length'
    row.pending = [] if request.reason else [token, *forced]


def release(live, cache):
    """Free rows whose requests have ended, the last row filling the gap. Yields cancelled ones"""
    for i in reversed(range(len(live))):
        request = live[i].request
        if request.cancelled and not request.reason:
            request.reason = 'cancelled'
            yield request
        if request.reason:
            row = live.pop()
            if i < len(live):
                live[i] = row
                cache.copy_row(len(live), i, row.held)


def share_context(live, i, cache):
    """Let a row copy its context, all but the last token, from a row that began with the same."""
    row, (*read, last) = live[i], live[i].context
    same = [j for j in range(i) if live[j].context == row.context
            and (live[j].held == len(row.context) or not cache.overwrites)]
    if same:
        cache.copy_row(same[0], i, len(read))
        cache.truncate(i, read)
        row.pending, row.held = [last], len(read)


def generate(model, prompts, max_new_tokens, sampling=Sampling(), seed=0, **how):
    """-> for each prompt, side by side, the list of ids written. Prompt i draws with seed + i."""
    requests = [Request(list(prompt), max_new_tokens, sampling, seed + i, **how)
                for i, prompt in enumerate(prompts)]
    for _ in decode(model, requests, max(1, len(requests))):
        pass
    return [request.ids for request in requests]


def open_model(source, device='auto', dtype='auto', quantize=''):
    """-> model ready for decode(): on its device, in its precision; tokenizer, checkpoint"""
    torch.set_float32_matmul_precision('high')
    device = auto_device(device)
    model, tokenizer, checkpoint = load_model(source)
    model.to(device, auto_dtype(dtype, device)).eval()
    if row_linear := extra('row_linear'):
        row_linear.use_row_linears(model)
    if quantize:
        from extras.quantize import quantize_model
        quantize_model(model, quantize)
    return model, tokenizer, checkpoint


def read_prompt(start, tokenizer, model):
    """-> the text of --start, and its ids"""
    text = read_text(start[5:]) if start.startswith('FILE:') else start
    prompt = tokenizer.prefix + tokenizer.encode(text, ['<|endoftext|>']) or tokenizer.begin
    if len(prompt) > model.config.block_size:
        print(f'the prompt has {len(prompt)} tokens; the model sees the last '
              f'{model.config.block_size}', file=sys.stderr)
    return text, prompt


def main():
    """Print num_samples texts, the first as it is written."""
    config, _ = configure(globals(), others=lambda values: [Sampling(temperature=0.8, top_k=200)])
    source = out_dir if init_from == 'resume' else init_from
    model, tokenizer, _ = open_model(source, device, dtype, quantize)
    text, prompt = read_prompt(start, tokenizer, model)
    network = torch.compile(model, dynamic=True) if compile else model
    requests = [Request(prompt, max_new_tokens, Sampling.of(config), seed + i,
                        () if ignore_end else tokenizer.ends) for i in range(num_samples)]
    began, detokenizer = time.perf_counter(), Detokenizer(tokenizer)
    print(text, end='')
    for request in decode(network, requests, num_samples):
        if request is requests[0]:
            print(detokenizer.push(request.ids, bool(request.reason)), end='', flush=True)
    seconds = time.perf_counter() - began
    print('\n---------------')
    for request in requests[1:]:
        print(text + tokenizer.transcript(request.ids) + '\n---------------')
    if machine := extra('machine'):
        print(machine.decoding_speed(model, requests, seconds), file=sys.stderr)


if __name__ == '__main__':
    program(main)
