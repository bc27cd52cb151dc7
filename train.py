"""
The one training loop. Every stage of making a language model is weighted next-token prediction,

    loss = - sum of w * log p(y | x) / N      over the N tokens in play (y != -1) of a step,

so a stage is only a generator of (x, y, w) and a way to evaluate; the loop below knows no stage.

    python train.py config/train_shakespeare_char.py                                # a laptop
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py          # eight GPUs
"""
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from configurator import configure, read_settings
from data.files import DATA, Tokens, cut_log, find, fresh_folder, is_ready, read_meta, write
from data.tokenizer import Tokenizer
from model import GPT, GPT2, GPT2_SIZES, GPTConfig
from sample import auto_device, auto_dtype, generate, load_model, out_of_memory, peak_flops

# what to do, from what, to where
stage = 'pretrain'           # what feeds the loop: pretrain, or finetune (the same)
init_from = 'scratch'        # scratch, resume, a run's folder, gpt2[-medium|-large|-xl]
out_dir = 'out'              # where checkpoints, the log and the picture go
dataset = 'openwebtext'      # a folder in data/
fallback_dataset = ''        # instead of dataset, if that can be neither found nor downloaded
seed = 1337                  # all chance comes from (seed, step, microstep, rank)
eval_only = False            # evaluate once and stop
dry_run = False              # say what the run would take (parameters, FLOPs, memory) and stop
# evaluation and logging
eval_interval = 2000         # steps between evaluations
eval_iters = 200             # batches at most, spread over the validation data; 0: all
log_interval = 1             # steps between lines in the log
always_save_checkpoint = True   # at every evaluation; False: only when the loss is the best so far
sample_tokens = 80           # how much text to print at every evaluation; 0: none
wandb_log = False            # log to Weights & Biases too
wandb_project = 'oneloop'    # its project
wandb_run_name = 'gpt2'      # and its name for this run
# a step
gradient_accumulation_steps = 40   # microbatches in a step, over all processes together
batch_size = 12              # rows in a microbatch: what fits into memory
block_size = 1024            # tokens in a row
# the model: see GPTConfig in model.py
n_layer = 12                 # blocks
n_head = 12                  # query heads
n_kv_head = 0                # key and value heads, n_head divides into them; 0: n_head
n_embd = 768                 # width
dropout = 0.0                # for many passes over little data; 0 for pretraining on much
bias = False                 # biases in Linears and LayerNorms
norm = 'rms'                 # rms or layer
position = 'rope'            # rope or learned
qk_norm = True               # normalize queries and keys
activation = 'relu2'         # relu2, gelu or gelu_tanh
tied = False                 # one table for the embedding and the head
zero_init = True             # what writes into the residual stream starts at zero
ngrams = 1                   # embed the last 2 .. ngrams tokens too; 1: the last one alone
ngram_rows = 32768           # rows of the table that they are hashed into
vocab_multiple = 64          # rows of the token tables are rounded up to this
# the optimizers
learning_rate = 6e-4         # AdamW's peak
muon_lr = 0.0                # Muon's peak, on the layers' matrices (try 0.02); 0: AdamW for all
max_iters = 600000           # steps
weight_decay = 1e-1          # on matrices and tables
beta1 = 0.9                  # AdamW's
beta2 = 0.95                 # AdamW's
grad_clip = 1.0              # largest norm of the gradient; 0: no limit
decay_lr = True              # follow the schedule below; False: a constant rate
warmup_iters = 2000          # steps of linear warm-up
lr_decay_iters = 0           # where the decay ends; 0: at max_iters
min_lr = 6e-5                # the rate there, for AdamW; Muon falls by the same factor
warmdown = 0.0               # share of the steps over which the rate falls, linearly; 0: a cosine
# the machine
device = 'auto'              # cuda, cuda:1, mps or cpu
dtype = 'auto'               # float32, bfloat16 or float16; auto: what is fastest here
compile: bool = None         # torch.compile; None: on CUDA, where it pays
backend = ''                 # of torch.distributed; '': nccl on CUDA, else gloo

