"""
Distillation: a student learns from a teacher, another run.

    python train.py config/arithmetic_distill.py

On policy (arXiv:2306.13649): the student answers a task's questions, as in stages/rl.py, and each
token that it sampled weighs

    w = log p_teacher - log p_student,

which gives the gradient of the reverse KL at that token. Otherwise (arXiv:1503.02531) the rows come
from a data set, and the targets y of each token are the teacher_top tokens that the teacher finds
likeliest, w their probabilities, divided by their sum. N counts every target, so w is multiplied by
their number.
"""
import torch

from data.models import load_reference
from data.rows import microbatches, read_rows
from data.tasks import tasks_of
from stages import rl

USES = [rl]                  # rl's settings are settings here too: num_prompts, num_samples ...

teacher = ''                 # the run to learn from
teacher_top = 16             # targets of a token: this many of the teacher's likeliest; at least 1
on_policy = True             # learn from the student's own answers; False: from the data set


def stage():
    return dict(start=start_on_policy if on_policy else start_on_data, samples=on_policy,
                reference=True)


def start_on_policy(run):
    """-> batches(step), evaluate()"""
    guide, task = load_reference(run, teacher), tasks_of(run.data)

    def batches(step):
        requests, _ = rl.rollouts(run, task, step)
        examples = [rl.example_of(request, 1) for request in requests]
        for x, y, _ in microbatches(run, examples):
            yield x, y, run.log_probs(guide, x, y) - run.log_probs(run.model, x, y)

    return batches, lambda: rl.evaluate(run, task)


def start_on_data(run):
    """-> batches(step), evaluate()"""
    guide = load_reference(run, teacher)
    known = min(guide.config.vocab_size, run.model.config.vocab_size)   # a table may have spare ids
    if teacher_top > known:
        raise ValueError(f'--teacher_top={teacher_top}: there are {known} tokens')
    rows, evaluate = read_rows(run)

    def batches(step):
        for x, y, _ in rows(step):
            with torch.no_grad():
                logits = run.forward(guide, x)[0][..., :known]
                p, ids = logits.float().softmax(-1).topk(teacher_top)
            ids[y < 0] = -1
            yield x, ids, teacher_top * p / p.sum(-1, keepdim=True)

    return batches, evaluate
