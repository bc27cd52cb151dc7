"""
LoRA (arXiv:2106.09685): all weights stay as they are, and to the product with a matrix W one with
two narrow ones is added, alpha / rank * B A, which alone learn. B starts at zero, so that a run
starts as the model that it is from; optimizers keep state for A and B alone.

    python train.py config/finetune_shakespeare.py --init_from=gpt2 --lora_rank=8

A checkpoint has the sums W + alpha / rank * B A in the place of W: it is a model like any other. It
has W, A and B too, for --init_from=resume. For PEFT (with weights as extras/export.py names them):

    python -m extras.export_adapter --out_dir=out --to=adapter
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

lora_alpha = 16.0                       # the change of a matrix is lora_alpha / lora_rank * B A
lora_targets = 'c_attn,c_proj,c_fc'     # the blocks' matrices that change: of attention, of the MLP


class LoraLinear(nn.Linear):

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale

    @torch.no_grad()
    def merged(self):
        """-> W + alpha / rank * B A"""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)


def layers_of(model):
    """-> {name: LoraLinear}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def add_lora(model, config):
    """Freeze a model but for new A and B. ValueError for settings that do not go with it"""
    rank, targets = config['lora_rank'], lora_targets.split(',')
    wanted = dict(muon_lr=0, shard=False, checkpoint='whole', fp8=False)
    wrong = [f'--{name}={value}' for name, value in wanted.items() if config[name] != value]
    if wrong:
        raise ValueError(f'--lora_rank={rank}: set {" ".join(wrong)}')
    if config['init_from'] == 'scratch':
        raise ValueError(f'--lora_rank={rank}: choose a model to start from, with --init_from=')
    if model.config.n_expert:
        raise ValueError(f'--lora_rank={rank}: not for mixtures of experts')
    model.requires_grad_(False)
    found = {name: m for name, m in model.transformer.h.named_modules()
             if type(m) is nn.Linear and name.split('.')[-1] in targets}
    unknown = set(targets) - {name.split('.')[-1] for name in found}
    if unknown:
        raise ValueError(f'--lora_targets={lora_targets}: {" ".join(sorted(unknown))} is '
                         'no matrix of a block; there are c_attn, c_proj and c_fc')
    generator = torch.Generator().manual_seed(config['seed'])
    for layer in found.values():
        layer.__class__, layer.scale = LoraLinear, lora_alpha / rank
        A = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        layer.lora_A = nn.Parameter(A.to(layer.weight.device))
        layer.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))


def merged_state(model):
    """-> what a checkpoint has of a model: ordinary weights; W, A and B of its layers"""
    weights, parts = model.state_dict(), {}
    for name, layer in layers_of(model).items():
        parts[name] = {part: weights.pop(f'{name}.{part}') for part in ('lora_A', 'lora_B')}
        parts[name]['weight'] = weights[f'{name}.weight']
        weights[f'{name}.weight'] = layer.merged().cpu()
    return {'model': weights, 'lora': parts}


@torch.no_grad()
def restore_lora(model, parts):
    """Give a model that add_lora() has prepared, with the same settings, the W, A and B of a
    checkpoint."""
    for name, layer in layers_of(model).items():
        for part, value in parts[name].items():
            getattr(layer, part).copy_(value)
