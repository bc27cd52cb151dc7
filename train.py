"""
The one training loop. Every stage of making a language model is weighted next-token prediction,

    loss = - sum of w * log p(y | x) / N      over the tokens in play (y != -1), N of them in a step,

so a stage is only a generator of (x, y, w) and a way to evaluate; the loop at the bottom knows no stage.

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
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import configure, read_settings
from data.files import DATA, Tokens, is_ready, read_meta
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from sample import auto_device, auto_dtype, generate, load_model, read_checkpoint

# what to do, from what, to where
stage = 'pretrain'           # where batches come from: pretrain or finetune (the same, from a model)
init_from = 'scratch'        # scratch, resume, a run's folder, gpt2[-medium|-large|-xl], or its folder
out_dir = 'out'              # where checkpoints, the log and the picture go
dataset = 'openwebtext'      # a folder in data/
fallback_dataset = ''        # instead of dataset, if that can be neither found nor downloaded
seed = 1337                  # all chance comes from (seed, step, microstep, rank)
eval_only = False            # evaluate once and stop
dry_run = False              # say what the run would take (parameters, FLOPs, memory) and stop
# evaluation and logging
eval_interval = 2000         # steps between evaluations
eval_iters = 200             # at most so many batches, spread over the validation data; 0: all of it
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
ngram_rows = 16384           # rows of the table that they are hashed into
vocab_multiple = 64          # rows of the token tables are rounded up to this
# the optimizers
learning_rate = 6e-4         # AdamW's peak
muon_lr: float = None        # Muon's peak, for the layers' matrices; 0: AdamW for all; None: 0.02
                             # from scratch, else what the model was trained with (GPT-2: AdamW)
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

FLOPS = {  # dense bf16 (fp16 before Ampere) peaks from the vendors' data sheets
    'B200': 2250e12, 'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
    'A10': 125e12, '5090': 210e12, '4090': 165e12, '3090': 71e12, 'V100': 125e12, 'T4': 65e12}
MAX_SKIPS = 5   # so many steps in a row without a finite gradient end the run


def pretrain(run):
    """Random windows of a token file; all of it is in play. -> batches(step), evaluate()"""
    train, val = Tokens(run.data, 'train'), Tokens(run.data, 'val')
    for tokens, split in (train, 'train'), (val, 'val'):
        if len(tokens) <= block_size:
            sys.exit(f'{run.data}: {len(tokens)} tokens in {split} are too few for a row of '
                     f'block_size={block_size}; make block_size smaller or the text longer')
    table = np.array(run.tokenizer.byte_lengths() + [0] * (read_meta(run.data)['vocab_size']))

    def batches(step):
        rng = np.random.default_rng((seed, step))
        rows = batch_size * gradient_accumulation_steps
        starts = rng.integers(len(train) - block_size, size=rows)[run.rank::run.world]
        for i in range(0, len(starts), batch_size):
            window = torch.from_numpy(train.windows(starts[i:i + batch_size], block_size + 1))
            yield window[:, :-1], window[:, 1:], None

    def evaluate():
        """Loss over non-overlapping windows, every target once; eval_iters caps the batches."""
        starts, repeats = val.cover(block_size)
        if eval_iters and eval_iters * batch_size < len(starts):
            chosen = np.linspace(0, len(starts) - 1, eval_iters * batch_size).astype(int)
            starts, repeats = starts[chosen], repeats[chosen]
        unit = batch_size * run.world           # the last batch is filled up with rows not in play
        starts, repeats = (np.append(a, np.full(-len(a) % unit, fill))
                           for a, fill in ((starts, 0), (repeats, block_size)))
        total = torch.zeros(3, dtype=torch.float64)
        for i in range(run.rank * batch_size, len(starts), unit):
            window = val.windows(starts[i:i + batch_size], block_size + 1)
            x, y = window[:, :-1], window[:, 1:].copy()
            y[np.arange(block_size) < repeats[i:i + batch_size, None]] = -1
            _, loss = run.forward(to_device(x, run), to_device(y, run))
            total += torch.tensor([loss.item(), (y >= 0).sum(), table[y[y >= 0]].sum()])
        loss, count, size = all_sum(total, run)
        metrics = {'val_loss': loss / count}
        if size:
            metrics['val_bits_per_byte'] = loss / size / math.log(2)
        return metrics, loss / count

    return batches, evaluate


STAGES = {'pretrain': pretrain, 'finetune': pretrain}


def to_device(array, run):
    tensor = torch.as_tensor(array)
    if run.device.startswith('cuda'):   # pinned, so that the copy overlaps with work on the GPU
        return tensor.pin_memory().to(run.device, non_blocking=True)
    return tensor.to(run.device)


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


def peak_flops(run):
    """FLOP/s that this machine could do: a GPU's from its data sheet, a CPU's measured; None if unknown."""
    if run.device.startswith('cuda'):
        name = torch.cuda.get_device_name(run.device)
        return next((peak for key, peak in FLOPS.items() if key in name), None)
    if run.device != 'cpu':
        return None
    a, seconds = torch.ones(1024, 1024, dtype=run.dtype), []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 ** 3 / min(seconds)


def find_data(run):
    """-> the data set's folder, prepared if it is small and was not; or the fallback's, said loudly."""
    global dataset, out_dir
    for name in filter(None, (dataset, fallback_dataset)):
        folder, script = DATA / name, DATA / name / 'prepare.py'
        if not folder.is_dir():
            there = ' '.join(sorted(p.name for p in DATA.iterdir() if (p / 'prepare.py').exists()))
            sys.exit(f'--dataset={name}: there is no folder data/{name}; there are: {there}')
        problem = f'data/{name} is not prepared: run python data/{name}/prepare.py'
        if not is_ready(folder) and not dry_run and script.exists() and run.local_rank == 0:
            prepare = getattr(import_module(f'data.{name}.prepare'), 'prepare', None)
            try:
                if prepare:     # the large ones have none: they are prepared by hand
                    prepare()
            except (OSError, ValueError) as error:
                problem = f'data/{name}: {error}'
        if run.world > 1:
            dist.barrier()
        if is_ready(folder) or dry_run:
            if name != dataset:
                out_dir = out_dir.replace(dataset.replace('_', '-'), name.replace('_', '-'))
                run.say(f'!!! NOT {dataset.upper()}: TRAINING ON {name.upper()} INSTEAD, in {out_dir}')
                dataset = name
            return folder
        run.say(problem)
    sys.exit(problem)


def make_model(run, vocab_size):
    """-> model, its checkpoint or {}: from scratch, or loaded, with what the settings may still change."""
    if init_from == 'resume':
        path = Path(out_dir, 'ckpt.pt')
        if path.exists():
            model, _, checkpoint = load_model(str(path), dropout=dropout)
            return model, checkpoint
        run.say(f'{out_dir}: nothing saved yet, starting from scratch')
    elif init_from != 'scratch':
        model, tokenizer, checkpoint = load_model(init_from, dropout=dropout)
        if tokenizer.spec != run.tokenizer.spec:
            sys.exit(f'{init_from} and data/{dataset} do not have the same tokenizer')
        if block_size > model.config.block_size:
            sys.exit(f'--block_size={block_size}: {init_from} was made for {model.config.block_size}')
        return model, {'config': checkpoint.get('config', {}), 'lineage': checkpoint['lineage']}
    args = {f.name: globals()[f.name] for f in fields(GPTConfig) if f.name in globals()}
    return GPT(GPTConfig(**args, vocab_size=vocab_size)), {}


def activation_bytes(config):
    """What one microbatch keeps for its backward pass, from a forward pass without numbers (fp32)."""
    with torch.device('meta'):
        model, kept = GPT(config), {}
        idx = torch.zeros(batch_size, min(block_size, config.block_size), dtype=torch.long)
    own = {id(p) for p in model.parameters()}

    def keep(tensor):
        if id(tensor) not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = model(idx, idx)     # storages must not be freed (and counted twice) before the end
    return sum(kept.values()) if alive else 0


def preflight(run, config):
    """Say what this run is going to take, before it takes it."""
    with torch.device('meta'):
        model = GPT(config)
    count, flops = model.num_params(), model.flops_per_token()
    step_tokens = batch_size * gradient_accumulation_steps * block_size
    state = sum(4 * p.numel() * (1 if run.muon_lr and '.h.' in name and p.dim() == 2 else 2)
                for name, p in model.named_parameters())
    work = activation_bytes(config) * (1 if run.dtype == torch.float32 else 0.6)
    train_tokens = read_meta(run.data).get('counts', {}).get('train')
    epochs = f'{max_iters * step_tokens / train_tokens:.2f} epochs of {train_tokens:,} tokens' \
        if train_tokens else 'data not prepared yet'
    run.say(f"""{stage} on {dataset} from {init_from}, into {out_dir}
  model       {count / 1e6:.2f}M parameters ({config.n_layer} layers, {config.n_embd} wide), \
{flops / 1e6:.1f} MFLOPs per token
  a step      {step_tokens:,} tokens: {gradient_accumulation_steps} x {batch_size} rows of {block_size}
  the run     {max_iters:,} steps, {max_iters * step_tokens:,} tokens, {epochs}, \
{flops * max_iters * step_tokens:.2e} FLOPs
  memory      about {(8 * count + state + work) / 1e9:.2f} GB ({8 * count / 1e9:.2f} weights and \
gradients, {state / 1e9:.2f} optimizer, {work / 1e9:.2f} activations)
  checkpoint  {(4 * count + state) / 1e6:.0f} MB, written twice
  machine     {run.device}, {str(run.dtype).removeprefix('torch.')}, compile={run.compile}, \
{run.world} process(es), {'Muon and AdamW' if run.muon_lr else 'AdamW'}""")


def save(run, path, step, best, seconds):
    """Write a checkpoint under a temporary name, flush it, rename it: path is whole at every moment."""
    content = {
        'model': run.model.state_dict(), 'optimizer': [o.state_dict() for o in run.optimizers],
        'scaler': run.scaler.state_dict(), 'model_args': asdict(run.model.config),
        'config': run.config, 'iter_num': step, 'best_val_loss': best, 'seconds': seconds,
        'tokenizer': run.tokenizer.spec, 'lineage': run.lineage}
    temporary = path.with_suffix('.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        sys.exit(f'{path}: cannot be written ({str(error).splitlines()[0]}); the checkpoint before it, '
                 'if there is one, is intact. Make room and go on with --init_from=resume')


def plot(log, path):
    """Redraw the losses in log.jsonl."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4))
    for key, style in ('loss', '-'), ('val_loss', 'o-'):
        points = [(line['step'], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), style, label=key, markersize=3, linewidth=1)
    axes.set(title=f'{stage} on {dataset}', xlabel='step', ylabel='loss (nats per token)')
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches='tight')
    plt.close(figure)