MAX_SKIPS = 5   # so many steps in a row without a finite gradient end the run
LEAST = dict(
    batch_size=1, gradient_accumulation_steps=1, block_size=1, max_iters=1, eval_interval=1,
    log_interval=1, learning_rate=1e-9, seed=0, eval_iters=0, grad_clip=0, warmup_iters=0,
    sample_tokens=0, weight_decay=0, muon_lr=0)


def pretrain(run):
    """Windows of a token file, each once an epoch; all is in play. -> batches(step), evaluate()"""
    train, val = (Tokens(run.data, split, block_size + 1, run.model.config.vocab_size)
                  for split in ('train', 'val'))

    def batches(step):
        """A step's microbatches (x, y, w) for this process, of rows shared out among all."""
        count = batch_size * gradient_accumulation_steps
        rows = np.arange(step * count, (step + 1) * count)[run.rank::run.world]
        starts = train.shuffled(rows, block_size, seed)
        for i in range(0, len(starts), batch_size):
            window = torch.from_numpy(train.windows(starts[i:i + batch_size], block_size + 1))
            yield window[:, :-1], window[:, 1:], None

    def held_out():
        """Non-overlapping windows, every target once, in at most eval_iters batches."""
        starts, repeats = val.cover(block_size, eval_iters * batch_size)
        unit = batch_size * run.world           # the last batch is filled up, with rows not in play
        starts = np.append(starts, np.zeros(-len(starts) % unit, int))
        repeats = np.append(repeats, np.full(-len(repeats) % unit, block_size))
        for i in range(run.rank * batch_size, len(starts), unit):
            window = torch.from_numpy(val.windows(starts[i:i + batch_size], block_size + 1))
            x, y = window[:, :-1], window[:, 1:].clone()
            y[torch.arange(block_size) < torch.from_numpy(repeats[i:i + batch_size, None])] = -1
            yield x, y, None

    return batches, lambda: validation_loss(run, held_out())


def validation_loss(run, batches):
    """Mean loss over the tokens in play in all processes' batches. -> metrics, score"""
    bytes_of = torch.tensor(run.tokenizer.byte_lengths() + [0] * run.model.config.rows)
    total = torch.zeros(3, dtype=torch.float64)
    for x, y, w in batches:
        loss = run.forward(x, y, w)[1].item()
        total += torch.tensor([loss, (y >= 0).sum(), bytes_of[y[y >= 0]].sum()])
    loss, count, size = all_sum(total, run)
    metrics = {'val_loss': loss / count, 'val_bits_per_byte': loss / max(size, 1) / math.log(2)}
    return metrics, metrics['val_loss']


# A stage gives batches(step), which yields (x, y, w), and evaluate() -> metrics, score to lower.
STAGES = {'pretrain': pretrain, 'finetune': pretrain}


def all_sum(values, run):
    """Sum a small vector over all processes. -> list of numbers"""
    if run.world > 1:
        values = values.to(run.device if dist.get_backend() == 'nccl' else 'cpu')
        dist.all_reduce(values)
    return values.tolist()


def schedule(step):
    """The learning rate at a step, as a share of its peak."""
    end, least = lr_decay_iters or max_iters, min_lr / learning_rate
    if not decay_lr:
        return 1.0
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if step >= end:
        return least
    if warmdown:
        return least + (1 - least) * min(1.0, (end - step) / (warmdown * end))
    share = (step - warmup_iters) / max(1, end - warmup_iters)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * share))


