"""
The one training loop. Every stage of making a language model is weighted next-token prediction,

    loss = - sum of w * log p(y | x) / N      over the N tokens in play (y != -1) of a step,

so a stage is only a generator of (x, y, w) and a way to evaluate; the loop below knows no stage.

    python train.py config/train_shakespeare_char.py                                # a laptop
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py          # eight GPUs
"""
import contextlib
import copy
import hashlib
import itertools
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

from assets.picture import picture
from configurator import configure, read_settings
from data.files import cut_log, find, fresh_folder, mixture_of, read_meta, tasks_of, write
from data.rows import Conversations, Mixture, side_by_side
from data.tokenizer import Tokenizer, Voice
from model import GPT, GPT2, GPT2_SIZES, GPTConfig, widened
from sample import (
    TEXT_STAGES,
    ask,
    auto_device,
    auto_dtype,
    folder_of,
    generate,
    load_model,
    out_of_memory,
    peak_flops,
)

# what to do, from what, to where
stage = 'pretrain'           # pretrain, finetune (the same), sft, rl, dpo or distill
init_from = 'scratch'        # scratch, resume, a run's folder, gpt2[-medium|-large|-xl]
out_dir = 'out'              # where checkpoints, the log and the picture go
dataset = 'openwebtext'      # a folder in data/, or a mixture: a:0.8,b:0.2
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
x0 = True                    # each block sees the embedding again, as much as it learns to want
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
# the stages that need more than a data set
num_prompts = 16             # questions in a step of rl, over all processes together
num_samples = 8              # answers to each: a group
max_new_tokens = 120         # tokens in an answer
rollout_rows = 64            # answers that are written side by side
updates = 1                  # of the weights for each rollout; from the second on with clip_ratio
clip_ratio = 0.2             # how far a token's probability may go before it no longer counts
divide_by_deviation = False  # of a group; overrates what is hardly ever solved (arXiv:2503.20783)
eval_examples = 200          # held-out questions, answered greedily
dpo_beta = 0.1               # how soon a pair counts as told apart
teacher = ''                 # the run to distill from
teacher_top = 16             # targets for a token: so many of the teacher's likeliest
on_policy = True             # distill from the student's own answers; False: from the data set
explain = False              # print a batch, each token with its target, weight and loss, and stop
# the machine
device = 'auto'              # cuda, cuda:1, mps or cpu
dtype = 'auto'               # float32, bfloat16 or float16; auto: what is fastest here
compile: bool = None         # torch.compile; None: on CUDA, where it pays
backend = ''                 # of torch.distributed; '': nccl on CUDA, else gloo

MAX_SKIPS = 5   # so many steps in a row without a finite gradient end the run
LEAST = dict(
    batch_size=1, gradient_accumulation_steps=1, block_size=1, max_iters=1, eval_interval=1,
    log_interval=1, learning_rate=1e-9, seed=0, eval_iters=0, grad_clip=0, warmup_iters=0,
    sample_tokens=0, weight_decay=0, muon_lr=0, num_prompts=1, num_samples=1, max_new_tokens=1,
    rollout_rows=1, updates=1, clip_ratio=0, eval_examples=1, dpo_beta=0, teacher_top=1)


def read(run):
    """
    Rows of a data set, each once an epoch: all of a text is in play, of conversations what the
    assistant had to write (in pretrain and finetune all of them too). -> batches(step), evaluate()
    """
    train, val = (Mixture(run.data, split, block_size + 1, run.model.config.vocab_size,
                          packed=stage not in TEXT_STAGES)
                  for split in ('train', 'val'))
    say_cuts(run, train, val)

    def batches(step):
        """A step's microbatches (x, y, w) for this process, of rows shared out among all."""
        count = batch_size * gradient_accumulation_steps
        numbers = np.arange(step * count, (step + 1) * count)[run.rank::run.world]
        for i in range(0, len(numbers), batch_size):
            x, y = train.rows(numbers[i:i + batch_size], seed)
            yield torch.from_numpy(x), torch.from_numpy(y), None

    def held_out(source):
        """Every held-out target of a data set once, in at most eval_iters batches."""
        count = source.held_out()
        numbers = np.arange(count)
        if 0 < eval_iters * batch_size < count:
            numbers = np.linspace(0, count - 1, eval_iters * batch_size).astype(int)
        unit = batch_size * run.world           # the last batch is filled up, with rows not in play
        numbers = np.append(numbers, np.full(-len(numbers) % unit, -1))
        for i in range(run.rank * batch_size, len(numbers), unit):
            some = numbers[i:i + batch_size]
            x, y = map(torch.from_numpy, source.held_out_rows(some.clip(min=0)))
            y[torch.from_numpy(some) < 0] = -1
            yield x, y, None

    def evaluate():
        """Of a mixture: the losses of its parts, weighed by their shares."""
        found = [validation_loss(run, held_out(source)) for source in val.sources]
        metrics = {name: float(np.dot(val.shares, [part[name] for part in found]))
                   for name in found[0]}
        parts = zip(run.data, found, strict=True) if len(found) > 1 else ()
        metrics.update({f'val_loss_{folder.name}': part['val_loss'] for folder, part in parts})
        return metrics, metrics['val_loss']

    return batches, evaluate


