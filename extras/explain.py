"""A batch as a stage makes it, token by token: python train.py config/... --explain=True"""
import sys

import torch


@torch.no_grad()
def explain_batch(run, batch):
    """Print a batch: each token and its target, in colour if that is in play, its weight, loss."""
    if batch is None:
        raise ValueError('this step has no target tokens')
    run.model.eval()
    x, y, w = batch
    target = y if y.dim() == 2 else y[..., 0]   # the likeliest of several targets
    losses = -run.log_probs(run.model, x, target)
    w = torch.ones(y.shape) if w is None else w.expand(y.shape)
    w = w if w.dim() == 2 else w[..., 0]
    for row in range(len(x)):
        print(f'row {row}: token, target, weight, loss')
        for token, wanted, weight, loss in zip(x[row], target[row], w[row], losses[row]):
            text, colour = repr(run.tokenizer.decode([int(token)])), '\033[2m'  # dim
            if wanted >= 0:
                text = f'{text:<16} {run.tokenizer.decode([int(wanted)])!r:<16}'
                text += f' {weight:8.3f} {loss:8.3f}'
                colour = '\033[32m' if weight >= 0 else '\033[31m'     # green, red
            print(f'{colour}{text}\033[0m' if sys.stdout.isatty() else text)
