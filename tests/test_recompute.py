"""Activations computed again in backward: the same gradients, in less memory."""

import pytest
import torch
from conftest import FAMILIES, TINY, inside, tiny

from extras.recompute import recompute_blocks


def gradients(model, idx):
    """-> the gradients of one forward and backward, and how many numbers were kept for backward"""
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel()
        return t

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(idx, idx)[1]
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize('name', FAMILIES)
def test_gradients_are_the_same_and_less_is_kept(name):
    idx = torch.randint(50, (4, 20))
    dropout = {} if name in ('experts', 'windows') else {'dropout': 0.2}
    found = []
    for again in False, True:
        model = tiny(**{**FAMILIES[name], **dropout, 'n_layer': 6}).train()
        if again:
            recompute_blocks(model)
        found.append(gradients(model, idx))
    (truth, kept), (ours, kept_again) = found
    assert all(torch.equal(ours[name], truth[name]) for name in truth)
    assert kept_again < kept / 2


def test_a_run_is_the_same_to_the_bit(dataset, tmp_path):
    ends = []
    for again in 'False', 'True':
        out = f'{tmp_path}/{again}'
        inside('train.py', *TINY, f'--dataset={dataset}', f'--recompute={again}', '--max_iters=3',
               '--muon_lr=0.02', '--dropout=0.1', f'--out_dir={out}')  # fmt: skip
        ends.append(torch.load(f'{out}/ckpt.pt', weights_only=True)['model'])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