def validation_loss(run, batches):
    """Mean loss over the tokens in play in all processes' batches. -> metrics"""
    bytes_of = torch.tensor(run.tokenizer.byte_lengths() + [0] * run.model.config.rows)
    total = torch.zeros(3, dtype=torch.float64)
    for x, y, w in batches:
        loss = forward(run, run.network, x, y, w)[1].item()
        total += torch.tensor([loss, (y >= 0).sum(), bytes_of[y[y >= 0]].sum()])
    loss, count, size = all_sum(total, run)
    if not count:
        raise ValueError(f'--dataset={dataset}: nothing in its validation data is in play')
    return {'val_loss': loss / count, 'val_bits_per_byte': loss / max(size, 1) / math.log(2)}


def say_cuts(run, *splits):
    cut = sum(split.cut for split in splits)
    if cut:
        run.say(f'{cut} conversations are longer than --block_size={block_size}: cut')


def rl(run):
    """
    Group-relative policy gradient on a task's reward: what the model wrote is in play, and a token
    weighs its answer's reward less the mean of its group (arXiv:2402.03300). -> batches, evaluate
    """
    if num_samples < 2:
        raise ValueError(f'--num_samples={num_samples}: answers are compared, ask for 2 or more')
    task, start = tasks_of(run.data), frozen(run, run.lineage[-1]['init_from'])

    def batches(step):
        requests, rewards = rollouts(run, task, step)
        advantage = rewards - rewards.mean(1, keepdims=True)
        if divide_by_deviation:
            advantage /= rewards.std(1, keepdims=True) + 1e-6
        alive = np.repeat(np.ptp(rewards, 1) > 0, num_samples)  # a group of equals teaches nothing
        texts = [written(request, weight) for request, weight, lives
                 in zip(requests, advantage.flatten(), alive, strict=True) if lives]
        rows = list(microbatches(run, once_each(run, texts)))
        note(run, dead_groups=1 - alive.mean())
        if (step + 1) % log_interval == 0:
            one_each = [written(request, 1) for request in requests[::num_samples]]
            note(run, kl=distance(run, start, one_each))
        before = [log_p(run, run.model, x, y) for x, y, _ in rows] if updates > 1 else []
        for update in range(updates):
            for i, (x, y, w) in enumerate(rows):
                if update:      # the policy has moved since it wrote
                    w = clipped(w, (log_p(run, run.model, x, y) - before[i]).exp())
                yield x, y, w
            yield None

    return batches, lambda: accuracy(run, task)


def rollouts(run, task, step):
    """
    The model's own answers to fresh questions of a task, at temperature 1 and from its whole
    distribution: another one would not be the policy that is scored.
    -> requests, rewards: (questions, num_samples)
    """
    asked = list(itertools.islice(task.examples('train', f'{seed} {step}'), num_prompts))
    if len(asked) < num_prompts:
        raise ValueError(f'--dataset={dataset} has only {len(asked)} questions to train on')
    chances = np.random.SeedSequence((seed, step)).generate_state(num_prompts).tolist()
    mine, began = slice(run.rank, None, run.world), time.perf_counter()
    asked = asked[mine]
    requests, rewards = ask(speaker(run), run.tokenizer, task, asked, chances[mine], rollout_rows,
                            num_samples, max_new_tokens)
    note(run, rollout_seconds=time.perf_counter() - began, reward=np.mean(rewards),
         entropy=-np.mean([p for request in requests for p in request.logprobs if p is not None]),
         truncated=np.mean([request.reason == 'length' for request in requests]),
         answer_length=np.mean([len(request.ids) for request in requests]))
    return requests, np.array(rewards).reshape(len(asked), num_samples)


