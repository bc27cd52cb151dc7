"""Products in 8 bits against those in fp32, within what their mantissas imply."""

import pytest
import torch
from conftest import TINY, inside, tiny
from torch.nn import functional as F

from extras.float8 import Float8Linear, to_float8, use_float8


@pytest.mark.parametrize('dtype, step', [(torch.float8_e4m3fn, 1 / 8), (torch.float8_e5m2, 1 / 4)])
def test_a_number_moves_by_at_most_half_a_step_of_its_format(dtype, step):
    x = torch.randn(1000) * torch.logspace(-2, 2, 1000)
    x8, scale = to_float8(x, dtype)
    back = x8.float() * scale
    large = x.abs() > 1e-3 * x.abs().max()      # smaller ones are subnormal in e4m3
    assert ((back - x).abs() <= 0.5 * step * x.abs() + 1e-9)[large].all()
    assert back.abs().max() == pytest.approx(x.abs().max().item())
    assert not to_float8(torch.zeros(3), dtype)[0].float().any()


def test_products_and_gradients_are_those_of_the_rounded_numbers():
    """By hand: each factor rounded to 8 bits, the product in fp32."""
    layer = torch.nn.Linear(32, 48, bias=False)
    x, grad = torch.randn(5, 7, 32, requires_grad=True), torch.randn(5, 7, 48)
    layer.__class__ = Float8Linear
    y = layer(x)
    y.backward(grad)

    def rounded(t, dtype):
        t8, scale = to_float8(t.detach().flatten(0, -2), dtype)
        return t8.float() * scale

    x8, w8 = (rounded(t, torch.float8_e4m3fn) for t in (x, layer.weight))
    g8 = rounded(grad, torch.float8_e5m2)
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.flatten(0, 1), x8 @ w8.T, **close)
    torch.testing.assert_close(x.grad.flatten(0, 1), g8 @ w8, **close)
    torch.testing.assert_close(layer.weight.grad, g8.T @ x8, **close)


def test_evaluation_is_not_in_8_bits_and_training_is_near():
    model, idx = tiny(), torch.randint(50, (4, 20))
    exact = model(idx, idx)[1]
    exact.backward()
    truth = [p.grad.clone() for p in model.parameters()]
    use_float8(model, 'cpu')
    assert torch.equal(model(idx, idx)[1], exact)
    model.zero_grad()
    loss = model.train()(idx, idx)[1]
    loss.backward()
    assert loss != exact and abs(loss / exact - 1) < 0.05
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert F.cosine_similarity(ours, torch.cat([g.flatten() for g in truth]), dim=0) > 0.97


def test_a_run_in_8_bits_learns_and_what_cannot_be_is_one_line(dataset, tmp_path):
    common = [*TINY, f'--dataset={dataset}', '--fp8=True', '--max_iters=20', '--muon_lr=0.02']
    text = inside('train.py', *common, '--log_interval=1', f'--out_dir={tmp_path}/out')
    losses = [float(line.split('loss ')[1].split(',')[0]) for line in text.splitlines()
              if line.startswith('step ') and ': loss' in line]  # fmt: skip
    assert losses[-1] < losses[0] - 0.5
    assert 'multiples of 16' in inside('train.py', *common, '--n_embd=40', ok=False,
                                       cwd=tmp_path)  # fmt: skip
