"""
RL on verifiable rewards: group-relative policy gradient (arXiv:2402.03300).

    python train.py config/arithmetic_sft.py && python train.py config/arithmetic_rl.py

In each step the model answers num_prompts questions, num_samples times each, and a task's reward
scores the answers. What the model sampled is in play (not the question, not what its calculator
said), and each of these tokens weighs

    w = reward - mean reward of the answers to the same question,

so the loss -sum w * log p / N has the gradient of REINFORCE, with the group's mean as a baseline.
What makes w differ from that line in the code below:
- a group whose rewards are all equal has w = 0 everywhere: it is left out, and not counted in N;
- answers of a question that are the very same are read once, with the sum of their weights;
- in later updates on the same rollouts (updates > 1), w is w p_new / p_old, clipped as in PPO.
"""
import copy
import itertools
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

from data.files import say
from data.models import load_reference
from data.processes import all_sum
from data.rows import microbatches
from data.tasks import answer_questions, in_play, tasks_of
from sample import Sampling

num_prompts = 16             # questions in a step, over all processes together; at least 1
num_samples = 8              # answers to each: a group; at least 1
max_new_tokens = 120         # tokens in an answer; at least 1
rollout_rows = 64            # answers that are decoded side by side; at least 1
updates = 1                  # of the weights for each rollout; at least 1
clip_ratio = 0.2             # PPO's: how far p_new / p_old may move from 1; at least 0
divide_by_deviation = False  # as GRPO; gives very easy and very hard questions more weight
eval_examples = 200          # held-out questions, answered greedily; at least 1


def stage():
    return dict(start=start, samples=True, reference=True)


def start(run):
    """-> batches(step), evaluate()"""
    if num_samples < 2:
        raise ValueError(f'--num_samples={num_samples}: answers are compared, ask for 2 or more')
    task, reference = tasks_of(run.data), load_reference(run, run.lineage[-1]['init_from'])

    def batches(step):
        requests, rewards = rollouts(run, task, step)
        examples, dead = weigh(requests, rewards)
        rows = list(microbatches(run, merge_duplicates(examples)))
        run.note(dead_groups=dead)
        if (step + 1) % run.config['log_interval'] == 0:
            run.note(kl=kl_estimate(run, reference, requests[::num_samples]))
        before = [run.log_probs(run.model, x, y) for x, y, _ in rows] if updates > 1 else []
        for update in range(updates):
            for i, (x, y, w) in enumerate(rows):
                if update:      # the policy has moved since it sampled
                    w = clipped(w, (run.log_probs(run.model, x, y) - before[i]).exp())
                yield x, y, w
            yield None          # the weights are updated here

    return batches, lambda: evaluate(run, task)


def rollouts(run, task, step):
    """The model's own answers to fresh questions of a task, at temperature 1 and from its whole
    distribution: any other would not be the policy that is learned.
    -> requests, rewards: (questions, num_samples)"""
    seed, mine = run.config['seed'], slice(run.rank, None, run.world)
    examples = list(itertools.islice(task.examples('train', f'{seed} {step}'), num_prompts))
    if len(examples) < num_prompts:
        raise ValueError(f'--dataset={run.config["dataset"]} has only {len(examples)} questions')
    seeds = np.random.SeedSequence((seed, step)).generate_state(num_prompts).tolist()
    examples, began = examples[mine], time.perf_counter()
    requests, rewards = answer_questions(
        policy(run), run.tokenizer, task, examples, seeds[mine], rollout_rows, num_samples,
        max_new_tokens, Sampling(temperature=1.0))
    logprobs = [p for request in requests for p in request.logprobs if p is not None]
    run.note(rollout_seconds=time.perf_counter() - began, reward=np.mean(rewards),
             entropy=-np.mean(logprobs),
             truncated=np.mean([request.reason == 'length' for request in requests]),
             answer_length=np.mean([len(request.ids) for request in requests]))
    return requests, np.array(rewards).reshape(len(examples), num_samples)