def setup():
    """Check the settings against the machine and each other; -> run, which holds what is not a setting."""
    run = SimpleNamespace(rank=int(os.environ.get('RANK', 0)), world=int(os.environ.get('WORLD_SIZE', 1)),
                          local_rank=int(os.environ.get('LOCAL_RANK', 0)), stop=False)
    run.say = (lambda text: tqdm.write(text, file=sys.stdout)) if run.rank == 0 else (lambda text: None)
    if stage not in STAGES:
        sys.exit(f'--stage={stage}: no such stage; there are: {" ".join(STAGES)}')
    for name in ('batch_size', 'gradient_accumulation_steps', 'block_size', 'eval_interval', 'log_interval',
                 'n_layer', 'n_head', 'n_embd', 'learning_rate'):
        if globals()[name] <= 0:
            sys.exit(f'--{name}={globals()[name]}: must be greater than 0')
    if batch_size * gradient_accumulation_steps % run.world:
        sys.exit(f'--batch_size={batch_size} x --gradient_accumulation_steps={gradient_accumulation_steps} rows do '
                 f'not divide among {run.world} processes')
    if init_from != 'resume' and not eval_only and not dry_run and init_from != 'scratch' \
            and Path(init_from).resolve() == Path(out_dir).resolve():
        sys.exit(f'--out_dir={out_dir} is the run that --init_from reads; choose another out_dir')
    run.device = auto_device(device, run.local_rank)
    run.dtype = auto_dtype(dtype, run.device)
    run.compile = run.device.startswith('cuda') if compile is None else compile
    if run.world > 1:
        dist.init_process_group(backend or ('nccl' if run.device.startswith('cuda') else 'gloo'))
    if run.device.startswith('cuda'):
        torch.cuda.set_device(run.device)
    torch.set_float32_matmul_precision('high')
    run.data = find_data(run)
    return run