def once_each(run, texts):
    """
    Texts that are the very same are read once, with the sum of their weights: that is the same
    gradient in half of the time. N would have counted them all, so a share makes up for it.
    """
    same = {}
    for text in texts:
        same.setdefault((text[0].tobytes(), text[1].tobytes()), []).append(text)
    once = [(*some[0][:2], sum(weight for *_, weight in some)) for some in same.values()]
    sizes = [float(sum(in_play.sum() for _, in_play, _ in some)) for some in (once, texts)]
    read, there = all_sum(torch.tensor(sizes), run)
    return [(ids, in_play, weight * read / max(1, there)) for ids, in_play, weight in once]


def speaker(run):
    """The model as it answers: in this run's precision, so that its cache takes no more."""
    return run.model if run.dtype == torch.float32 else copy.deepcopy(run.model).to(run.dtype)


def clipped(w, ratio):
    """
    The weight that gives the gradient of PPO's clipped objective (arXiv:1707.06347), min(r w,
    clip(r) w): it is r w, but 0 where the ratio r of the probabilities has gone far enough.
    """
    far = torch.where(w.to(ratio) > 0, ratio > 1 + clip_ratio, ratio < 1 - clip_ratio)
    return (ratio * w.to(ratio)).masked_fill(far, 0.0)


def accuracy(run, task):
    """The mean reward of greedy answers to the same held-out questions each time."""
    asked = list(itertools.islice(task.examples('val'), eval_examples))
    if not asked:
        raise ValueError(f'--dataset={dataset} has no questions to validate on')
    mine = asked[run.rank::run.world]
    requests, rewards = ask(speaker(run), run.tokenizer, task, mine, range(len(mine)),
                            rollout_rows, most=max_new_tokens, temperature=0.0)
    if mine:
        question = task.conversation(mine[0])[-2]['content']
        answer = Voice(run.tokenizer).hear(requests[0].ids, last=True)
        run.say(f'  > {question}\n  | {answer}'.replace('\n', '\n  | '))
    folders = [folder for folder, _ in asked]
    parts = list(dict.fromkeys(folders))
    right = torch.zeros(len(parts))
    for (folder, _), reward in zip(mine, rewards, strict=True):
        right[parts.index(folder)] += reward
    right = all_sum(right, run)
    metrics = {'accuracy': sum(right) / len(asked)}
    if len(parts) > 1:
        metrics |= {f'accuracy_{Path(folder).name}': count / folders.count(folder)
                    for folder, count in zip(parts, right, strict=True)}
    return metrics, -metrics['accuracy']