def policy(run):
    """The model as it answers, in this run's precision. Learning keeps fp32 weights: p of a token
    there / in decoding is 1.0000 +- 0.0071 in bf16 (python tests/bench.py rl)."""
    model = run.whole_model()
    return model if run.dtype == torch.float32 else copy.deepcopy(model).to(run.dtype)


def weigh(requests, rewards):
    """-> training examples of all groups that are not dead, the share of dead groups"""
    advantage = rewards - rewards.mean(1, keepdims=True)
    if divide_by_deviation:
        advantage /= rewards.std(1, keepdims=True) + 1e-6
    alive = np.repeat(np.ptp(rewards, 1) > 0, num_samples)  # a group of equals teaches nothing
    pairs = zip(requests, advantage.flatten(), strict=True)
    return [example_of(*pair) for pair in itertools.compress(pairs, alive)], 1 - alive.mean()


def example_of(request, weight):
    """-> ids, in play, weight: in play is what the model itself sampled"""
    return np.array(request.prompt + request.ids), np.array(in_play(request)), weight


def merge_duplicates(examples):
    """
    Examples that are the very same become one with the sum of their weights: the same gradient in
    less time. N would have counted each, so all weights are scaled to make up for that.
    """
    same = {}
    for example in examples:
        same.setdefault((example[0].tobytes(), example[1].tobytes()), []).append(example)
    merged = [(*group[0][:2], sum(weight for *_, weight in group)) for group in same.values()]
    sizes = [float(sum(mask.sum() for _, mask, _ in each)) for each in (merged, examples)]
    read, whole = all_sum(torch.tensor(sizes))
    return [(ids, mask, weight * read / max(1, whole)) for ids, mask, weight in merged]


def clipped(w, ratio):
    """
    The weight that gives the gradient of PPO's clipped objective (arXiv:1707.06347), min(r w,
    clip(r) w): it is r w, but 0 where the ratio r of the probabilities has moved far enough.
    """
    far = torch.where(w.to(ratio) > 0, ratio > 1 + clip_ratio, ratio < 1 - clip_ratio)
    return (ratio * w.to(ratio)).masked_fill(far, 0.0)


def kl_estimate(run, reference, requests):
    """How far the policy is from the reference: log p - log p_reference, mean over its samples."""
    total = torch.zeros(2)
    for x, y, _ in microbatches(run, [example_of(request, 1) for request in requests]):
        log_ratio = run.log_probs(run.model, x, y) - run.log_probs(reference, x, y)
        total += torch.tensor([log_ratio.sum().item(), (y >= 0).sum()])
    return (total[0] / total[1]).item()


def evaluate(run, task):
    """Mean reward of greedy answers to the same held-out questions each time. -> metrics, score"""
    examples = list(itertools.islice(task.examples('val'), eval_examples))
    if not examples:
        raise ValueError(f'--dataset={run.config["dataset"]} has no questions to validate on')
    mine = examples[run.rank::run.world]
    requests, rewards = answer_questions(
        policy(run), run.tokenizer, task, mine, range(len(mine)), rollout_rows,
        max_new_tokens=max_new_tokens, sampling=Sampling(temperature=0.0))
    if mine:
        question = task.conversation(mine[0])[-2]['content']
        answer = run.tokenizer.transcript(requests[0].ids).strip()
        say(textwrap.indent(question, '  > ') + '\n' + textwrap.indent(answer, '  | '))
    folders = [folder for folder, _ in examples]
    parts = list(dict.fromkeys(folders))
    correct = torch.zeros(len(parts))
    for (folder, _), reward in zip(mine, rewards, strict=True):
        correct[parts.index(folder)] += reward
    metrics = {'accuracy': sum(correct := all_sum(correct)) / len(examples)}
    if len(parts) > 1:
        metrics |= {f'accuracy_{Path(folder).name}': total / folders.count(folder)
                    for folder, total in zip(parts, correct, strict=True)}
    return metrics, -metrics['accuracy']
