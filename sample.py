"""
The one decoding loop, and what it is for: loading a model and writing text with it.

    python sample.py --out_dir=out-shakespeare-char --start='ROMEO:'
    python sample.py --init_from=gpt2-xl --start='What is the answer to life?' --num_samples=5

A row's context is at most block_size tokens. A longer prompt is cut to its last block_size tokens;
when a row has filled the window, it goes on with the later half of it as its context (so a sample
can be of any length).
"""
import collections
import contextlib
import itertools
import math
import os
import pickle
import re
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from assets.picture import picture
from configurator import configure
from data.files import DATA, read_meta, task_of, write_texts
from data.tokenizer import Tokenizer, Voice
from data.tools import calculator
from model import GPT, GPT2, GPT2_SIZES, GPTConfig, KVCache

init_from = 'resume'    # resume: the run in out_dir; gpt2[-medium|-large|-xl]; or a folder
out_dir = 'out'         # the run to sample from
start = '\n'            # the prompt, or FILE:prompt.txt; <|endoftext|> in it is the token
num_samples = 10        # how many, side by side in one batch
max_new_tokens = 500    # in each sample
temperature = 0.8       # 1.0: as the model says; less: more certain; 0: the likeliest token
top_k = 200             # draw from the k most likely tokens only; 0: all
top_p = 1.0             # draw from the most likely tokens that together have this probability
ignore_end = False      # go on after the end token
seed = 1337             # sample i depends on seed + i alone
votes = 1               # write so many answers and show one that most of them agree with
task = ''               # grade this run and those before it on the test questions of data/<task>
num_examples = 500      # how many questions
tools = True            # with the calculator at hand
write = ''              # or ask it training questions and keep right answers in this folder
pairs = False           # or pairs of a right and a wrong answer, for stage dpo
chat = False            # talk with it; /clear, /system text, Ctrl-C stops an answer, Ctrl-D ends
serve = False           # a page and an OpenAI-like API; requests bring their own temperature ...
host = '127.0.0.1'      # 0.0.0.0 lets other machines in
port = 8000             # 0: any that is free
rows = 16               # requests that decode at a time, when serving or asking many questions
queue_limit = 64        # requests that may wait for a row; beyond it: 429
quantize = ''           # int8: weights of a byte each
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: what is fastest here
compile = False         # torch.compile the model

TEXT_STAGES = 'pretrain', 'finetune'    # of training, in which all of a conversation is in play
GPU_FLOPS = {   # dense bf16 (fp16 before Ampere), from the vendors' data sheets
    'B200': 2250e12, 'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
    'A10': 125e12, '5090': 210e12, '4090': 165e12, '3090': 71e12, 'V100': 125e12, 'T4': 65e12}


def auto_device(device='auto', local_rank=0):
    """-> 'cuda:<local_rank>', 'mps' or 'cpu': the best here, or what was asked for (ValueError)."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(),
             'cpu': True}
    if device == 'auto':
        device = next(kind for kind in there if there[kind])
    kind = device.split(':')[0]
    if kind not in there:
        raise ValueError(f'--device={device}: choose cuda, mps or cpu')
    if not there[kind] or (kind == 'cuda' and int(device[5:] or 0) >= torch.cuda.device_count()):
        raise ValueError(f'--device={device}: PyTorch finds no such device here; try --device=cpu')
    return f'cuda:{local_rank}' if device == 'cuda' else device


def auto_dtype(dtype, device):
    """-> torch dtype; auto: bf16 where faster (a CPU is measured), fp16 on old CUDA, else fp32."""
    names = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
    if dtype == 'float16' and not device.startswith('cuda'):
        raise ValueError(f'--dtype=float16: only on CUDA; on {device} use bfloat16 or float32')
    if dtype not in (*names, 'auto'):
        raise ValueError(f'--dtype={dtype}: choose auto, {", ".join(names)}')
    if dtype in names:
        return names[dtype]
    if device.startswith('cuda'):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device == 'cpu':
        fast, full = cpu_flops(torch.bfloat16, 256), cpu_flops(torch.float32, 256)
        return torch.bfloat16 if fast > 1.3 * full else torch.float32
    return torch.float32


def out_of_memory(error):
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in words


def cpu_flops(dtype, n=1024):
    """FLOP/s of this CPU in a product of two n x n matrices, the best of six."""
    a, seconds = torch.ones(n, n, dtype=dtype), []
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def peak_flops(device, dtype):
    """-> FLOP/s that device could do: a GPU's by its data sheet, a CPU's measured, else None."""
    if device == 'cpu':
        return cpu_flops(dtype)
    if not device.startswith('cuda') or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    known = (peak for key, peak in GPU_FLOPS.items() if re.search(rf'{key}(?!\d)', name))
    return next(known, None)


def read_checkpoint(path):
    """-> the dict in a checkpoint; nothing in the file is executed. ValueError says what to do."""
    path = Path(path)
    sibling = path.with_name('best.pt' if path.name == 'ckpt.pt' else 'ckpt.pt')
    other = f'; {sibling} is there: cp {sibling} {path}' if sibling.exists() else ''
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        runs = ' '.join(sorted({str(p.parent) for p in Path('.').glob('*/*.pt')}))
        there = f'; there are: {runs}' if runs else ''
        raise ValueError(f'{path.parent}: no run there{there}') from None
    except pickle.UnpicklingError as error:
        if 'GLOBAL' in str(error):
            raise ValueError(f'{path}: refused, it carries code, not only weights{other}') from None
        raise ValueError(f'{path}: damaged, or not a checkpoint{other}') from None
    except (RuntimeError, EOFError, OSError, LookupError, TypeError) as error:
        why = (str(error) or 'it ends too soon').splitlines()[0][:80]
        raise ValueError(f'{path}: damaged ({why}){other}') from None
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
        raise ValueError(f'{path}: not a checkpoint of this program or of nanoGPT')
    return checkpoint


def folder_of(source):
    """-> a run's folder; source is that, or one of its checkpoints"""
    return Path(source).parent if source.endswith('.pt') else Path(source)


