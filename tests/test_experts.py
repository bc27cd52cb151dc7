"""Mixtures of experts against a loop over tokens and Mixtral's block; their balance."""

import copy
import json

import pytest
import torch
from conftest import TINY, inside, tiny
from torch.nn import functional as F

import model
import train
from data.models import flops_per_token
from extras.experts import BALANCE, Experts, balance
from model import GPTConfig, Muon

MIXED = dict(n_expert=5, n_expert_active=2)
EXPERTS = [f'--{name}={value}' for name, value in MIXED.items()]


def by_hand(layer, x):
    """Each token alone, in float64."""
    out = []
    for token in x.flatten(0, -2):
        scores = torch.softmax(layer.router.weight @ token, 0)
        best = sorted(range(5), key=lambda i: -(scores[i] + layer.bias[i]).item())[:2]
        y = sum(mlp(token) for mlp in layer.shared)
        for i in best:
            hidden = F.relu(layer.c_fc.weight[i] @ token) ** 2
            share = scores[i] / sum(scores[j] for j in best)
            y = y + share * (layer.c_proj.weight[i] @ hidden)
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize('shared', [0, 2])
def test_experts_are_a_loop_over_tokens_and_so_are_their_gradients(shared):
    layer = tiny(**MIXED, n_expert_shared=shared).transformer.h[0].mlp
    layer.bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, -0.3]))
    layers = layer, copy.deepcopy(layer).double()
    x = torch.randn(3, 7, 32)
    found = []
    for layer, apply in zip(layers, (Experts.forward, by_hand)):
        given = x.to(layer.bias).clone().requires_grad_()
        y = apply(layer, given)
        (y * y.detach().cos()).sum().backward()     # a gradient that differs from place to place
        found.append([y, given.grad, *[p.grad for p in layer.parameters()]])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_the_router_learns_with_one_active_expert_too():
    for active in 1, 2:
        layer = tiny(n_expert=5, n_expert_active=active).transformer.h[0].mlp
        x = torch.randn(6, 32)
        (layer(x) * torch.randn(6, 32)).sum().backward()
        assert layer.router.weight.grad.abs().max() > 1e-3


def test_scores_that_underflow_are_no_division_by_zero():
    layer = tiny(**MIXED).transformer.h[0].mlp
    layer.router.weight.data *= 1e4
    layer.bias.copy_(torch.tensor([-2.0, -2.0, -2.0, 0.0, 0.0]))
    assert layer(torch.randn(50, 32)).isfinite().all()


def test_an_expert_that_no_token_chose_has_no_gradient():
    layer = tiny(**MIXED).transformer.h[0].mlp
    layer.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))
    layer(torch.randn(4, 32)).sum().backward()
    assert layer.c_fc.weight.grad[:2].abs().sum() > 0 == layer.c_fc.weight.grad[2:].abs().sum()


def test_the_block_of_mixtral_says_the_same(monkeypatch):
    mixtral = pytest.importorskip('transformers.models.mixtral.modeling_mixtral')

    def swiglu(x):
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    monkeypatch.setitem(model.ACTIVATIONS, 'gelu', (swiglu, 4, 2))
    ours = tiny(**MIXED, activation='gelu', n_inner=48).transformer.h[0].mlp
    config = mixtral.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=5,
                                   num_experts_per_tok=2)  # fmt: skip
    theirs = mixtral.MixtralSparseMoeBlock(config)
    theirs.load_state_dict({
        'gate.weight': ours.router.weight, 'experts.gate_up_proj': ours.c_fc.weight,
        'experts.down_proj': ours.c_proj.weight})  # fmt: skip
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_muon_moves_a_stack_as_it_moves_each_of_its_matrices():
    torch.manual_seed(0)
    for shape in (3, 8, 4), (3, 4, 8):
        stack, grad = torch.nn.Parameter(torch.randn(shape)), torch.randn(shape)
        alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
        for params, grads in ([stack], [grad]), (alone, grad):
            optimizer = Muon(params, 0.1, weight_decay=0.1, dtype=torch.float32)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
        torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]))