def one_step(run, batches, step):
    """
    Back-propagate the sum over every microbatch, divide once by N, update. -> loss, N, norm of the gradient.
    Without a finite gradient, or with nothing in play, the weights stay as they are.
    """
    total = torch.zeros((), device=run.device)
    count, micro, following = 0, 0, iter(batches(step))
    batch = next(following)
    while batch is not None:
        x, y, w = batch
        count += int((y >= 0).sum())
        torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, run.rank)).generate_state(1)[0]))
        batch, micro = next(following, None), micro + 1
        last = contextlib.nullcontext() if batch is None or run.world == 1 else run.network.no_sync()
        with last:      # processes exchange gradients once a step
            _, loss = run.forward(to_device(x, run), to_device(y, run), w if w is None else to_device(w, run))
            run.scaler.scale(loss).backward()
        total += loss.detach()
    loss, count, stop = all_sum(torch.tensor([total.item(), count, run.stop], dtype=torch.float64), run)
    run.stop = stop > 0         # all processes stop after the same step
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    scale = run.world / max(count, 1)               # DDP has divided by run.world
    norm = torch.nn.utils.get_total_norm(grads).item() * scale
    if count and math.isfinite(norm) and math.isfinite(loss):
        torch._foreach_mul_(grads, scale * min(1.0, grad_clip / (norm + 1e-6)) if grad_clip else scale)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = optimizer.peak_lr * schedule(step)
            run.scaler.step(optimizer)
        run.skipped = 0
    elif count:
        run.skipped += 1
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    return loss / max(count, 1), int(count), norm


