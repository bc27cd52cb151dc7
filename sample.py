"""
The one decoding loop, and what it is for: loading a model and writing text with it.

    python sample.py --out_dir=out-shakespeare-char --start='ROMEO:'
    python sample.py --init_from=gpt2-xl --start='What is the answer to life?' --num_samples=5

A row's context is at most block_size tokens. A longer prompt is cut to its last block_size tokens;
when a row has filled the window, it goes on with the later half of it as its context (so a sample
can be of any length).
"""
import os
import pickle
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

from configurator import configure
from data.files import DATA, read_meta
from data.tokenizer import Tokenizer
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
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: what is fastest here
compile = False         # torch.compile the model

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
    if 'norm' not in args:      # nanoGPT's checkpoints know one architecture
        args = {**GPT2, **args}
    try:
        model = GPT(GPTConfig(**{**args, 'dropout': dropout}))
        model.load_state_dict({
            name.removeprefix('_orig_mod.'): p for name, p in checkpoint['model'].items()
            if not name.endswith('.attn.bias')})    # the causal mask of an old nanoGPT
    except (TypeError, RuntimeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f'{path}: its weights are of another architecture than this model.py '
                         f'({str(error).splitlines()[0]})') from None
    meta = read_meta(DATA / checkpoint.get('config', {}).get('dataset', ''))
    spec = checkpoint.get('tokenizer') or meta['tokenizer']
    if spec['kind'] == 'gpt2' and model.config.vocab_size < 50257:
        raise ValueError(f'{path}: its characters are in the data folder that it was trained on; '
                         'put its meta.pkl back there')
    return model, Tokenizer(spec), checkpoint


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


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits: (B, V) -> (B, V), what a token is drawn from. At temperature 0 it is one-hot."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, [-1]], -torch.inf)
    probs = logits.softmax(1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        ordered[ordered.cumsum(1) - ordered >= top_p] = 0   # the one that crosses top_p is in
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
        probs /= probs.sum(1, keepdim=True)
    return probs


def draw(probs, chance):
    """probs: (B, V), a generator for each row -> list of B ids"""
    probs = probs if probs.device.type != 'mps' else probs.cpu()    # it has no float64
    # The first token whose cumulated probability exceeds the draw: no token of probability 0.
    sums = probs.double().cumsum(1)
    draws = torch.tensor([[rng.random()] for rng in chance]).to(sums)
    return torch.searchsorted(sums, draws * sums[:, -1:], right=True).flatten().tolist()


@torch.inference_mode()
def decode(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, seed=0, end=None):
    """
    Go on with each prompt (a list of ids), all rows side by side. Yields, token after token, a list
    of each row's next id: None once a row has ended, with the id end. Row i draws with seed + i.
    """
    window = model.config.block_size
    weight = model.lm_head.weight
    cache = KVCache(model.config, len(prompts), weight.device, weight.dtype)
    chance = [np.random.default_rng(seed + row) for row in range(len(prompts))]
    texts, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    pending = [text[-window:] for text in texts]    # what each row has yet to read
    held = [0] * len(prompts)
    for _ in range(max_new_tokens):
        idx = np.full((len(prompts), max(map(len, pending))), -1)
        for row, tokens in enumerate(pending):
            idx[row, :len(tokens)] = tokens
            held[row] += len(tokens)
        logits, _ = model(torch.from_numpy(idx).to(weight.device), cache=cache)
        if temperature == 0:
            step = logits[:, 0].argmax(1).tolist()
        else:
            step = draw(probabilities(logits[:, 0], temperature, top_k, top_p), chance)
        step = [None if ended[row] else token for row, token in enumerate(step)]
        yield step
        for row, token in enumerate(step):
            ended[row] = token is None or token == end
            pending[row] = [] if ended[row] else [token]
            texts[row] += pending[row]
            if held[row] == window and not ended[row]:      # full: go on from the later half
                pending[row] = texts[row][-max(1, window // 2):]
                held[row] = 0
                cache.pos[row], cache.tail[row] = 0, -1
        if all(ended):
            break


def generate(model, prompts, max_new_tokens, **how):
    """-> for each prompt, the list of ids that decode() wrote."""
    steps = list(decode(model, prompts, max_new_tokens, **how))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


def read_bandwidth(device):
    """Bytes a second that device reads from its memory, measured on a sum over 256 MB."""
    block, seconds = torch.ones(2 ** 26, device=device), []
    for _ in range(4):
        began = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - began)
    return block.nbytes / min(seconds)


def main():
    configure(globals())
    torch.set_float32_matmul_precision('high')
    in_range = {'num_samples': num_samples > 0, 'max_new_tokens': max_new_tokens > 0,
                'seed': seed >= 0, 'temperature': temperature >= 0, 'top_k': top_k >= 0,
                'top_p': 0 < top_p <= 1}
    for name, good in in_range.items():
        if not good:
            sys.exit(f'--{name}={globals()[name]}: out of range; see --help')
    try:
        where = auto_device(device)
        kind = auto_dtype(dtype, where)
        model, tokenizer, _ = load_model(out_dir if init_from == 'resume' else init_from)
        text = Path(start[5:]).read_text(encoding='utf-8') if start.startswith('FILE:') else start
        prompt = tokenizer.encode(text, special=True) or [tokenizer.end or 0]
        if max(prompt) >= model.config.vocab_size:
            raise ValueError(f'--start: this model has no token {tokenizer.decode([max(prompt)])}')
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if len(prompt) > model.config.block_size:
        print(f'the prompt has {len(prompt)} tokens; the model sees the last '
              f'{model.config.block_size}', file=sys.stderr)
    lay_for_reading(model.to(where, kind).eval())
    network = torch.compile(model, dynamic=True) if compile else model
    stream, rows, steps = tokenizer.stream(), [[] for _ in range(num_samples)], 0
    began = time.perf_counter()
    print(text, end='')
    for step in decode(network, [prompt] * num_samples, max_new_tokens, temperature, top_k, top_p,
                       seed, None if ignore_end else tokenizer.end):
        steps += 1
        for row, token in zip(rows, step):
            if token is not None:
                row.append(token)
        if step[0] is not None:     # the first sample appears as it is written, the others later
            print(stream(step[0]), end='', flush=True)
    seconds = time.perf_counter() - began
    print(stream(None, last=True) + '\n---------------')
    for row in rows[1:]:
        print(text + tokenizer.decode(row) + '\n---------------')
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
    share = steps * weights / seconds / read_bandwidth(where)
    print(f'{sum(map(len, rows)) / seconds:.1f} tokens/s in {num_samples} rows; reading weights '
          f'takes {share:.0%} of the memory bandwidth', file=sys.stderr)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')    # a terminal may not know every character
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:     # who read along has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
