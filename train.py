"""
The one training loop: text in, weights out. Every stage is weighted next-token prediction,

    loss = - sum of w * log p(y | x) / N      over the N tokens in play (y != -1) of a step,

so a stage is only a generator of batches (x, y, w) and a way to evaluate: read_rows() of
data/rows.py for text and conversations, else a file of stages/.

    python train.py config/train_shakespeare_char.py                                # a laptop
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py          # eight GPUs
"""
from data import models, processes, runs  # isort: skip  (before torch: see data/__init__.py)
import importlib
import itertools
import math
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from configurator import configure
from data.files import extra, mixture_of, program, read_metas, say
from data.processes import all_sum
from data.rows import TEXT_STAGES, read_rows
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, token_log_probs
from sample import generate

# what to do, from what, to where
stage = 'pretrain'           # pretrain, finetune (the same), sft, or a file of stages/: rl, dpo ...
init_from = 'scratch'        # scratch, resume, a run's or a model's folder or name (gpt2, a/b)
out_dir = 'out'              # where checkpoints, the log and the picture go
dataset = 'openwebtext'      # a folder in data/, or a mixture: a:0.8,b:0.2
fallback_dataset = ''        # instead of dataset, if that cannot be downloaded
verify = False               # compare the data's checksums with those it was written with
seed = 1337                  # all randomness is from (seed, step, microstep, rank); from 0 to 1e18
eval_only = False            # evaluate once and stop
dry_run = False              # print what the run would take (extras/card.py) and stop
explain = False              # print a batch, token by token (extras/explain.py), and stop
# evaluation and logging
eval_interval = 2000         # steps between evaluations; at least 1
eval_iters = 200             # batches, spread over the validation data; 0: all; at least 0
log_interval = 1             # steps between lines in the log; at least 1
always_save_checkpoint = True   # at every evaluation; False: at a new best score and at the end
sample_tokens = 80           # how much text to print at every evaluation; 0: none; at least 0
wandb_log = False            # log to Weights & Biases too
wandb_project = 'oneloop'    # its project
wandb_run_name = 'gpt2'      # and its name for this run
lora_rank = 0                # learn narrow changes of weights (extras/lora.py); at least 0
depth = 0                    # what config/depth.py behind it computes a run from; at least 1
# a step; the network's settings are the fields of GPTConfig in model.py: --n_layer=12 ...
gradient_accumulation_steps = 40   # microbatches in a step, over all processes; from 1 to 1e6
batch_size = 12              # rows in a microbatch: what fits into memory; from 1 to 1e6
block_size = 1024            # tokens in a row; from 1 to 1e8
# the optimizers
learning_rate = 6e-4         # AdamW's peak; at least 1e-9
muon_lr = 0.0                # Muon's peak, on the layers' matrices; 0: AdamW alone; at least 0
max_iters = 600000           # steps; at least 1
weight_decay = 1e-1          # on matrices and tables; at least 0
beta1 = 0.9                  # AdamW's; from 0 to 0.9999
beta2 = 0.95                 # AdamW's; from 0 to 0.9999
grad_clip = 1.0              # largest norm of the gradient; 0: no limit; at least 0
decay_lr = True              # follow the schedule below; False: a constant rate
lr_schedule = 'cosine'       # the shape of the decay: cosine or linear
warmup_iters = 2000          # steps of linear warm-up; at least 0
lr_decay_iters = 0           # where the decay ends; 0: at max_iters; at least 0
min_lr = 6e-5                # AdamW's rate there; Muon's falls by the same factor; at least 0
warmdown = 0.5               # share of the steps over which a linear one falls; from 1e-6 to 1
# the machine
device = 'auto'              # cuda, cuda:1, mps or cpu
dtype = 'auto'               # float32, bfloat16 or float16; auto: the fastest here
fp8 = False                  # the blocks' matrix products in 8 bits (extras/float8.py)
compile: bool = None         # torch.compile; None: on CUDA, where it pays
recompute = False            # activations in backward: less memory (extras/recompute.py)
backend = ''                 # of torch.distributed; '': nccl on CUDA, else gloo
shard = False                # share the model out among the processes (extras/shard.py)
checkpoint = 'whole'         # whole: a file; sharded: a folder of each process' parts beside it

MAX_SKIPS = 5   # this many updates in a row without a finite gradient end the run