def loop(run, batches, evaluate, first, best, seconds):
    """The loop: evaluate and save when due, else one step. -> the last step."""
    folder = Path(out_dir)
    step_tokens = batch_size * gradient_accumulation_steps * block_size
    peak, flops = peak_flops(run), run.model.flops_per_token()
    bar = tqdm(total=max_iters, initial=first, disable=run.rank > 0 or not sys.stdout.isatty())
    logged, losses, began = seconds, [], seconds

    def log(step, **metrics):
        if run.rank:
            return
        record = dict(step=step, tokens=step * step_tokens, seconds=round(seconds, 3), **metrics)
        with open(folder / 'log.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps(record) + '\n')
        if run.wandb:
            run.wandb.log(record)

    for step in range(first, max_iters + 1):
        fresh = step == first and init_from in ('scratch', 'resume')
        if eval_only or step == max_iters or (step % eval_interval == 0 and not fresh):
            run.model.eval()
            with torch.no_grad():
                metrics, score = evaluate()
            run.say(f'step {step}: ' + ', '.join(f'{k} {v:.4f}' for k, v in metrics.items())
                    + f', after {seconds:.1f} s of training')
            if not eval_only:
                log(step, **metrics)
                improved, best = score < best, min(score, best)
                if run.rank == 0:
                    if sample_tokens:
                        prompt = [run.tokenizer.end or 0]
                        text = generate(run.model, [prompt], sample_tokens, seed=seed)[0]
                        run.say('  | ' + run.tokenizer.decode(text).replace('\n', '\n  | '))
                    if improved:
                        save(run, folder / 'best.pt', step, best, seconds)
                    if improved or always_save_checkpoint or step == max_iters:
                        save(run, folder / 'ckpt.pt', step, best, seconds)
                    plot(folder / 'log.jsonl', folder / 'loss.png')
            run.model.train()
        if run.stop:
            if run.rank == 0:
                save(run, folder / 'ckpt.pt', step, best, seconds)
            arguments = [a for a in sys.argv[1:] if not a.startswith('--init_from')]
            run.say(f'stopped and saved after step {step}; to go on: python train.py '
                    f'{shlex.join(arguments)} --init_from=resume')
        if eval_only or run.stop or step == max_iters:
            break
        start = time.perf_counter()
        loss, count, norm = one_step(run, batches, step)
        seconds += time.perf_counter() - start
        losses.append(loss)
        bar.update()
        if run.skipped:
            run.say(f'step {step + 1}: loss {loss} or its gradient is not finite, skipped ({run.skipped} in a row)')
        if run.skipped >= MAX_SKIPS:
            sys.exit(f'{MAX_SKIPS} steps in a row without a finite gradient: lower --learning_rate and --muon_lr, or '
                     f'use --dtype=float32; the last good checkpoint is {folder}/ckpt.pt')
        if (step + 1) % log_interval == 0:
            rate = len(losses) * step_tokens / (seconds - logged)
            loss = float(np.mean(losses))
            mfu = flops * rate / peak / run.world if peak else None
            log(step + 1, loss=loss, norm=norm, rate=schedule(step), tokens_per_second=round(rate), mfu=mfu)
            run.say(f'step {step + 1}: loss {loss:.4f}, {1e3 * step_tokens / rate:.0f} ms, {rate:,.0f} tokens/s'
                    + (f', {mfu:.0%} of peak' if peak else ''))
            logged, losses = seconds, []
        if step + 1 == first + 10:
            run.say(f'about {(seconds - began) / 10 * (max_iters - step - 1) / 60:.1f} minutes left')
    bar.close()
    return step


def main():
    configure(globals())
    run = setup()
    run.config = {name: globals()[name] for name in read_settings(__file__)}
    meta = read_meta(run.data)
    if dry_run and not is_ready(run.data):
        run.say(f"data/{dataset} is not prepared: GPT-2's vocabulary is assumed")
    try:
        run.tokenizer = None if dry_run else Tokenizer(meta['tokenizer'])
        torch.manual_seed(seed)
        model, checkpoint = make_model(run, meta['vocab_size'])
        run.muon_lr = muon_lr
        if muon_lr is None:
            run.muon_lr = checkpoint['config'].get('muon_lr', 0.0) if checkpoint else 0.02
        run.config['muon_lr'] = run.muon_lr
        preflight(run, model.config)
        if dry_run:
            return
        train(run, model, checkpoint)
    except (ValueError, OSError) as error:
        sys.exit(f'{error}')
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if 'memory' not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit(f'out of memory: halve --batch_size={batch_size} and double '
                 f'--gradient_accumulation_steps={gradient_accumulation_steps}: the same step in less memory')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare_folder(run, folder, first, resumed):
    """Make out_dir ready: move an older run aside, or cut a resumed run's log back to its checkpoint."""
    log = folder / 'log.jsonl'
    if resumed:
        lines = log.read_text(encoding='utf-8').splitlines() if log.exists() else []
        kept = [line for line in lines if line.endswith('}') and json.loads(line)['step'] <= first]
        log.write_text(''.join(line + '\n' for line in kept), encoding='utf-8')
        return
    if (folder / 'ckpt.pt').exists():
        aside = next(p for p in (Path(f'{folder}.{n}') for n in range(1, 10 ** 6)) if not p.exists())
        folder.rename(aside)
        run.say(f'{folder} holds a run already: moved to {aside}')
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text('')


def train(run, model, checkpoint):
    """Build what the loop needs around a model, and run it."""
    run.model = model.to(run.device)
    run.optimizers = run.model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), run.muon_lr,
                                                    torch.float32 if run.dtype == torch.float32 else torch.bfloat16)
    run.scaler = torch.amp.GradScaler('cuda', init_scale=2.0 ** 16 / (batch_size * block_size),
                                      enabled=run.dtype == torch.float16)
    resumed = 'optimizer' in checkpoint
    if resumed:
        states = checkpoint['optimizer']
        for optimizer, state in zip(run.optimizers, states if isinstance(states, list) else [states], strict=True):
            optimizer.load_state_dict(state)
        run.scaler.load_state_dict(checkpoint.get('scaler', {}))
    run.network = torch.compile(run.model) if run.compile else run.model
    if run.world > 1:
        run.network = torch.nn.parallel.DistributedDataParallel(
            run.network, device_ids=[run.local_rank] if run.device.startswith('cuda') else None)

    def forward(x, y, w=None):
        if run.dtype == torch.float32:
            return run.network(x, y, w)
        with torch.autocast(run.device.split(':')[0], run.dtype):
            return run.network(x, y, w)

    run.forward, run.skipped, run.wandb = forward, 0, None
    run.lineage = checkpoint.get('lineage', []) if resumed else checkpoint.get('lineage', []) + [
        {'stage': stage, 'dataset': dataset, 'init_from': init_from, 'data': read_meta(run.data).get('sha256')}]
    folder, first = Path(out_dir), checkpoint.get('iter_num', 0) if resumed else 0
    batches, evaluate = STAGES[stage](run)
    if run.rank == 0 and not eval_only:
        prepare_folder(run, folder, first, resumed)
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda *_: setattr(run, 'stop', True))
    loop(run, batches, evaluate, first, checkpoint.get('best_val_loss', math.inf), checkpoint.get('seconds', 0.0))


if __name__ == '__main__':
    main()