def load_model(source, dropout=0.0):
    """
    source: a run's folder (best.pt, else ckpt.pt), a checkpoint's path (nanoGPT's too), one of
    GPT2_SIZES, or a folder with model.safetensors. -> model (fp32, CPU), tokenizer, checkpoint
    """
    path = Path(source)
    if source in GPT2_SIZES or (path / 'model.safetensors').exists():
        checkpoint = {'lineage': [{'from': source}], 'model_args': {}}
        return GPT.from_pretrained(source, dropout), Tokenizer({'kind': 'gpt2'}), checkpoint
    if path.suffix != '.pt':
        path = path / 'best.pt' if (path / 'best.pt').exists() else path / 'ckpt.pt'
    checkpoint = read_checkpoint(path)
    args = checkpoint['model_args']
    try:
        if 'norm' not in args:      # nanoGPT's checkpoints know one architecture
            args = {**GPT2, **args}
        if args['n_layer'] > len(checkpoint['model']):
            raise ValueError(f'{args["n_layer"]} layers, {len(checkpoint["model"])} tensors')
        model = GPT(GPTConfig(**{**args, 'dropout': dropout}))
        model.load_state_dict({
            name.removeprefix('_orig_mod.'): p for name, p in checkpoint['model'].items()
            if not name.endswith('.attn.bias')})    # the causal mask of an old nanoGPT
        spec = checkpoint.get('tokenizer') or read_meta(
            DATA / checkpoint.get('config', {}).get('dataset', ''))['tokenizer']
        if spec['kind'] == 'gpt2' and model.config.vocab_size < 50257:
            raise ValueError('its characters are in the data folder that it was trained on; put '
                             'its meta.pkl back there')
        return model, Tokenizer(spec), checkpoint
    except (LookupError, TypeError, RuntimeError, ValueError, AttributeError,
            ArithmeticError) as error:
        raise ValueError(f'{path}: damaged, or of another architecture than this model.py '
                         f'({str(error).splitlines()[0]})') from None