@dataclass
class Stage:
    """Defines a stage. In a file of stages/ a function stage() returns these as a dict."""
    start: object              # run -> batches, evaluate. batches(step) yields (x, y, w), and None
                               # between several updates; evaluate() -> metrics, score (low: good)
    samples: bool = False      # it learns from what the model itself writes
    reference: bool = False    # it keeps a second model, frozen, to compare with


@dataclass
class Run:
    """What the loop, the stages and the checkpoints share: made once, in make_run()."""
    config: dict               # every setting by its name
    stage: Stage
    device: str                # cpu, mps, cuda:0 ...
    dtype: torch.dtype         # of matrix products; the weights are fp32
    rank: int                  # of this process, from 0
    world: int                 # number of processes
    data: dict                 # {folder: share} of the data sets
    meta: dict                 # what their meta.json say together
    tokenizer: Tokenizer
    model: GPT
    network: nn.Module         # the same weights as the loop calls them: compiled, data-parallel
    optimizers: list
    scaler: object             # torch's GradScaler, a no-op except in fp16
    lineage: list              # the stages that made these weights, this one last
    step: int = 0
    tokens: int = 0            # read so far, by all processes
    seconds: float = 0.0       # of training so far
    best: float = math.inf     # lowest score of an evaluation so far
    saves: int = 0             # checkpoints written so far by this process
    skipped: int = 0           # updates in a row without a finite gradient
    asked_to_stop: int = 0     # 1: this process caught a signal
    stop: float = 0            # number of processes that did, summed each step: all stop together
    notes: dict = field(default_factory=dict)   # numbers for the next line of the log
    since: tuple = (0.0, 0)    # seconds and tokens at the last one
    lock: object = None        # an open file that keeps other runs out of out_dir

    def note(self, **values):
        """Keep numbers for the next line of the log, which has the means of all processes."""
        for name, value in values.items():
            self.notes.setdefault(name, []).append(float(value))

    def finish(self, number, _frame):
        """A signal's handler: end after this step; the same signal again ends at once."""
        self.asked_to_stop = 1
        say('stopping after this step; the same signal again stops at once, without saving')
        signal.signal(number, signal.SIG_DFL)

    def forward(self, network, *batch):
        """A network's forward in this run's precision; batch, without None, goes to the device."""
        batch = [t.to(self.device, non_blocking=True) for t in batch if t is not None]
        with torch.autocast(self.device.split(':')[0], self.dtype, self.dtype != torch.float32):
            return network(*batch)

    def whole_model(self):
        """-> the model; if it is sharded, a whole copy, for which every process must ask."""
        if not shard:
            return self.model
        from extras.shard import gather
        return gather(self.model, GPT)

    @torch.no_grad()
    def log_probs(self, network, x, y):
        """-> log p(y | x) under a network, 0 where y is not in play: (B, T)"""
        logits = self.forward(network, x)[0]
        return token_log_probs(logits, y.to(logits.device))


SCHEDULES = {   # after the warm-up: (step, end) -> a share that falls from 1 to 0 at step end
    'cosine': lambda step, end: 0.5 * (1 + math.cos(
        math.pi * (step - warmup_iters) / max(1, end - warmup_iters))),
    'linear': lambda step, end: min(1.0, (end - step) / (warmdown * end))}


def schedule(step):
    """The learning rate at a step, as a share of its peak."""
    end, least = lr_decay_iters or max_iters, min_lr / learning_rate
    if not decay_lr:
        return 1.0
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    if step >= end:
        return least
    return least + (1 - least) * SCHEDULES[lr_schedule](step, end)


def loop(run, batches, evaluate):
    """Take a step, log, evaluate and save when that is due; until the last step or a signal."""
    bar = tqdm(total=max_iters, initial=run.step, disable=None if run.rank == 0 else True)
    if init_from not in ('scratch', 'resume'):
        assess(run, evaluate)
    while run.step < max_iters and not run.stop:
        began = time.perf_counter()
        loss, _, norm = one_step(run, batches, run.step)
        run.seconds += time.perf_counter() - began
        run.step += 1
        run.note(loss=loss)
        bar.update()
        if run.skipped:
            say(f'step {run.step}: loss {loss} or its gradient is not finite: skipped, '
                f'{run.skipped} in a row')
        if run.step % log_interval == 0:
            log_step(run, norm)
        if run.step % eval_interval == 0 or run.step == max_iters:
            assess(run, evaluate)
        if run.skipped >= MAX_SKIPS or run.skipped and run.step == max_iters:
            raise ValueError(f'{run.skipped} updates in a row not finite: lower --learning_rate '
                             'and --muon_lr; out_dir has the last good checkpoint, if any')
    bar.close()
    if run.stop:
        runs.save(run, 'ckpt.pt')
        say(f'stopped and saved after step {run.step}; {runs.how_to_resume(run)}')


