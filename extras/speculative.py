"""
Speculative decoding (arXiv:2211.17192): a small model, or the text itself, proposes the next few
tokens; the model reads them all at once, and keeps those that it might have drawn itself.

    python -m extras.speculative --out_dir=out --draft=out-small --start="ROMEO:"
    python -m extras.speculative --out_dir=out --start=FILE:text.txt        # looks the text up

A proposal x, drawn from q, is kept with probability min(1, p(x) / q(x)), where p is the model's own
distribution; the first that is not kept is replaced by a draw from max(0, p - q), normalized. So
each token has the distribution p, and at temperature 0 the text is that of sample.py, but for what
rounding decides. What is gained is that several tokens cost one reading of the weights.
"""
import sys
import time

import numpy as np
import torch

from configurator import configure
from data.files import program
from sample import KVCache, Request, Sampling, open_model, probabilities, read_prompt

out_dir = 'out'         # the run to sample from
draft = ''              # the run that proposes, of the same vocabulary; '': look the text up
lookahead = 4           # tokens proposed at a time; from 1 to 64
start = '\n'            # the prompt, or FILE:prompt.txt
num_samples = 1         # how many, side by side; from 1 to 1e4
max_new_tokens = 200    # in each; at least 1
seed = 1337             # sample i depends on seed + i alone; from 0 to 1e18
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: the fastest here

LONGEST_MATCH = 4       # tokens that are looked up in the text so far


class OpenCache(KVCache):
    """Gives hidden states of all that was read, not of each row's last token, if `whole`."""
    whole = False

    def advance(self, x, recent):
        last = super().advance(x, recent)
        return x if self.whole else last


class Reader:
    """A model and what it has read of each text: tokens that turn out wrong are taken back."""

    def __init__(self, model, rows):
        if min(model.config.windows) < model.config.block_size:
            raise ValueError('a cache of sliding windows forgets: nothing can be taken back')
        weight = model.transformer.wte.weight
        self.model, self.read = model, [0] * rows
        self.cache = OpenCache(model.config, rows, weight.device, weight.dtype)

    def keep(self, row, ids):
        """Let a row hold no more than a prefix of ids."""
        self.read[row] = min(self.read[row], len(ids))
        self.cache.truncate(row, ids[:self.read[row]])

    def prefill(self, row, ids):
        if ids:
            part = self.cache.part(row, row + 1)
            self.model(torch.tensor([ids], device=part.kv.device), cache=part)
            self.read[row] = len(ids)

    def logits(self, texts):
        """Read what is new in each text (None: nothing) -> for each (new tokens, V)"""
        new = [text[held:] if text else [] for text, held in zip(texts, self.read, strict=True)]
        idx = np.full((len(texts), max(map(len, new))), -1)
        for i, ids in enumerate(new):
            idx[i, :len(ids)] = ids
            self.read[i] += len(ids)
        self.cache.whole = True
        logits = self.model(torch.from_numpy(idx).to(self.cache.kv.device), cache=self.cache)[0]
        self.cache.whole = False
        return [logits[i, :len(ids)] for i, ids in enumerate(new)]


def distribution(logits, requests):
    """logits: (N, V), a request for each -> (N, V), what each one's next token is drawn from"""
    settings = torch.tensor([[*vars(request.sampling).values()] for request in requests])
    probs = probabilities(logits, *settings.to(logits.device).T[:, :, None])
    return probs if probs.device.type != 'mps' else probs.cpu()     # it has no float64


def pick(probs, rng):
    """-> a token drawn from probs: (V)"""
    sums = probs.double().cumsum(0)
    drawn = torch.searchsorted(sums, rng.random() * sums[-1:], right=True)
    return int(drawn.clamp(max=len(probs) - 1))


def look_up(text, most):
    """-> what followed the last time that the text had its last tokens: at most `most` ids"""
    for size in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        tail = text[-size:]
        for i in range(len(text) - size - 1, -1, -1):
            if text[i:i + size] == tail:
                return text[i + size:i + size + most]
    return []


def propose(reader, texts, requests, rooms, rngs, V):
    """-> for each row its proposals, and the distributions (V) that they were drawn from (None:
    certain). rooms: how many may be proposed. V: ids that the model has"""
    if reader is None:
        found = [look_up(text, room) for text, room in zip(texts, rooms, strict=True)]
        return found, [[None] * len(ids) for ids in found]
    found, drawn_from = [[] for _ in texts], [[] for _ in texts]
    for turn in range(max(rooms)):
        rows = [i for i, room in enumerate(rooms) if room > turn]
        logits = reader.logits([text + found[i] if i in rows else None
                                for i, text in enumerate(texts)])
        last = torch.stack([logits[i][-1, :V] for i in rows])   # tables may have spare rows
        probs = distribution(last, [requests[i] for i in rows])
        probs = torch.nn.functional.pad(probs, (0, V - probs.shape[1]))
        for i, q in zip(rows, probs, strict=True):
            found[i].append(pick(q, rngs[i]))
            drawn_from[i].append(q)
    return found, drawn_from