def test_only_active_experts_count_as_flops():
    dense, mixed = tiny(n_inner=64), tiny(**MIXED, n_inner=32)
    router = 6 * 2 * 5 * 32     # of two layers, five experts
    assert flops_per_token(mixed, 24) == flops_per_token(dense, 24) + router
    stacks = 2 * 5 * 2 * 32 * 32
    assert sum(p.numel() for p in mixed.parameters()) == (
        sum(p.numel() for p in dense.parameters()) - 2 * 2 * 64 * 32 + stacks + 2 * 5 * 32)


def run_for(**changes):
    """A Run with what balance() needs of it."""
    network = tiny(**MIXED, **changes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    made = {name: None for name in train.Run.__dataclass_fields__ if name not in (
        'step', 'tokens', 'seconds', 'best', 'skipped', 'asked_to_stop', 'stop', 'notes', 'since',
        'lock')}  # fmt: skip
    return train.Run(**{**made, 'model': network, 'optimizers': [optimizer]})


def test_the_bias_falls_where_too_many_tokens_went_and_rises_elsewhere():
    run = run_for()
    balance(run)
    layer = run.model.transformer.h[0].mlp
    layer.counts.copy_(torch.tensor([10.0, 2.0, 4.0, 4.0, 0.0]))      # 4 on average
    run.optimizers[0].step()
    torch.testing.assert_close(layer.bias, BALANCE * torch.tensor([-1.0, 1.0, 0.0, 0.0, 1.0]))
    assert not layer.counts.any()
    assert run.notes['busiest_expert'] == [0.5] and run.notes['idlest_expert'] == [0.0]


def test_loads_even_out_and_only_training_counts():
    run = run_for()
    balance(run)
    layer, x = run.model.transformer.h[0].mlp, torch.randn(400, 32)
    layer.bias[0] = 2.0        # so that expert 0 is among the chosen of each token
    run.model.eval()
    layer(x)
    with torch.no_grad():
        run.model.train()
        layer(x)
    assert not layer.counts.any()
    for _ in range(400):
        layer(x)
        assert layer.counts.sum() == 800
        run.optimizers[0].step()
    shares = run.notes['busiest_expert']
    assert shares[0] == 0.5 and sum(shares[-50:]) / 50 < 0.25     # 0.2 is even


def test_a_run_with_experts_resumes_to_the_same_bits_and_logs_their_loads(dataset, tmp_path):
    common = [*TINY, *EXPERTS, f'--dataset={dataset}', '--muon_lr=0.02', '--decay_lr=False',
              '--eval_interval=3']  # fmt: skip
    for name, *steps in ('whole', 6), ('cut', 3, 6):
        for count in steps:
            inside('train.py', *common, f'--max_iters={count}', f'--out_dir={tmp_path}/{name}',
                   '--init_from=resume')  # fmt: skip
    ours, theirs = (
        torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['model']
        for name in ('whole', 'cut')
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours['transformer.h.1.mlp.bias'].any()
    lines = [json.loads(line) for line in open(tmp_path / 'whole' / 'log.jsonl')]
    assert 0.2 <= lines[0]['busiest_expert'] <= 0.5


@pytest.mark.parametrize(
    'change, words',
    [
        ({'n_expert_active': 6}, 'at most all experts are active'),
        ({'bias': True}, 'no biases'),
        ({'dropout': 0.1}, 'no dropout'),
        ({'n_inner': 50}, 'must be multiples of 8'),
    ],
    ids=str,
)
def test_experts_that_cannot_be_are_one_clear_line(dataset, tmp_path, change, words):
    text = inside('train.py', *TINY, *EXPERTS, f'--dataset={dataset}', f'--out_dir={tmp_path}/out',
                  *[f'--{name}={value}' for name, value in change.items()], ok=False)  # fmt: skip
    assert words in text and not (tmp_path / 'out').exists()


def test_experts_are_no_setting_of_a_dense_network():
    assert GPTConfig(5).n_expert == 0 and not hasattr(tiny().transformer.h[0].mlp, 'router')