def one_step(run, batches, step):
    """The updates of a step: one, or several that the stage separates by None
    -> loss, N and norm of the gradient of the last one"""
    result = None
    for is_update, microbatches in itertools.groupby(batches(step), lambda b: b is not None):
        if is_update:
            result = update(run, microbatches, step)
    return result or update(run, iter(()), step)


def update(run, microbatches, step):
    """
    Back-propagate the sum over every microbatch, then update the weights by the gradient of the
    mean over the N tokens in play in all processes. -> loss, N, norm of the gradient
    """
    total, in_play, size, micro = torch.zeros((), device=run.device), 0, 0, 0
    batch = next(microbatches, None)
    while batch is not None:
        x, y, w = batch
        in_play += int((y >= 0).sum())
        size += x.numel()
        rng = np.random.SeedSequence((seed, step, micro, run.rank))
        torch.manual_seed(int(rng.generate_state(1)[0]))    # dropout's
        batch, micro = next(microbatches, None), micro + 1
        with processes.exchange(run.network, on=batch is None):     # once an update
            _, loss = run.forward(run.network, x, y, w)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    sums = torch.tensor([total.item(), in_play, size, run.asked_to_stop], dtype=torch.float64)
    loss, in_play, size, run.stop = all_sum(sums)
    run.tokens += int(size)
    norm = apply_gradient(run, loss, in_play, schedule(step))
    return loss / max(in_play, 1), int(in_play), norm


def apply_gradient(run, loss, in_play, rate):
    """
    Divide the gradient by N, clip it, take an optimizer step. -> its norm. No step is taken with
    nothing in play (Muon turns zeros into a full-sized update), nor if the gradient is not finite.
    """
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    if not in_play:
        run.model.zero_grad(set_to_none=True)
        return 0.0
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    scale = run.world / in_play     # DistributedDataParallel has divided by run.world
    norm = processes.plain(torch.nn.utils.get_total_norm(grads)).item() * scale
    finite = math.isfinite(norm + loss)
    overflow = run.scaler.is_enabled() and math.isfinite(loss)  # fp16 is looking for its scale
    run.skipped = 0 if finite or overflow else run.skipped + 1
    if finite:
        clip = min(1.0, grad_clip / (norm + 1e-6)) if grad_clip else 1.0
        torch._foreach_mul_(grads, scale * clip)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = optimizer.defaults['lr'] * rate
            run.scaler.step(optimizer)
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    return norm


def log_step(run, norm):
    """Log and print means over the steps since the last line of the log."""
    losses, (seconds, tokens) = run.notes.pop('loss'), run.since
    seconds, rate = run.seconds - seconds, (run.tokens - tokens) / (run.seconds - seconds)
    run.since, left = (run.seconds, run.tokens), seconds / len(losses) * (max_iters - run.step) / 60
    if machine := extra('machine'):
        run.note(**machine.mfu(run, rate, block_size))
    means = torch.tensor([np.mean(values) for values in run.notes.values()])
    run.notes, names = {}, list(run.notes)
    notes = dict(zip(names, all_sum(means / run.world), strict=True))
    runs.log(run, loss=float(np.mean(losses)), norm=norm, lr=learning_rate * schedule(run.step - 1),
             tokens_per_second=rate, **notes)
    say(f'step {run.step}: loss {np.mean(losses):.4f}, {1e3 * seconds / len(losses):.0f} ms, '
        f'{rate:,.0f} tokens/s' + ''.join(f', {name} {value:.3g}' for name, value in notes.items())
        + f', {left:.1f} minutes left')