def one_step(run, batches, step):
    """
    Back-propagate the sum over every microbatch, divide once by N, update. -> loss, N, norm of the
    gradient. Without a finite gradient, or with nothing in play, the weights stay as they are.
    """
    total, count, micro = torch.zeros((), device=run.device), 0, 0
    following = iter(batches(step))
    batch = next(following)
    while batch is not None:
        x, y, w = batch
        count += int((y >= 0).sum())
        chance = np.random.SeedSequence((seed, step, micro, run.rank)).generate_state(1)
        torch.manual_seed(int(chance[0]))       # dropout's
        batch, micro = next(following, None), micro + 1
        last = batch is None or run.world == 1  # processes exchange their gradients once a step
        with contextlib.nullcontext() if last else run.network.no_sync():
            _, loss = run.forward(x, y, w)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    sums = torch.tensor([total.item(), count, run.asked_to_stop], dtype=torch.float64)
    loss, count, run.stop = all_sum(sums, run)  # so that all stop after the same step
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    scale = run.world / max(count, 1)           # DistributedDataParallel has divided by run.world
    norm = torch.nn.utils.get_total_norm(grads).item() * scale
    finite = math.isfinite(norm) and math.isfinite(loss)
    probing = run.scaler.is_enabled() and math.isfinite(loss)   # fp16 looks for its scale
    run.skipped = 0 if finite or probing else run.skipped + 1
    if finite and count:
        clip = min(1.0, grad_clip / (norm + 1e-6)) if grad_clip else 1.0
        torch._foreach_mul_(grads, scale * clip)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = optimizer.peak_lr * schedule(step)
            run.scaler.step(optimizer)
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    return loss / max(count, 1), int(count), norm


def loop(run, batches, evaluate):
    """The loop: evaluate and save when it is due, else one step."""
    first, losses, logged = run.step, [], run.seconds
    peak, flops = peak_flops(run.device, run.dtype), run.model.flops_per_token(block_size)
    bar = tqdm(total=max_iters, initial=first, disable=run.rank > 0 or not sys.stdout.isatty())
    while True:
        at_rest = run.step == first and init_from in ('scratch', 'resume')
        due = run.step % eval_interval == 0 or run.step == max_iters
        if eval_only or (due and not at_rest):
            assess(run, evaluate)
        if eval_only or run.stop or run.step >= max_iters:
            break
        start = time.perf_counter()
        loss, _, norm = one_step(run, batches, run.step)
        run.seconds += time.perf_counter() - start
        run.step += 1
        losses.append(loss)
        bar.update()
        if run.skipped:
            run.say(f'step {run.step}: loss {loss} or its gradient is not finite: skipped, '
                    f'{run.skipped} in a row')
        if run.skipped == MAX_SKIPS:
            raise ValueError(f'{MAX_SKIPS} steps in a row were not finite: lower --learning_rate '
                             f'and --muon_lr; the last good checkpoint, if any, is in {out_dir}')
        if run.step % log_interval == 0:
            rate = len(losses) * run.step_tokens / (run.seconds - logged)
            mfu = flops * rate / (peak * run.world) if peak else None
            loss, losses, logged = float(np.mean(losses)), [], run.seconds
            log(run, loss=loss, norm=norm, tokens_per_second=rate, mfu=mfu)
            run.say(f'step {run.step}: loss {loss:.4f}, {1e3 * run.step_tokens / rate:.0f} ms, '
                    f'{rate:,.0f} tokens/s' + (f', {mfu:.0%} of peak' if peak else ''))
        if run.step == first + 1:
            began = run.seconds     # the first step may have compiled
        if run.step == first + 10:
            left = (run.seconds - began) / 9 * (max_iters - run.step)
            run.say(f'about {left / 60:.1f} minutes left')
    bar.close()
    if run.stop and not eval_only:
        save(run, 'ckpt.pt')
        rest = shlex.join(a for a in sys.argv[1:] if not a.startswith('--init_from'))
        launcher = 'python' if run.world == 1 else 'torchrun ...'
        run.say(f'stopped and saved after step {run.step}; to go on: '
                f'{launcher} train.py {rest} --init_from=resume')


@torch.no_grad()
def assess(run, evaluate):
    """Evaluate, and write what is due then: a line of the log, checkpoints, picture, sample."""
    run.model.eval()
    metrics, score = evaluate()
    report = ', '.join(f'{name} {value:.4f}' for name, value in metrics.items())
    run.say(f'step {run.step}: {report}, after {run.seconds:.1f} s of training')
    if not eval_only:
        log(run, **metrics)
        if score < run.best:
            run.best = score
            save(run, 'best.pt')
        if always_save_checkpoint or run.best == score or run.step >= max_iters:
            save(run, 'ckpt.pt')
    if run.rank == 0 and not eval_only:
        plot(Path(out_dir, 'log.jsonl'), Path(out_dir, 'loss.png'))
        if sample_tokens:
            ids = generate(run.model, [[run.tokenizer.end or 0]], sample_tokens, seed=seed)[0]
            run.say('  | ' + run.tokenizer.decode(ids).replace('\n', '\n  | '))
    run.model.train()