class RowLinear(torch.nn.Linear):
    """
    A Linear whose product with one row is shared out among a CPU's threads, each taking a part of
    the inputs: BLAS gives such a product to one thread, which reads half of what two do.
    """

    def forward(self, x):
        parts = torch.get_num_threads()
        if x.numel() != self.in_features or self.in_features % parts:
            return super().forward(x)
        weight = self.weight.t().view(parts, -1, self.out_features)
        y = torch.bmm(x.view(parts, 1, -1), weight).sum(0)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def lay_for_reading(model):
    """Make a CPU's large fp32 Linears RowLinears, their weights kept as (in, out) in memory."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.numel() >= 2 ** 18:
            weight = module.weight
            if weight.dtype == torch.float32 and weight.device.type == 'cpu':
                weight.data = weight.data.t().contiguous().t()
                module.__class__ = RowLinear    # the same parameters, read in another way
    return model


@dataclass(eq=False)
class Request:
    """A prompt, how to go on from it and, once decode() has it, what was written."""
    prompt: list                # of ids, at least one
    max_new_tokens: int = 500
    temperature: float = 1.0    # 0: the likeliest token
    top_k: int = 0              # 0: all
    top_p: float = 1.0
    seed: int = 0               # the result depends on it, not on the neighbours
    end: tuple = ()             # the ids that end it; they are written too
    tool: object = None         # a function: ids written so far -> ids to be put behind them
    cancelled: bool = False     # whoever waits for it may set this at any time
    ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)    # of each id when drawn; None: from the tool
    reason: str = ''            # why it has ended: end, length, cancelled; '': it goes on

    @property
    def in_play(self):
        """Of each id, the prompt's too: whether the model itself drew it."""
        return [False] * len(self.prompt) + [p is not None for p in self.logprobs]


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """
    logits: (B, V), the others numbers or (B, 1) -> (B, V), what a token is drawn from: the top_k
    likeliest, then the likeliest that together have top_p. At temperature 0 it is one-hot.
    """
    temperature, top_k, top_p = (torch.as_tensor(value, device=logits.device).expand(len(logits), 1)
                                 for value in (temperature, top_k, top_p))
    greedy = temperature < 1e-4     # less would divide beyond what fp32 can hold
    top_p = top_p.clamp(min=1e-6)
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


def draw(logits, requests, chance):
    """logits: (B, V), a generator for each row -> list of B ids, list of their log-probabilities"""
    if all(request.temperature == 0 for request in requests):
        return logits.argmax(1).tolist(), [0.0] * len(requests)
    how = [[getattr(request, name) for request in requests]
           for name in ('temperature', 'top_k', 'top_p')]
    probs = probabilities(logits, *(torch.tensor(values, device=logits.device)[:, None]
                                    for values in how))
    probs = probs if probs.device.type != 'mps' else probs.cpu()    # it has no float64
    # The first token whose cumulated probability exceeds the draw: no token of probability 0.
    sums = probs.double().cumsum(1)
    draws = torch.tensor([[rng.random()] for rng in chance]).to(sums)
    ids = torch.searchsorted(sums, draws * sums[:, -1:], right=True).clamp(max=sums.shape[1] - 1)
    return ids[:, 0].tolist(), probs.gather(1, ids)[:, 0].log().tolist()


FEW = 16    # so many tokens, as of a tool's answer, are read one by one beside the other rows:
            # a pass of their own would cost all of them a step