@torch.no_grad()
def assess(run, evaluate):
    """Evaluate, and write what is due then: a line of the log, checkpoints, picture, sample."""
    run.model.eval()
    metrics, score = evaluate()
    report = ', '.join(f'{name} {value:.4f}' for name, value in metrics.items())
    say(f'step {run.step}: {report}, after {run.seconds:.1f} s of training')
    if eval_only:
        return
    runs.log(run, **metrics)
    if score < run.best:
        run.best = score
        runs.save(run, 'best.pt')
    if always_save_checkpoint or run.best == score or run.step >= max_iters:
        runs.save(run, 'ckpt.pt')
    model = run.whole_model() if sample_tokens else None
    if run.rank == 0:
        show(run, model)
    run.model.train()


def show(run, model):
    """What a person looks at beside the numbers: the run's picture and a sample."""
    if plot := extra('plot'):
        folder, title = run.config['out_dir'], f'{stage} on {run.config["dataset"]}'
        plot.draw([folder], Path(folder, 'loss.png'), title)
    if sample_tokens:
        ids = generate(model, [run.tokenizer.begin], sample_tokens, seed=seed)[0]
        say('  | ' + run.tokenizer.decode(ids).replace('\n', '\n  | '))


def find_stage(values):
    """-> the module of a stage, None for one that reads rows. values: all settings by name"""
    name, folder = values['stage'], Path(__file__).with_name('stages')
    files = sorted(file.stem for file in folder.glob('[a-z]*.py'))
    known = [*TEXT_STAGES, 'sft', *files]
    if name not in known:
        raise ValueError(f'--stage={name}: no such stage; there are: {" ".join(known)}')
    return importlib.import_module(f'stages.{name}') if name in files else None


def other_settings(values):
    """Other sources of settings: the stage's file, the card's in a dry run, GPTConfig."""
    module, card = find_stage(values), extra('card') if values['dry_run'] else None
    lora = extra('lora') if values['lora_rank'] else None
    modules = [module, *getattr(module, 'USES', ()), card, lora]
    return [*(vars(module) for module in modules if module), GPTConfig]


def make_run(config, origin):
    """-> the Run, and the checkpoint that it resumes ({}: a new one)"""
    module = find_stage(config)
    kind = Stage(**module.stage()) if module else Stage(read_rows)
    runs.check(config, kind, SCHEDULES)
    rank, world, local_rank, where, precision = processes.join(device, dtype, backend)
    runs.choose_data(config, origin, local_rank)
    data = mixture_of(config['dataset'])
    meta = read_metas(data, check=not dry_run)
    model, known = models.make_model(config, origin, meta)
    resumed = init_from == 'resume' and bool(known)
    if resumed and dtype == 'auto':     # measured when it began; a busy machine may differ
        precision = getattr(torch, known['config'].get('dtype', 'auto'), precision)
    config['dtype'] = str(precision)[6:]
    if compile is None:
        config['compile'] = where.startswith('cuda')
    network = processes.prepare(model, config, where, precision, world)
    begun = dict(stage=stage, dataset=config['dataset'], init_from=init_from, data=meta['hashes'])
    return Run(
        config=config, stage=kind, device=where, dtype=precision, rank=rank, world=world,
        data=data, meta=meta, model=model, network=network,
        tokenizer=None if dry_run else Tokenizer(meta['tokenizer']),
        optimizers=model.configure_optimizers(
            weight_decay, learning_rate, (beta1, beta2), muon_lr,
            torch.bfloat16 if precision == torch.bfloat16 else torch.float32),
        scaler=torch.amp.GradScaler('cuda', enabled=precision == torch.float16,
                                    init_scale=2.0 ** 16 / (batch_size * block_size)),
        lineage=known.get('lineage', []) + [begun] * (not resumed),
    ), known if resumed else {}


def main():
    config, origin = configure(globals(), others=other_settings)
    try:
        run, resumed = make_run(config, origin)
        if card := extra('card'):
            card.show(run, origin)
        if dry_run:
            return
        runs.restore(run, resumed)
        if shard:
            from extras.shard import share_matrices
            share_matrices(run.optimizers)
        if run.model.config.n_expert:
            from extras.experts import balance
            balance(run)
        batches, evaluate = run.stage.start(run)
        if explain:
            from extras.explain import explain_batch
            return explain_batch(run, next(batches(run.step), None))
        if eval_only:
            return assess(run, evaluate)
        runs.open_folder(run, resumed=bool(resumed))
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, run.finish)
        loop(run, batches, evaluate)
        processes.leave(run)
    except (RuntimeError, MemoryError) as error:
        sys.exit(runs.out_of_memory(error, config))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    program(main)
