"""
A mixture of experts in the place of a block's MLP (arXiv:1701.06538; Grok-1 is one): each token
goes through n_expert_active of n_expert MLPs, which a router chooses, and through the shared ones.

    python train.py config/train_gpt2.py --n_expert=8 --n_expert_active=2 --n_inner=1536

Their loads are balanced without a loss (arXiv:2408.15664): experts are chosen by score + bias, and
weighed by the score alone. After each update the bias of an expert that had more than its share of
the tokens falls a little, and that of the others rises. Since the bias is in no product, nothing
has a gradient through it: it cannot pull the model away from its loss.
"""
import copy

import torch
from torch import nn
from torch.nn import functional as F

from data.processes import all_sum

BALANCE = 1e-2      # how far a bias moves in an update (1e-3 left experts idle in a run of 1,200)


uncompiled_grouped_mm = torch.compiler.disable(F.grouped_mm)    # torch 2.13 compiles only bf16


class Stack(nn.Module):
    """The matrices of all experts in one parameter: (experts, out, in), as Linear's (out, in)."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))

    def forward(self, x, ends):
        """x: (rows, in), those of expert i before row ends[i]. -> (rows, out)"""
        multiply = F.grouped_mm if x.dtype == torch.bfloat16 else uncompiled_grouped_mm
        return multiply(x, self.weight.to(x.dtype).mT, offs=ends)


class Experts(nn.Module):

    def __init__(self, mlp, config):
        """mlp: what an expert is like"""
        super().__init__()
        C, E, active = config.n_embd, config.n_expert, config.n_expert_active
        if active > E or mlp.c_fc.bias is not None or mlp.dropout:
            raise ValueError(f'n_expert={E}, n_expert_active={active}: at most all experts are '
                             'active, and they have no biases and no dropout')
        if any(size % 8 for size in mlp.c_fc.weight.shape):
            raise ValueError(f'experts of {" x ".join(map(str, mlp.c_fc.weight.shape))}: n_embd '
                             'and n_inner must be multiples of 8')
        self.active, self.activation = active, mlp.activation
        self.router = nn.Linear(C, E, bias=False)
        self.c_fc = Stack(E, *mlp.c_fc.weight.shape)
        self.c_proj = Stack(E, *mlp.c_proj.weight.shape)
        self.shared = nn.ModuleList(copy.deepcopy(mlp) for _ in range(config.n_expert_shared))
        self.register_buffer('bias', torch.zeros(E))    # of the choice
        self.register_buffer('counts', torch.zeros(E))  # of tokens since the last update

    @property
    def active_weights(self):
        """The weights of the stacks that a token is multiplied with."""
        stacks = self.c_fc.weight.numel() + self.c_proj.weight.numel()
        return stacks * self.active // len(self.bias)

    def route(self, x):
        """x: (N, C) -> chosen: (N, active) experts, weights: the same shape, of sum 1 (a single one
        has its score: with a weight of 1 the router would not learn)"""
        logits = self.router(x).float()
        scores = logits.softmax(-1)
        chosen = (scores + self.bias).topk(self.active).indices
        if self.active == 1:
            return chosen, scores.gather(1, chosen)
        return chosen, logits.gather(1, chosen).softmax(-1)

    def forward(self, x):
        tokens = x.flatten(0, -2)                                       # (N, C)
        chosen, weights = self.route(tokens)
        order = chosen.flatten().argsort(stable=True)                   # (N * active), by expert
        counts = chosen.flatten().bincount(minlength=len(self.bias))
        if self.training and torch.is_grad_enabled():
            self.counts += counts
        ends, device = counts.cumsum(0).int(), x.device.type
        if torch.is_autocast_enabled(device):   # which does not know grouped_mm
            tokens = tokens.to(torch.get_autocast_dtype(device))
        y = self.activation(self.c_fc(tokens[order // self.active], ends))
        y = self.c_proj(y, ends)[order.argsort()]                       # back, by token
        y = (y.view(*chosen.shape, -1) * weights[..., None].to(y.dtype)).sum(1).view(x.shape)
        return sum((shared(x) for shared in self.shared), y)


def balance(run):
    """Let the experts' loads, in all processes, move their biases after each update."""
    layers = [module for module in run.model.modules() if isinstance(module, Experts)]

    def update(*_):
        loads = torch.tensor(all_sum(torch.stack([layer.counts for layer in layers])))
        for layer, load in zip(layers, loads, strict=True):
            layer.bias += BALANCE * (load.mean() - load).sign().to(layer.bias)
            layer.counts.zero_()
        share = loads / loads.sum(1, keepdim=True).clamp(min=1)
        run.note(busiest_expert=share.max(), idlest_expert=share.min())

    run.optimizers[-1].register_step_post_hook(update)
