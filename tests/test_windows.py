"""Layers that see a window: as if the text began there; their cache; what they cost."""

import pytest
import torch
from conftest import TINY, inside, tiny

from data.models import flops_per_token
from extras.windows import contexts_of, window_cache
from model import GPTConfig
from sample import KVCache

SHORT = dict(n_layer=4, window_pattern='SSL', short_window=5)


def test_a_short_layer_sees_a_text_that_begins_a_window_ago():
    """Rotary positions are relative, so that the same attention over the last 5 tokens alone says
    the same of the last of them; and so do the gradients."""
    model = tiny(**SHORT)
    layer, x = model.transformer.h[0].attn, torch.randn(2, 20, 32)
    found = []
    for windowed in True, False:
        given = x.clone().requires_grad_()
        if windowed:
            context = model.make_context(torch.zeros(2, 20, dtype=torch.long), None)
            y = layer(given, contexts_of(model.config, context)[0])
        else:
            rows = []
            for t in range(20):
                part = given[:, max(0, t - 4):t + 1]
                context = model.make_context(part[..., 0].long(), None)
                rows.append(layer(part, context)[:, -1])
            y = torch.stack(rows, 1)
        model.zero_grad()
        (y * y.detach().cos()).sum().backward()
        found.append([y, given.grad, layer.c_attn.weight.grad])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_the_last_layer_sees_all_and_the_others_take_turns():
    assert GPTConfig(5, n_layer=4, block_size=64, window_pattern='SSL', short_window=8).windows == (
        [8, 8, 64, 64])
    assert GPTConfig(5, n_layer=3, block_size=64, window_pattern='SL', short_window=8).windows == (
        [8, 64, 64])
    assert GPTConfig(5, n_layer=2, block_size=64).windows == [64, 64]


def test_a_window_of_the_whole_context_changes_nothing():
    idx = torch.randint(50, (2, 24))
    models = tiny(n_layer=4), tiny(n_layer=4, window_pattern='SSL', short_window=24)
    assert torch.equal(*[model(idx)[0] for model in models])


def test_what_is_out_of_sight_changes_nothing():
    """Of a short layer's 20 tokens the last one sees 5."""
    model = tiny(n_layer=2, window_pattern='SL', short_window=5)
    sees = model.transformer.h[0].attn
    x = torch.randn(1, 20, 32)
    changed = x.clone()
    changed[:, :15] = torch.randn(1, 15, 32)
    context = model.make_context(torch.zeros(1, 20, dtype=torch.long), None)
    short = contexts_of(model.config, context)[0]
    assert torch.equal(sees(x, short)[:, -1], sees(changed, short)[:, -1])
    assert not torch.allclose(sees(x, short)[:, 18], sees(changed, short)[:, 18])


def test_the_cache_of_a_short_layer_holds_a_window():
    config = tiny(**SHORT).config
    whole, short = KVCache(config, 3), window_cache(KVCache)(config, 3)
    slot = 2 * 3 * config.n_embd    # keys and values of a token in 3 rows of a layer
    assert whole.kv.numel() == 4 * 25 * slot
    assert short.kv.numel() == 2 * 25 * slot and short.ring.numel() == 2 * 6 * slot


def test_flops_count_what_is_seen():
    dense, short = tiny(n_layer=4), tiny(**SHORT)
    assert flops_per_token(dense, 20) - flops_per_token(short, 20) == 12 * 32 * 2 * (20 - 5)
    assert flops_per_token(dense, 4) == flops_per_token(short, 4)


@pytest.mark.parametrize(
    'setting, words',
    [
        ('--window_pattern=LLS', "choose one of ('L', 'SL', 'SSL', 'SSSL')"),
        ('--window_pattern=', 'choose one of'),
        ('--short_window=0', 'must be at least 1'),
    ],
)
def test_windows_that_cannot_be_are_one_clear_line(dataset, tmp_path, setting, words):
    assert words in inside('train.py', *TINY, f'--dataset={dataset}', setting,
                           f'--out_dir={tmp_path}/out', ok=False)  # fmt: skip