def log(run, **metrics):
    line = dict(step=run.step, tokens=run.step * run.step_tokens, seconds=run.seconds, **metrics)
    if run.rank == 0:
        with open(Path(out_dir, 'log.jsonl'), 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
    if run.wandb:
        run.wandb.log(line)


def plot(source, target):
    """Redraw the losses in log.jsonl."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    lines = [json.loads(line) for line in source.read_text(encoding='utf-8').splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, style in ('loss', '-'), ('val_loss', 'o-'):
        points = [(line['step'], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points or [(0, math.nan)], strict=True), style, label=key, markersize=3)
    axes.set(title=f'{stage} on {dataset}', xlabel='step', ylabel='loss (nats per token)')
    axes.legend()
    figure.savefig(target, dpi=100, bbox_inches='tight')
    pyplot.close(figure)


def save(run, name):
    """Write a checkpoint under a temporary name, flush, rename: there is always a whole one."""
    if run.rank:
        return
    content = {
        'model': run.model.state_dict(), 'optimizer': [o.state_dict() for o in run.optimizers],
        'scaler': run.scaler.state_dict(), 'model_args': asdict(run.model.config),
        'config': run.config, 'iter_num': run.step, 'best_val_loss': run.best,
        'seconds': run.seconds, 'tokenizer': run.tokenizer.spec, 'lineage': run.lineage}
    write(Path(out_dir, name), lambda file: torch.save(content, file))


def preflight(run, model, origin):
    """Say what this run is going to take, before it takes it. model may be on the meta device."""
    c, flops = model.config, model.flops_per_token(block_size)
    total = sum(p.numel() for p in model.parameters())
    muon = sum(p.numel() for p in model.transformer.h.parameters() if muon_lr and p.dim() == 2)
    rows, size = batch_size * block_size, 4 if run.dtype == torch.float32 else 2
    # A token keeps 18 activations of width C in a layer (counted; 16 in GPT-2's) and backward needs
    # a few more; of its logits there are two in this precision and two in fp32.
    work = rows * (c.n_layer * 22 * c.n_embd * size + c.rows * (2 * size + 8))
    state = 4 * (2 * total - muon)
    tokens, seen = max_iters * run.step_tokens, run.meta.get('counts', {}).get('train')
    run.say(f"""{stage} on {dataset} from {init_from}, into {out_dir}
  model       {total / 1e6:.2f}M parameters, {c.n_layer} layers, {c.n_embd} wide; \
{flops / 1e6:.1f} MFLOPs per token
  a step      {run.step_tokens:,} tokens: {gradient_accumulation_steps} x {batch_size} rows of \
{block_size}
  the run     {max_iters:,} steps, {tokens:,} tokens, {flops * tokens:.1e} FLOPs, \
{f'{tokens / seen:.2f} epochs of {seen:,} tokens' if seen else 'data of unknown length'}
  memory      about {(8 * total + state + work) / 1e9:.2f} GB: {8 * total / 1e9:.2f} weights and \
gradients, {state / 1e9:.2f} optimizer, {work / 1e9:.2f} activations
  checkpoint  {(4 * total + state) / 1e6:.1f} MB, and as much for the best one
  machine     {run.world} x {run.device}, {str(run.dtype)[6:]}, compile={run.compile}, \
{'Muon and AdamW' if muon_lr else 'AdamW'}""")
    for layer in dict.fromkeys(origin.values()):
        names = [name for name in origin if origin[name] == layer]
        run.say(f'  settings    of {layer}: {", ".join(names)}')


def setup():
    """Check the settings against the machine and each other. -> run: all that is not a setting"""
    run = SimpleNamespace(
        rank=int(os.environ.get('RANK', 0)), world=int(os.environ.get('WORLD_SIZE', 1)),
        local_rank=int(os.environ.get('LOCAL_RANK', 0)), stop=0, asked_to_stop=0, skipped=0,
        step=0, seconds=0.0, best=math.inf, lineage=[], wandb=None,
        step_tokens=batch_size * gradient_accumulation_steps * block_size)
    run.say = (lambda text: tqdm.write(text, sys.stdout)) if run.rank == 0 else lambda text: None
    if stage not in STAGES:
        raise ValueError(f'--stage={stage}: no such stage; there are: {" ".join(STAGES)}')
    for name, least in LEAST.items():
        if globals()[name] < least:
            raise ValueError(f'--{name}={globals()[name]}: must be at least {least}')
    if init_from == 'scratch':
        architecture(vocab_size=1)  # refused, if it must be, before any data are touched
    if batch_size * gradient_accumulation_steps % run.world:
        raise ValueError(f'--batch_size={batch_size} x --gradient_accumulation_steps='
                         f'{gradient_accumulation_steps} do not divide among {run.world} processes')
    run.device = auto_device(device, run.local_rank)
    run.dtype = auto_dtype(dtype, run.device)
    run.compile = run.device.startswith('cuda') if compile is None else compile
    if run.device.startswith('cuda'):
        torch.cuda.set_device(run.device)
    if run.world > 1:
        dist.init_process_group(backend or ('nccl' if run.device.startswith('cuda') else 'gloo'))
    alike = all_sum(torch.tensor([float(run.dtype == torch.float32)]), run)[0]
    if alike not in (0, run.world):     # measured on each: they must agree
        run.dtype = torch.float32
    torch.set_float32_matmul_precision('high')
    find_data(run)
    source = Path(init_from).parent if init_from.endswith('.pt') else Path(init_from)
    if not (eval_only or dry_run) and source.resolve() == Path(out_dir).resolve():
        raise ValueError(f'--out_dir={out_dir} is the run that --init_from reads: choose another')
    return run


def find_data(run):
    """Set run.data and run.meta: dataset's, else fallback_dataset's, which is said loudly."""
    global dataset, out_dir
    names = [name for name in (dataset, fallback_dataset) if name]
    if run.local_rank == 0:
        for problem in find(names, prepare=not dry_run):
            run.say(problem + ("; GPT-2's vocabulary is assumed" if dry_run else ''))
    if run.world > 1:
        dist.barrier()
    name = next((name for name in names if is_ready(DATA / name)), dataset)
    if name != dataset:
        out_dir = out_dir.replace(dataset.replace('_', '-'), name.replace('_', '-'))
        run.say(f'!!! NOT {dataset.upper()}: TRAINING ON {name.upper()} INSTEAD, IN {out_dir} !!!')
        dataset = name
    run.data, run.meta = DATA / name, read_meta(DATA / name)
    run.config = {name: globals()[name] for name in read_settings(__file__)}


def architecture(vocab_size):
    settings = {f.name: globals()[f.name] for f in fields(GPTConfig) if f.name in globals()}
    return GPTConfig(**settings, vocab_size=vocab_size)


def make_model(run):
    """-> model on the CPU, and the checkpoint that it comes from ({} if from scratch)"""
    if init_from == 'resume' and not Path(out_dir, 'ckpt.pt').exists():
        run.say(f'{out_dir}: nothing is saved there yet, so this starts from scratch')
    elif init_from != 'scratch' and not (dry_run and init_from in GPT2_SIZES):
        source = f'{out_dir}/ckpt.pt' if init_from == 'resume' else init_from
        model, tokenizer, checkpoint = load_model(source, dropout)
        if tokenizer.spec != run.meta['tokenizer']:
            raise ValueError(f'{source} and data/{dataset} do not have the same tokenizer')
        if block_size > model.config.block_size:
            raise ValueError(f'--block_size={block_size}: {source} has {model.config.block_size}')
        if init_from == 'resume' and dtype == 'auto':   # measured then; a busy machine may differ
            run.dtype = getattr(torch, checkpoint['config'].get('dtype', 'auto'), run.dtype)
        return model, checkpoint
    config = architecture(run.meta['vocab_size'])
    if init_from in GPT2_SIZES:
        shape = zip(('n_layer', 'n_head', 'n_embd'), GPT2_SIZES[init_from], strict=True)
        config = GPTConfig(**GPT2, **dict(shape))
    with torch.device('meta' if dry_run else 'cpu'):
        torch.manual_seed(seed)
        return GPT(config), {}


def prepare(run, model, checkpoint):
    """Put on run all that the loop needs: the optimizers, the network, what a checkpoint knows."""
    run.model, run.tokenizer = model.to(run.device), Tokenizer(run.meta['tokenizer'])
    fast = torch.bfloat16 if run.dtype == torch.bfloat16 else torch.float32     # Muon's
    run.optimizers = model.configure_optimizers(
        weight_decay, learning_rate, (beta1, beta2), muon_lr, fast)
    run.scaler = torch.amp.GradScaler('cuda', enabled=run.dtype == torch.float16,
                                      init_scale=2.0 ** 16 / (batch_size * block_size))
    run.lineage = checkpoint.get('lineage', [])
    resumed = init_from == 'resume' and bool(checkpoint)
    if resumed:
        states = checkpoint['optimizer']    # one in nanoGPT's checkpoints, a list in ours
        states = states if isinstance(states, list) else [states]
        if len(states) != len(run.optimizers):
            raise ValueError('--init_from=resume goes on with the optimizers of the checkpoint: '
                             'leave muon_lr out')
        for optimizer, state in zip(run.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        if checkpoint.get('scaler'):
            run.scaler.load_state_dict(checkpoint['scaler'])
        run.step, run.best = checkpoint['iter_num'], float(checkpoint['best_val_loss'])
        run.seconds = checkpoint.get('seconds', 0.0)
    else:
        run.lineage = run.lineage + [{'stage': stage, 'dataset': dataset, 'init_from': init_from,
                                      'data': run.meta.get('sha256', {})}]
    if all_sum(torch.tensor([float(run.step)]), run)[0] != run.step * run.world:
        raise ValueError(f'{out_dir}/ckpt.pt differs between processes: copy it to each node')
    run.network = torch.compile(model) if run.compile else model
    if run.world > 1:
        devices = [run.local_rank] if run.device.startswith('cuda') else None
        run.network = nn.parallel.DistributedDataParallel(
            run.network, device_ids=devices, broadcast_buffers=False)
    batches_evaluate = STAGES[stage](run)
    if run.rank == 0 and resumed and not eval_only:
        cut_log(Path(out_dir, 'log.jsonl'), run.step)
    elif run.rank == 0 and not eval_only:
        aside = fresh_folder(out_dir)
        if aside:
            run.say(f'{out_dir} holds a run already: moved to {aside}')
    if wandb_log and run.rank == 0:
        import wandb
        run.wandb = wandb
        wandb.init(project=wandb_project, name=wandb_run_name, config=run.config)

    def forward(*batch):
        if run.device.startswith('cuda'):   # pinned, so that the copy overlaps the GPU's work
            batch = [t if t is None else t.pin_memory() for t in batch]
        batch = [t if t is None else t.to(run.device, non_blocking=True) for t in batch]
        with torch.autocast(run.device.split(':')[0], run.dtype, run.dtype != torch.float32):
            return run.network(*batch)
    run.forward = forward
    return batches_evaluate


def finish(run, number, _frame):
    """A signal's handler: end after this step; the same signal again ends at once."""
    run.asked_to_stop = 1
    signal.signal(number, signal.SIG_DFL)


def main():
    origin = configure(globals())
    try:
        run = setup()
        model, checkpoint = make_model(run)
        run.config['dtype'] = str(run.dtype)[6:]
        preflight(run, model, origin)
        if not dry_run:
            batches, evaluate = prepare(run, model, checkpoint)
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, lambda *caught: finish(run, *caught))
            loop(run, batches, evaluate)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except ImportError as error:
        sys.exit(f'{error}: pip install {error.name}')
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(f'out of memory: halve --batch_size={batch_size} and double '
                 f'--gradient_accumulation_steps={gradient_accumulation_steps}: the same step, '
                 'in less memory')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')    # a terminal may not know every character
    main()