def dpo(run):
    """
    Direct preference optimization (arXiv:2305.18290) on pairs of conversations, the chosen one and
    then the rejected one. Its loss is -log sigmoid(m), m = beta * (log-ratio of the chosen one to
    the start - that of the rejected one), and the gradient beta * sigmoid(-m) times the gradient of
    log p(rejected) - log p(chosen): a weight. -> batches(step), evaluate()
    """
    start = frozen(run, run.lineage[-1]['init_from'])
    folder, vocabulary = one_of(run.data), run.model.config.vocab_size
    train, val = (Conversations(folder, split, block_size + 1, vocabulary)
                  for split in ('train', 'val'))
    few, count = max(1, batch_size // 2), max(1, batch_size * gradient_accumulation_steps // 2)
    say_cuts(run, train, val)
    if len(train.spans) % 2 or len(val.spans) % 2:
        raise ValueError(f'--dataset={dataset}: pairs come in twos, and a number of texts is odd')
    if count % run.world:
        raise ValueError(f'{count} pairs in a step do not divide among {run.world} processes')

    def texts(split, pairs):
        return [(*split.conversation(2 * pair + i), 1.0) for pair in pairs for i in (0, 1)]

    def scores(model, split, pairs):
        """-> log p of both texts of each pair: (pairs, 2)"""
        found = []
        for i in range(0, len(pairs), few):
            x, y, _ = as_rows(texts(split, pairs[i:i + few]))
            found.append(log_p(run, model, x, y).sum(1).view(-1, 2))
        return torch.cat(found)

    known = {split: scores(start, split, range(len(split.spans) // 2)) for split in (train, val)}

    def margins(split, pairs):
        grown = scores(run.model, split, pairs) - known[split][pairs]
        return dpo_beta * (grown[:, 0] - grown[:, 1])

    def batches(step):
        epochs, places = np.divmod(np.arange(step * count, (step + 1) * count), len(known[train]))
        orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(known[train]))
                  for epoch in set(epochs.tolist())}
        pairs = [int(orders[epoch][place]) for epoch, place in zip(epochs, places, strict=True)]
        in_play = sum(mask.sum() for _, mask, _ in texts(train, pairs))
        mine = pairs[run.rank::run.world]
        for i in range(0, len(mine), few):
            x, y, _ = as_rows(texts(train, mine[i:i + few]))
            m = margins(train, mine[i:i + few])
            push = dpo_beta * torch.sigmoid(-m) * in_play / count   # a mean over pairs, not tokens
            note(run, reward_gap=m.mean(), pairs_right=(m > 0).float().mean())
            yield x, y, torch.stack((push, -push), 1).view(-1, 1).expand(y.shape)

    def evaluate():
        m = margins(val, list(range(len(known[val]))))
        loss = -nn.functional.logsigmoid(m).mean().item()
        return {'val_loss': loss, 'reward_gap': m.mean().item(),
                'pairs_right': (m > 0).float().mean().item()}, loss

    return batches, evaluate


def distill(run):
    """
    Learn from a teacher. On policy: the student's own answers, each token weighing how much
    likelier the teacher finds it: the gradient of the reverse KL by token (arXiv:2306.13649).
    Else: each token of a data set has the teacher's likeliest ones as targets (arXiv:1503.02531).
    """
    guide = frozen(run, teacher)
    if on_policy:
        task = tasks_of(run.data)

        def own(step):
            requests, _ = rollouts(run, task, step)
            for x, y, _ in microbatches(run, [written(request, 1) for request in requests]):
                yield x, y, log_p(run, guide, x, y) - log_p(run, run.model, x, y)

        return own, lambda: accuracy(run, task)
    if teacher_top > guide.config.vocab_size:
        raise ValueError(f'--teacher_top={teacher_top}: there are {guide.config.vocab_size} tokens')
    given, evaluate = read(run)

    def soft(step):
        for x, y, _ in given(step):
            with torch.no_grad():
                p, ids = forward(run, guide, x)[0].float().softmax(-1).topk(teacher_top)
            ids[y < 0] = -1
            yield x, ids, teacher_top * p / p.sum(-1, keepdim=True)     # N counts all of the ids

    return soft, evaluate


def talks():
    """Whether this stage learns from what the model itself writes."""
    return stage == 'rl' or (stage == 'distill' and on_policy)


# A stage gives batches(step), which yields (x, y, w), and evaluate() -> metrics, score to lower.
# Where it yields None, the weights are updated before the step goes on.
STAGES = {'pretrain': read, 'finetune': read, 'sft': read, 'rl': rl, 'dpo': dpo, 'distill': distill}


def frozen(run, source):
    """
    A model that does not learn: a teacher, or what this run started from. Its weights are recorded
    by their hash, so that no resumed run goes on with others. Weights w come from passes without
    gradient, where a token dropped by chance would make them those of another model.
    """
    if dropout:
        raise ValueError(f'--dropout={dropout}: must be 0 in stage {stage}')
    if source in ('', 'scratch'):
        raise ValueError(f'--stage={stage} needs a run that has learned something: --init_from= or '
                         '--teacher=')
    if folder_of(source).resolve() == Path(out_dir).resolve():
        raise ValueError(f'--out_dir={out_dir} is the run that --teacher reads: choose another')
    model, _ = load_fitting(run, source)
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy().tobytes())
    if run.lineage[-1].setdefault('frozen', digest.hexdigest()) != digest.hexdigest():
        raise ValueError(f'{source} is not the model that this run began with')
    return model.to(run.device).eval()


@torch.no_grad()
def log_p(run, model, x, y):
    """-> log p(y | x) under a model, 0 where y is not in play: (B, T)"""
    logits = forward(run, model, x)[0].float()
    return -nn.functional.cross_entropy(logits.transpose(1, 2), y.to(logits.device),
                                        ignore_index=-1, reduction='none')


def distance(run, start, texts):
    """How far the policy is from the start: log p - log p_start, mean over tokens it sampled."""
    total = torch.zeros(2)
    for x, y, _ in microbatches(run, texts):
        far = log_p(run, run.model, x, y) - log_p(run, start, x, y)
        total += torch.tensor([far.sum().item(), (y >= 0).sum()])
    return (total[0] / total[1]).item()


def written(request, weight):
    """A request -> ids, in play, weight: in play is what the model itself sampled."""
    return np.array(request.prompt + request.ids), np.array(request.in_play), weight


def as_rows(texts):
    """Texts as (ids, in play, weight) -> x, y, w: (B, T)"""
    return tuple(map(torch.from_numpy, side_by_side(texts)))


def microbatches(run, texts):
    """Texts as (ids, in play, weight), of like lengths together; as many in every process."""
    texts = sorted(texts, key=lambda text: len(text[0]))
    count = torch.tensor(-(-len(texts) // batch_size))
    if run.world > 1:
        count = count.to(run.device if dist.get_backend() == 'nccl' else 'cpu')
        dist.all_reduce(count, dist.ReduceOp.MAX)
    for i in range(0, int(count) * batch_size, batch_size):
        yield as_rows(texts[i:i + batch_size] or [([0, 0], [False] * 2, 0)])


def note(run, **values):
    """Keep a stage's numbers for the next line of the log, which has the means of all processes."""
    for name, value in values.items():
        run.notes.setdefault(name, []).append(float(value))


def one_of(parts):
    """-> the one folder of run.data, for a stage that takes no mixture"""
    if len(parts) > 1:
        raise ValueError(f'--stage={stage} takes one data set, not the mixture {dataset}')
    return next(iter(parts))


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
    """The updates of a step, mostly a single one. -> what the last one gives"""
    result = None
    for there, update in itertools.groupby(batches(step), lambda batch: batch is not None):
        if there:       # between them, None
            result = one_update(run, update, step)
    return result or one_update(run, [], step)


def one_update(run, update, step):
    """
    Back-propagate the sum over every microbatch, divide once by N, update. -> loss, N, norm of the
    gradient. Without a finite gradient, or with nothing in play, the weights stay as they are.
    """
    total, count, size, micro = torch.zeros((), device=run.device), 0, 0, 0
    following = iter(update)
    batch = next(following, None)
    while batch is not None:
        x, y, w = batch
        count += int((y >= 0).sum())
        size += x.numel()
        chance = np.random.SeedSequence((seed, step, micro, run.rank)).generate_state(1)
        torch.manual_seed(int(chance[0]))       # dropout's
        batch, micro = next(following, None), micro + 1
        last = batch is None or run.world == 1  # processes exchange their gradients once an update
        with contextlib.nullcontext() if last else run.network.no_sync():
            _, loss = forward(run, run.network, x, y, w)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    sums = torch.tensor([total.item(), count, size, run.asked_to_stop], dtype=torch.float64)
    loss, count, size, run.stop = all_sum(sums, run)    # so that all stop after the same step
    run.tokens += int(size)
    scale = run.world / max(count, 1)           # DistributedDataParallel has divided by run.world
    if count:
        for optimizer in run.optimizers:
            run.scaler.unscale_(optimizer)
    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
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
    if count:
        run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    return loss / max(count, 1), int(count), norm


def forward(run, network, *batch):
    """A network's forward in this run's precision; what is not on the device yet goes there."""
    if run.device.startswith('cuda'):   # pinned, so that the copy overlaps the GPU's work
        batch = [t.pin_memory() if t is not None and not t.is_cuda else t for t in batch]
    batch = [t if t is None else t.to(run.device, non_blocking=True) for t in batch]
    with torch.autocast(run.device.split(':')[0], run.dtype, run.dtype != torch.float32):
        return network(*batch)


def loop(run, batches, evaluate):
    """The loop: evaluate and save when it is due, else one step."""
    first, losses, logged = run.step, [], (run.seconds, run.tokens)
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
            seconds, tokens = run.seconds - logged[0], run.tokens - logged[1]
            rate, loss = tokens / seconds, float(np.mean(losses))
            mfu = flops * rate / (peak * run.world) if peak else None
            means = torch.tensor([np.mean(values) for values in run.notes.values()])
            notes = dict(zip(run.notes, all_sum(means / run.world, run), strict=True))
            log(run, loss=loss, norm=norm, tokens_per_second=rate, mfu=mfu, **notes)
            run.say(f'step {run.step}: loss {loss:.4f}, {1e3 * seconds / len(losses):.0f} ms, '
                    f'{rate:,.0f} tokens/s' + (f', {mfu:.0%} of peak' if peak else '')
                    + ''.join(f', {name} {value:.3g}' for name, value in notes.items()))
            losses, logged, run.notes = [], (run.seconds, run.tokens), {}
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
        picture([out_dir], Path(out_dir, 'loss.png'), f'{stage} on {dataset}')
        if sample_tokens:
            ids = generate(run.model, [[run.tokenizer.end or 0]], sample_tokens, seed=seed)[0]
            run.say('  | ' + run.tokenizer.decode(ids).replace('\n', '\n  | '))
    run.model.train()


def log(run, **metrics):
    line = dict(step=run.step, tokens=run.tokens, seconds=run.seconds, **metrics)
    if run.rank == 0:
        with open(Path(out_dir, 'log.jsonl'), 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
    if run.wandb:
        run.wandb.log(line)


def save(run, name):
    """Write a checkpoint under a temporary name, flush, rename: there is always a whole one."""
    if run.rank:
        return
    content = {
        'model': run.model.state_dict(), 'optimizer': [o.state_dict() for o in run.optimizers],
        'scaler': run.scaler.state_dict(), 'model_args': asdict(run.model.config),
        'config': run.config, 'iter_num': run.step, 'best_val_loss': run.best,
        'seconds': run.seconds, 'tokens': run.tokens, 'tokenizer': run.tokenizer.spec,
        'lineage': run.lineage}
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
    weights = total * (12 if stage in ('rl', 'dpo') else 8)     # these know where they began
    tokens, seen = max_iters * run.step_tokens, run.tokens_there
    if talks():
        work += min(rollout_rows, num_prompts * num_samples) * block_size * size * (
            2 * c.n_layer * c.n_embd * c.n_kv_head // c.n_head)
        step = f'{num_prompts} questions, {num_samples} answers of {max_new_tokens} tokens at most'
        whole = f'{max_iters * num_prompts * num_samples:,} answers'
    else:
        step = (f'{run.step_tokens:,} tokens: {gradient_accumulation_steps} x {batch_size} rows of '
                f'{block_size}')
        whole = f'{tokens:,} tokens, {flops * tokens:.1e} FLOPs, ' + (
            f'{tokens / seen:.2f} epochs of {seen:,} tokens' if seen else 'data of unknown length')
    run.say(f"""{stage} on {dataset} from {init_from}, into {out_dir}
  model       {total / 1e6:.2f}M parameters, {c.n_layer} layers, {c.n_embd} wide; \
{flops / 1e6:.1f} MFLOPs per token
  a step      {step}
  the run     {max_iters:,} steps, {whole}
  memory      about {(weights + state + work) / 1e9:.2f} GB: {weights / 1e9:.2f} weights and \
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
        step=0, tokens=0, seconds=0.0, best=math.inf, lineage=[], notes={}, wandb=None,
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
    if talks() and num_prompts % run.world:
        raise ValueError(f'--num_prompts={num_prompts} do not divide among {run.world} processes')
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
    source = folder_of(init_from).resolve()
    if not (eval_only or dry_run) and source == Path(out_dir).resolve():
        raise ValueError(f'--out_dir={out_dir} is the run that --init_from reads: choose another')
    return run


def find_data(run):
    """Set run.data and run.meta: dataset's, else fallback_dataset's, which is said loudly."""
    global dataset, out_dir
    names = [name for name in (dataset, fallback_dataset) if name]
    if run.local_rank == 0:
        for problem in find(names, prepare=not dry_run)[1]:
            run.say(problem + ("; GPT-2's vocabulary is assumed" if dry_run else ''))
    if run.world > 1:
        dist.barrier()
    name = find(names, prepare=False)[0]
    if name != dataset:
        out_dir = out_dir.replace(dataset.replace('_', '-'), name.replace('_', '-'))
        run.say(f'!!! NOT {dataset.upper()}: TRAINING ON {name.upper()} INSTEAD, IN {out_dir} !!!')
        dataset = name
    run.data = mixture_of(name)
    metas = {folder: read_meta(folder) for folder in run.data}
    run.meta = next(iter(metas.values()))
    run.hashes = {str(folder): meta.get('sha256', {}) for folder, meta in metas.items()}
    run.tokens_there = sum(meta.get('counts', {}).get('train', 0) for meta in metas.values())
    alike = all(meta['tokenizer'] == run.meta['tokenizer'] for meta in metas.values())
    if not (alike or dry_run):
        raise ValueError(f'--dataset={dataset}: these do not have the same tokenizer')
    run.config = {name: globals()[name] for name in read_settings(__file__)}


def architecture(vocab_size):
    settings = {f.name: globals()[f.name] for f in fields(GPTConfig) if f.name in globals()}
    return GPTConfig(**settings, vocab_size=vocab_size)


def load_fitting(run, source):
    """-> a model that fits the data and the settings, and its checkpoint (ValueError)"""
    model, tokenizer, checkpoint = load_model(source, dropout)
    if tokenizer.spec != run.meta['tokenizer'] and not dry_run:
        raise ValueError(f'{source} and data/{dataset} do not have the same tokenizer')
    if stage not in TEXT_STAGES and model.config.vocab_size < run.meta['vocab_size']:
        model = widened(model, run.meta['vocab_size'])      # GPT-2 knows no chat tokens
    if block_size > model.config.block_size:
        raise ValueError(f'--block_size={block_size}: {source} has {model.config.block_size}')
    return model, checkpoint


def make_model(run):
    """-> model on the CPU, and the checkpoint that it comes from ({} if from scratch)"""
    if init_from == 'resume' and not Path(out_dir, 'ckpt.pt').exists():
        if stage not in TEXT_STAGES:
            raise ValueError(f'{out_dir}: nothing is saved there yet: leave --init_from=resume out')
        run.say(f'{out_dir}: nothing is saved there yet, so this starts from scratch')
    elif init_from != 'scratch' and not (dry_run and init_from in GPT2_SIZES):
        source = f'{out_dir}/ckpt.pt' if init_from == 'resume' else init_from
        model, checkpoint = load_fitting(run, source)
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
        run.tokens = checkpoint.get('tokens', run.step * run.step_tokens)
    else:
        run.lineage = run.lineage + [{'stage': stage, 'dataset': dataset, 'init_from': init_from,
                                      'data': run.hashes}]
    if all_sum(torch.tensor([float(run.step)]), run)[0] != run.step * run.world:
        raise ValueError(f'{out_dir}/ckpt.pt differs between processes: copy it to each node')
    run.network = torch.compile(model) if run.compile else model
    if run.world > 1:
        devices = [run.local_rank] if run.device.startswith('cuda') else None
        run.network = nn.parallel.DistributedDataParallel(
            run.network, device_ids=devices, broadcast_buffers=False)
    batches_evaluate = STAGES[stage](run)
    if run.rank or eval_only or explain:
        return batches_evaluate
    if resumed:
        cut_log(Path(out_dir, 'log.jsonl'), run.step)
    else:
        aside = fresh_folder(out_dir)
        if aside:
            run.say(f'{out_dir} holds a run already: moved to {aside}')
    if wandb_log:
        import wandb
        run.wandb = wandb
        wandb.init(project=wandb_project, name=wandb_run_name, config=run.config)
    return batches_evaluate


def show(run, batch):
    """Print a batch: each token and its target, in colour if that is in play, its weight, loss."""
    if batch is None:
        raise ValueError('nothing is in play in this step')
    run.model.eval()
    x, y, w = batch
    first = y if y.dim() == 2 else y[..., 0]    # the likeliest of several targets
    losses = -log_p(run, run.model, x, first)
    w = torch.ones(y.shape) if w is None else w.expand(y.shape)
    w = w if w.dim() == 2 else w[..., 0]
    for row in range(len(x)):
        run.say(f'row {row}: token, target, weight, loss')
        for token, target, weight, loss in zip(x[row], first[row], w[row], losses[row]):
            text, colour = repr(run.tokenizer.decode([int(token)])), '\033[2m'  # dim
            if target >= 0:
                text = f'{text:<16} {run.tokenizer.decode([int(target)])!r:<16}'
                text += f' {weight:8.3f} {loss:8.3f}'
                colour = '\033[32m' if weight >= 0 else '\033[31m'     # green, red
            run.say(f'{colour}{text}\033[0m' if sys.stdout.isatty() else text)


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
            if explain:
                return show(run, next(iter(batches(run.step)), None))
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
        less = (f'--batch_size={batch_size} or --rollout_rows={rollout_rows}' if talks() else
                f'--batch_size={batch_size} and double --gradient_accumulation_steps='
                f'{gradient_accumulation_steps}')
        sys.exit(f'out of memory: halve {less}: the same step, in less memory')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')    # a terminal may not know every character
    main()
