"""On a GPU: the same numbers as on a CPU, which the other tests hold against the truth."""

import pytest
import torch
from conftest import FAMILIES, tiny
from torch.nn import functional as F

from extras import windows
from extras.float8 import use_float8
from sample import Sampling, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')


def gradient(model, idx, dtype=torch.float32):
    """-> the loss and the whole gradient, on the CPU"""
    with torch.autocast(idx.device.type, dtype, dtype != torch.float32):
        loss = model(idx, idx)[1]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])


@pytest.mark.parametrize('name', FAMILIES)
def test_losses_gradients_and_texts_are_those_of_a_cpu(name):
    shape = {**FAMILIES[name], 'n_embd': 64}
    idx, ours, theirs = torch.randint(50, (3, 20)), tiny(**shape), tiny(**shape).cuda()
    (loss, gradients), (loss_gpu, gradients_gpu) = gradient(ours, idx), gradient(theirs, idx.cuda())
    assert loss_gpu == pytest.approx(loss, rel=1e-5)
    assert (gradients_gpu - gradients).norm() < 1e-5 * gradients.norm()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    for sampling in Sampling(temperature=0.0), Sampling():
        assert generate(theirs, prompts, 40, sampling) == generate(ours, prompts, 40, sampling)


def test_flex_attention_is_the_masked_one(monkeypatch):
    found, idx = [], torch.randint(50, (2, 512)).cuda()
    shape = dict(n_layer=4, n_embd=256, block_size=512, window_pattern='SSSL', short_window=100)
    for flex in windows.flex, lambda *_: F.scaled_dot_product_attention:
        monkeypatch.setattr(windows, 'flex', flex)
        found.append(gradient(tiny(**shape).cuda(), idx))
    (loss, gradients), (loss_masked, gradients_masked) = found
    assert loss == pytest.approx(loss_masked, rel=1e-3)
    assert (gradients - gradients_masked).norm() < 1e-2 * gradients_masked.norm()


def test_products_in_8_bits_point_the_same_way():
    idx, shape = torch.randint(50, (8, 128)).cuda(), dict(n_embd=256, block_size=128)
    loss, gradients = gradient(tiny(**shape).cuda(), idx)
    model = tiny(**shape).cuda().train()
    use_float8(model, 'cuda')
    loss_8, gradients_8 = gradient(model, idx, torch.bfloat16)
    assert loss_8 == pytest.approx(loss, rel=1e-2)
    assert F.cosine_similarity(gradients, gradients_8, dim=0) > 0.95