def judge(p, proposals, drawn_from, rng):
    """p: (proposals + 1, V), the model's own distributions -> the tokens to write, one at least"""
    for i, (x, q) in enumerate(zip(proposals, drawn_from, strict=True)):
        q_x = 1.0 if q is None else float(q[x])
        if rng.random() * q_x >= float(p[i, x]):    # kept with probability p / q
            if q is None:
                rest = p[i].clone()
                rest[x] = 0
            else:
                rest = (p[i] - q).clamp(min=0)
            return [*proposals[:i], pick(rest, rng)]
    return [*proposals, pick(p[-1], rng)]


@torch.inference_mode()
def speculate(model, requests, draft=None, lookahead=4, counts=None):
    """
    Answer all Requests side by side. draft: a model that proposes; None: the text is looked up.
    Yields a request whenever it has new ids. counts: a dict, gets how many tokens were proposed and
    accepted. ValueError if a prompt and its answer do not fit into block_size.
    """
    counts = {} if counts is None else counts
    counts.update(proposed=0, accepted=0)
    for request in requests:
        size = len(request.prompt) + request.max_new_tokens
        if size > min(m.config.block_size for m in (model, draft or model)):
            raise ValueError(f'a prompt and its answer of {size} tokens do not fit into block_size')
    readers = [Reader(m, len(requests)) for m in ((model, draft) if draft else (model,))]
    texts = [list(request.prompt) for request in requests]
    rngs = [np.random.default_rng(request.seed) for request in requests]
    for reader in readers:
        for i, text in enumerate(texts):
            reader.prefill(i, text[:-1])
    while any(not request.reason for request in requests):
        live = [i for i, request in enumerate(requests) if not request.reason]
        some = [requests[i] for i in live]
        rooms = [min(lookahead, request.max_new_tokens - len(request.ids) - 1) if i in live else 0
                 for i, request in enumerate(requests)]
        proposals, drawn_from = propose(readers[1] if draft else None, texts, requests, rooms, rngs,
                                        model.config.vocab_size)
        logits = readers[0].logits([text + proposals[i] if i in live else None
                                    for i, text in enumerate(texts)])
        for i, request in zip(live, some, strict=True):
            new = logits[i][-len(proposals[i]) - 1:]
            p = distribution(new, [request] * len(new))
            ids = judge(p, proposals[i], drawn_from[i], rngs[i])
            counts['proposed'] += len(proposals[i])
            counts['accepted'] += len(ids) - 1
            write_ids(request, texts[i], ids, p)
            for reader in readers:
                reader.keep(i, texts[i][:-1])
            yield request


def write_ids(request, text, ids, p):
    """Add ids to a request, until one of them ends it."""
    for token, probs in zip(ids, p, strict=False):
        request.ids.append(token)
        request.logprobs.append(float(probs[token].log()))
        text.append(token)
        if token in request.end or len(request.ids) >= request.max_new_tokens:
            request.reason = 'end' if token in request.end else 'length'
            return


def main():
    config, _ = configure(globals(), others=lambda values: [Sampling(temperature=0.8, top_k=200)])
    model, tokenizer, _ = open_model(out_dir, device, dtype)
    small, other = open_model(draft, device, dtype)[:2] if draft else (None, tokenizer)
    if other.spec != tokenizer.spec:
        raise ValueError(f'--draft={draft}: it has another vocabulary than {out_dir}')
    text, prompt = read_prompt(start, tokenizer, model)
    requests = [Request(prompt, max_new_tokens, Sampling.of(config), seed + i, tokenizer.ends)
                for i in range(num_samples)]
    counts, began = {}, time.perf_counter()
    for _ in speculate(model, requests, small, lookahead, counts):
        pass
    seconds = time.perf_counter() - began
    for request in requests:
        print(text + tokenizer.transcript(request.ids) + '\n---------------')
    written = sum(len(request.ids) for request in requests)
    print(f'{written / seconds:.1f} tokens/s; {counts["accepted"]} of {counts["proposed"]} '
          'proposals accepted', file=sys.stderr)


if __name__ == '__main__':
    program(main)