@torch.inference_mode()
def decode(model, requests, rows):
    """
    The decoding loop. Takes Requests from an iterator, as many at a time as there are rows, and
    yields a request whenever a token was added to its ids. A row whose request has ended goes on
    with the next one, whatever the others do. The iterator may give None for "nothing now", and
    None is yielded when there is nothing to do. Memory: rows * block_size keys and values.
    """
    window, weight = model.config.block_size, model.transformer.wte.weight
    cache = KVCache(model.config, rows, weight.device, weight.dtype)
    live, source = [], iter(requests)   # live[i] is in row i of the cache: no gaps

    def step(first, last):
        """Let one row read all that it has pending, or several a token each. Who has then read
        all of it gets a token more."""
        width = len(live[first].pending) if last - first == 1 else 1
        idx, through = np.full((last - first, width), -1), []
        for i, row in enumerate(live[first:last]):
            read, row.pending = row.pending[:width], row.pending[width:]
            idx[i, :len(read)] = read
            row.held += len(read)
            if read and not row.pending:
                through.append((i, row))
        part = cache.part(first, last)
        logits = model(torch.from_numpy(idx).to(weight.device), cache=part)[0][:, 0]
        drawn = draw(logits[[i for i, _ in through]], [row.request for _, row in through],
                     [row.chance for _, row in through])
        for (i, row), token, logprob in zip(through, *drawn):
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
            if row.held + len(row.pending) > window:    # full: go on from the later half
                row.pending = (request.prompt + request.ids)[-max(1, window // 2):]
                row.held, row.whole = 0, False
                cache.cut(first + i, [])
            yield request

    while live or source:
        for i in reversed(range(len(live))):
            if live[i].request.cancelled and not live[i].request.reason:
                live[i].request.reason = 'cancelled'
                yield live[i].request
            if live[i].request.reason:  # the last row fills the gap
                row = live.pop()
                if i < len(live):
                    live[i] = row
                    cache.copy_row(len(live), i, row.held)
        while source and len(live) < rows:
            request = next(source, False)
            if request is False:
                source = None
            if not request:
                break
            if not request.prompt:
                raise ValueError('a request needs a prompt of at least one token')
            cache.cut(len(live), [])
            live.append(SimpleNamespace(
                request=request, pending=request.prompt[-window:], held=0, whole=True,
                chance=np.random.default_rng(request.seed)))
        if not live and source:
            yield None
        for i, row in enumerate(live):
            new = row.held == 0 and row.whole
            twins = (j for j in range(i if new else 0)
                     if live[j].whole and live[j].request.prompt == row.request.prompt)
            for twin in itertools.islice(twins, 1):     # has read this prompt: all but its last
                *read, last = row.pending
                cache.copy_row(twin, i, len(read))
                cache.cut(i, read)
                row.pending, row.held = [last], len(read)
            alone = row.held == 0 or len(live) == 1     # a prompt, or nobody waits for it
            if len(row.pending) > (1 if alone else FEW):
                yield from step(i, i + 1)
        if any(row.pending for row in live):
            yield from step(0, len(live) if weight.device.type == 'cpu' else rows)


def generate(model, prompts, max_new_tokens, seed=0, **how):
    """-> for each prompt, side by side, the list of ids written. Prompt i draws with seed + i."""
    requests = [Request(list(prompt), max_new_tokens, seed=seed + i, **how)
                for i, prompt in enumerate(prompts)]
    for _ in decode(model, requests, len(requests)):
        pass
    return [request.ids for request in requests]


def knows_chat(model, tokenizer):
    """Whether it has the tokens that begin and end a message."""
    return max(tokenizer.special.values(), default=math.inf) < model.config.vocab_size


def ask(model, tokenizer, task, asked, seeds, rows, samples=1, most=200, temperature=1.0,
        tools=True):
    """
    Put a task's examples to a model, each so many times, with the calculator at hand or without.
    Example i's first sample draws with seeds[i], its second with that + 1, ...
    -> requests, rewards: lists with the samples of an example side by side. ValueError names an
    example whose reward cannot be had.
    """
    if not knows_chat(model, tokenizer):
        raise ValueError('this model knows no chat tokens: it can be asked nothing')
    ends = tokenizer.special['<|end|>'], tokenizer.special['<|endoftext|>']
    tool, requests, rewards = calculator(tokenizer) if tools else None, [], []
    for example, first in zip(asked, seeds, strict=True):
        prompt = tokenizer.render(task.conversation(example)[:-1], reply=True)[0]
        prompt = prompt[-(model.config.block_size - 1):]    # of one that is too long, the end
        room = model.config.block_size - len(prompt)
        requests += [Request(prompt, min(most, room), temperature, end=ends, tool=tool,
                             seed=first + i) for i in range(samples)]
    for _ in decode(model, requests, rows):
        pass
    for number, request in enumerate(requests):
        example = asked[number // samples]
        try:
            rewards.append(float(task.reward(example, Voice(tokenizer).hear(request.ids, True))))
        except Exception as error:
            why = f'{type(error).__name__}: {error}'
            raise ValueError(f'reward fails with {why}, of {example}') from None
        if not math.isfinite(rewards[-1]):
            raise ValueError(f'reward gives {rewards[-1]}, of {example}')
    return requests, rewards


def examine(model, tokenizer, questions, seed):
    """-> accuracies by kind of question. questions: a task; greedy, or what most of --votes say"""
    columns = {'all': []}
    variants = {'': {}, **getattr(questions, 'VARIANTS', {})}
    for variant, world in variants.items():
        asked = list(itertools.islice(questions.examples('test', seed, **world), num_examples))
        chances = np.random.SeedSequence(seed).generate_state(len(asked)).tolist()
        requests, rewards = ask(model, tokenizer, questions, asked, chances, rows, votes,
                                max_new_tokens, 0.0 if votes == 1 else temperature, tools)
        for i, example in enumerate(asked):
            here = slice(i * votes, (i + 1) * votes)
            elected = vote([Voice(tokenizer).hear(request.ids, True)
                            for request in requests[here]])[0]
            kinds = [variant] if variant else ['all', example.get('kind', 'all')]
            for kind in dict.fromkeys(kinds):
                columns.setdefault(kind, []).append(rewards[here][elected])
    return {kind: float(np.mean(values)) for kind, values in columns.items()}


def grade(runs, where, kind):
    """Print and draw how many of a task's held-out questions each of these runs answers rightly."""
    questions, table = task_of(DATA / task), {}
    width = max(map(len, [*runs, f'{num_examples} questions']))
    for folder in runs:
        model, tokenizer, _ = load_model(folder)
        if folder != runs[-1] and not knows_chat(model, tokenizer):
            continue    # GPT-2's tokens, before a stage gave it those of a chat
        found = examine(ready(model, where, kind), tokenizer, questions, seed)
        if not table:
            print(f'{num_examples} questions'.ljust(width), *found, sep='  ')
        table[folder] = found
        cells = (f'{value:.1%}'.rjust(len(name)) for name, value in table[folder].items())
        print(folder.ljust(width), *cells, sep='  ', flush=True)
    if tools and votes == 1:    # a picture of the runs as they are
        target = folder_of(runs[-1]) / 'stages.png'
        picture([folder_of(run) for run in table], target, f'the stages on data/{task}',
                [row['all'] for row in table.values()])
        print(f'drawn: {target}')


def write_answers(model, tokenizer, source):
    """
    Let a model answer training questions, num_samples times each, and write what can be learned
    from: its right answers (rejection sampling), or a right and a wrong one of each as pairs.
    """
    questions, texts = task_of(DATA / task), []
    asked = list(itertools.islice(questions.examples('train', f'write {seed}'), num_examples))
    chances = np.random.SeedSequence(seed).generate_state(len(asked)).tolist()
    requests, rewards = ask(model, tokenizer, questions, asked, chances, rows, num_samples,
                            max_new_tokens, tools=tools)
    for i in range(0, len(requests), num_samples):
        group = list(zip(requests[i:i + num_samples], rewards[i:i + num_samples], strict=True))
        right = [request for request, reward in group
                 if reward > 0.5 and request.ids[-1] == tokenizer.special['<|end|>']]
        wrong = [request for request, reward in group if reward <= 0.5]
        chosen = [right[0], wrong[0]] if pairs and right and wrong else [] if pairs else right
        texts.append([(request.prompt + request.ids, request.in_play) for request in chosen])
    cut = max(1, len(texts) // 10)
    parts = {'train': sum(texts[cut:], []), 'val': sum(texts[:cut], [])}
    if not all(parts.values()):
        raise ValueError(f'{num_examples} questions gave too little to learn from: ask more')
    write_texts(write, tokenizer, f'answers of {source} to questions of {task}', **parts)


def is_taught(checkpoint):
    """Whether one of the stages that made this model was about conversations."""
    return any(entry.get('stage', 'pretrain') not in TEXT_STAGES
               for entry in checkpoint.get('lineage', []))


def fit(tokenizer, turns, room):
    """
    turns: lists of ids, the first one the system's or empty -> prompt of at most room ids, number
    of turns left out. The oldest go first, a question with its answer; of the last one alone, if it
    is too long, the end is kept.
    """
    begin, reply = (tokenizer.special[name] for name in ('<|endoftext|>', '<|assistant|>'))
    head, rest = [begin, *turns[0]][:room // 2], turns[1:]
    kept = len(rest)
    while kept > 2 and len(head) + 1 + sum(map(len, rest[-kept:])) > room:
        kept -= 2
    tail = sum(rest[-kept:], [])[-(room - len(head) - 1):]
    return [*head, *tail, reply], len(rest) - kept


def talk(model, tokenizer, taught):
    """A conversation in the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys in input()
    if not taught:
        print('This model was never taught to chat: it goes on with your text instead.')
    turns, end, chances = [[]], tokenizer.special.get('<|end|>'), itertools.count(seed, votes)
    room = max(2, model.config.block_size - min(max_new_tokens, model.config.block_size // 2))
    while True:
        try:
            line = input('\n> ')
            if line == '/clear':
                turns = [turns[0]]
            elif line.split()[:1] == ['/system'] and taught:
                said = {'role': 'system', 'content': line[7:].strip()}
                turns = [tokenizer.render([said])[0][1:] if said['content'] else []]
            elif line and taught:
                question = tokenizer.render([{'role': 'user', 'content': line}])[0][1:]
                prompt, gone = fit(tokenizer, [*turns, question], room)
                if gone:
                    print(f'(it no longer sees the first {gone} messages: its window is full)')
                ids = speak(model, tokenizer, prompt, next(chances), (end, tokenizer.end),
                            calculator(tokenizer) if tools else None)
                if ids:
                    turns += [question, [prompt[-1], *ids] + [end] * (ids[-1:] != [end])]
            elif line:
                speak(model, tokenizer, tokenizer.encode(line), next(chances), (tokenizer.end,))
        except ValueError as error:     # a character that the model never saw
            print(error)
        except KeyboardInterrupt:
            print('\n(Ctrl-D ends the chat)')
        except EOFError:
            print()
            break


def speak(model, tokenizer, prompt, chance, ends, tool=None):
    """Print an answer as it is written, or what most of --votes say; Ctrl-C stops. -> its ids"""
    voice = Voice(tokenizer)
    requests = [Request(prompt, max_new_tokens, temperature, top_k, top_p, chance + i, ends, tool)
                for i in range(votes)]
    try:
        for request in decode(model, requests, votes):
            if votes == 1:
                print(voice.hear(request.ids, last=bool(request.reason)), end='', flush=True)
        if votes > 1:
            requests = [elect(requests, tokenizer)]
    except KeyboardInterrupt:
        print(' (stopped)', end='')
    print()
    return [] if len(requests) > 1 else requests[0].ids     # of several, none was chosen


def elect(requests, tokenizer):
    """Print one of the answers that most agree with (arXiv:2203.11171). -> its request"""
    texts = [Voice(tokenizer).hear(request.ids, last=True) for request in requests]
    chosen, winner, count = vote(texts)
    print(f'{texts[chosen]}\n({count} of {len(texts)} answers say: {winner})', end='')
    return requests[chosen]


def vote(texts):
    """-> which text it is that most agree with, what its final answer is, how many have that"""
    finals = [final_answer(text) for text in texts]
    winner, count = collections.Counter(finals).most_common(1)[0]
    return finals.index(winner), winner, count


def final_answer(text):
    """What follows the last ####, as in GSM8K; without one, the last line that is not empty."""
    lines = text.split('####')[-1].strip().splitlines() or ['']
    return lines[0 if '####' in text else -1].strip()


class Int8Linear(torch.nn.Module):
    """
    A Linear whose weights are kept as bytes with a scale for each output, for inference. Reading
    weights is all the work of a product with few rows; a byte is a quarter of an fp32 number.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        weight = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous()
        self.packed, self.nbytes = packed_for_cpu(weight, scale), weight.nbytes
        self.register_buffer('weight', weight if self.packed is None else None)
        self.register_buffer('scale', scale if self.packed is None else None)   # else it is packed
        self.register_buffer('bias', linear.bias)

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        if self.packed is None:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        else:
            # The kernel multiplies bytes by bytes. So that it rounds the weights alone, a row comes
            # as the sum of two of 7 bits each, a coarse one and a fine one: 14 bits, bf16 has 8.
            unit = rows.abs().amax(1, keepdim=True).float().clamp_(min=1e-30).div_(63)
            rows = rows / unit
            coarse = rows.round()
            both = torch.cat((coarse, rows.sub_(coarse).mul_(126)))
            coarse, fine = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                both, 1.0, 64, self.packed).chunk(2)
            y = torch.add(coarse, fine, alpha=1 / 126).mul_(unit)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def packed_for_cpu(weight, scale):
    """-> int8 weights as torch's x86 kernel reads them; None on other machines"""
    there = hasattr(torch.ops.quantized, 'linear_with_input_q_dq_qweight_dq_output_fp32')
    if weight.device.type != 'cpu' or torch.backends.quantized.engine != 'x86' or not there:
        return None
    with warnings.catch_warnings():     # that a later torch may be without it: then None
        warnings.simplefilter('ignore')
        zeros = torch.zeros(len(scale), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def quantized(model):
    """Replace the Linears of a model by Int8Linears; tables that are looked up stay as they are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model


def ready(model, where, kind):
    """-> a model for inference: on its device, in its precision, as it is read fastest"""
    model.to(where, kind).eval()
    if quantize:
        quantized(model)
    lay_for_reading(model)
    return torch.compile(model, dynamic=True) if compile else model


def weight_bytes(model):
    """How much a decoding step reads of a model's matrices."""
    return sum(m.nbytes if isinstance(m, Int8Linear) else m.weight.nbytes
               for m in model.modules() if isinstance(m, torch.nn.Linear | Int8Linear))


def read_bandwidth(device):
    """Bytes a second that device reads from its memory, measured on a sum over 256 MB."""
    block, seconds = torch.ones(2 ** 26, device=device), []
    for _ in range(4):
        began = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - began)
    return block.nbytes / min(seconds)


def complete(model, tokenizer, prompt, text):
    """Print num_samples texts, the first as it is written. -> tokens written, longest of them"""
    voice = Voice(tokenizer)
    ends = () if ignore_end or tokenizer.end is None else (tokenizer.end,)
    requests = [Request(prompt, max_new_tokens, temperature, top_k, top_p, seed + i, ends)
                for i in range(num_samples)]
    print(text, end='')
    for request in decode(model, requests, num_samples):
        if request is requests[0]:
            print(voice.hear(request.ids, bool(request.reason)), end='', flush=True)
    print('\n---------------')
    for request in requests[1:]:
        print(text + Voice(tokenizer).hear(request.ids, True) + '\n---------------')
    return sum(len(r.ids) for r in requests), max(len(r.ids) for r in requests)


def main():
    configure(globals())
    torch.set_float32_matmul_precision('high')
    in_range = {'num_samples': num_samples > 0, 'max_new_tokens': max_new_tokens > 0,
                'seed': seed >= 0, 'temperature': temperature >= 0, 'top_k': 0 <= top_k < 2 ** 31,
                'top_p': 0 < top_p <= 1, 'rows': rows > 0, 'queue_limit': queue_limit > 0,
                'port': 0 <= port < 65536, 'num_examples': num_examples > 0, 'votes': votes > 0,
                'quantize': quantize in ('', 'int8')}
    for name, good in in_range.items():
        if not good:
            sys.exit(f'--{name}={globals()[name]}: out of range; see --help')
    if (write and not task) or (pairs and not write):
        sys.exit('--write= goes with --task=, and --pairs=True with --write=')
    try:
        where = auto_device(device)
        kind = auto_dtype(dtype, where)
        source = out_dir if init_from == 'resume' else init_from
        model, tokenizer, checkpoint = load_model(source)
        text = Path(start[5:]).read_text(encoding='utf-8') if start.startswith('FILE:') else start
        prompt = tokenizer.encode(text, special=True) or [tokenizer.end or 0]
        if max(prompt) >= model.config.vocab_size:
            raise ValueError(f'--start: this model has no token {tokenizer.decode([max(prompt)])}')
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if task:
        runs = [entry.get('init_from', '') for entry in checkpoint.get('lineage', [])]
        runs = [run for run in runs if (folder_of(run) / 'log.jsonl').exists()] + [source]
        try:
            if write:
                return write_answers(ready(model, where, kind), tokenizer, source)
            return grade(runs, where, kind)
        except (ValueError, OSError) as error:
            sys.exit(str(error))
    network = ready(model, where, kind)
    if serve:
        from assets.serve import Served
        from assets.serve import serve as serve_web
        name = Path(out_dir).name if init_from == 'resume' else init_from
        try:
            serve_web(Served(network, tokenizer, checkpoint, name, tools),
                      lambda source: decode(network, source, rows), host, port, queue_limit)
        except OSError as error:
            sys.exit(f'--host={host} --port={port}: {error.strerror or error}; try --port=0')
        return
    if chat:
        return talk(network, tokenizer, is_taught(checkpoint))
    if len(prompt) > model.config.block_size:
        print(f'the prompt has {len(prompt)} tokens; the model sees the last '
              f'{model.config.block_size}', file=sys.stderr)
    if votes > 1:
        ends = () if ignore_end or tokenizer.end is None else (tokenizer.end,)
        print(text, end='')
        speak(network, tokenizer, prompt, seed, ends)
        return
    began = time.perf_counter()
    written, steps = complete(network, tokenizer, prompt, text)
    seconds = time.perf_counter() - began
    share = steps * weight_bytes(model) / seconds / read_bandwidth(where)
    print(f'{written / seconds:.1f} tokens/s in {num_samples} rows; reading weights '
          f'takes {share:.0%} of the memory bandwidth', file=sys.stderr)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')    # a terminal may not know every character
    try:
        import sample  # itself as a module: there is one Request, whoever imports it
        sample.main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:     # who read along has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
