"""The network against independent truths: itself uncached, transformers, formulas."""

import json
import pickle

import pytest
import torch
from conftest import FAMILIES, tiny
from torch.nn import functional as F

from data.models import flops_per_token, load_model, widen
from extras.gpt2 import load_gpt2
from model import GPT2, GPTConfig, Muon, orthogonalize, rotary, rotate
from sample import make_cache


def cached_logits(model, idx, pieces):
    """Feed idx: (B, T) through a cache in pieces; the logits after each piece."""
    cache = make_cache(model.config, len(idx), dtype=model.lm_head.weight.dtype)
    return [model(piece, cache=cache)[0][:, 0] for piece in idx.split(pieces, dim=1)]


@pytest.mark.parametrize('pieces', [[24], [1] * 24, [7, 1, 1, 10, 5]], ids=str)
def test_cached_decoding_equals_uncached(model, pieces):
    idx = torch.randint(50, (3, 24))
    full = model(idx)[0]
    end = 0
    for piece, logits in zip(pieces, cached_logits(model, idx, pieces)):
        end += piece
        torch.testing.assert_close(logits, full[:, end - 1], atol=2e-5, rtol=1e-5)


def test_cached_equals_uncached_in_bfloat16(model):
    model = model.to(torch.bfloat16)
    idx = torch.randint(50, (2, 12))
    full = model(idx)[0]
    logits = cached_logits(model, idx, [5] + [1] * 7)[-1]
    assert (logits - full[:, -1]).abs().max() < 0.05 * full.float().std()


def test_rows_of_different_lengths_decode_side_by_side(model):
    rows = [torch.randint(50, (length,)) for length in (3, 11, 7)]
    cache = make_cache(model.config, 3)
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    for _ in range(4):
        logits = model(idx, cache=cache)[0][:, 0]
        for row in range(3):
            alone = model(rows[row][None])[0][0, -1]
            torch.testing.assert_close(logits[row], alone, atol=2e-5, rtol=1e-5)
        new = torch.randint(50, (3, 1))
        rows = [torch.cat((row, token)) for row, token in zip(rows, new)]
        idx = new
    assert cache.pos.tolist() == [6, 14, 10]


def test_a_row_with_nothing_to_read_stays_where_it_is(model):
    cache = make_cache(model.config, 2)
    first, second = torch.randint(50, (2, 5)), torch.randint(50, (1, 3))
    model(first, cache=cache)
    held = cache.kv[0, :, 1, :5].clone()
    logits = model(torch.cat((second, torch.full((1, 3), -1))), cache=cache)[0]
    assert cache.pos.tolist() == [8, 5] and torch.equal(cache.kv[0, :, 1, :5], held)
    expected = model(torch.cat((first[:1], second), dim=1))[0][0, -1]
    torch.testing.assert_close(logits[0, 0], expected, atol=2e-5, rtol=1e-5)


def test_a_full_cache_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match='block_size=24'):
        model(torch.zeros(1, 25, dtype=torch.long), cache=make_cache(model.config, 1))


def test_the_future_changes_nothing(model):
    idx = torch.randint(50, (1, 20))
    changed = idx.clone()
    changed[0, 13:] = (idx[0, 13:] + 1) % 50
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[0, :13], after[0, :13], atol=1e-5, rtol=0)
    assert not torch.allclose(before[0, 13], after[0, 13])


def test_tokens_not_in_play_change_nothing(model):
    idx, targets = torch.randint(50, (2, 10)), torch.randint(50, (2, 10))
    targets[:, 4:] = -1
    weights = torch.randn(2, 10)

    def gradients(idx, targets, weights):
        model.zero_grad()
        loss = model(idx, targets, weights)[1]
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    short = gradients(idx[:, :4], targets[:, :4], weights[:, :4])
    weights[:, 4:] = 1e3
    long = gradients(idx, targets, weights)
    torch.testing.assert_close(long[0], short[0])
    if (
        model.config.position == 'rope'
    ):  # learned positions of unseen places get a zero instead of nothing
        for a, b in zip(long[1], short[1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_weighted_sum_over_tokens_in_play(model):
    idx, targets, weights = torch.randint(50, (2, 9)), torch.randint(50, (2, 9)), torch.randn(2, 9)
    targets[0, 2] = targets[1, 5] = -1
    logits, loss = model(idx, targets, weights)
    by_hand = sum(
        -weights[b, t].double() * F.log_softmax(logits[b, t].double(), 0)[targets[b, t]]
        for b in range(2)
        for t in range(9)
        if targets[b, t] != -1
    )
    torch.testing.assert_close(loss.double(), by_hand, atol=1e-3, rtol=1e-5)


def test_a_batch_with_nothing_in_play_gives_zero_and_not_nan(model):
    loss = model(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), -1))[1]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_ids_beyond_the_vocabulary_have_no_probability_and_no_gradient():
    model = tiny(vocab_size=50, vocab_multiple=64)
    assert model.lm_head.weight.shape[0] == 64
    idx = torch.randint(50, (2, 8))
    logits, loss = model(idx, idx)
    assert logits.shape[-1] == 50
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction='sum')
    )
    loss.backward()
    assert (model.lm_head.weight.grad[50:] == 0).all() and (
        model.lm_head.weight.grad[:50] != 0
    ).any()


def test_rotary_positions_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16)
    rope = rotary(GPTConfig(5, block_size=128, n_head=1, n_embd=16))

    def score(i, j):
        return (rotate(q, rope[:, [[i]]]) * rotate(k, rope[:, [[j]]])).sum()

    torch.testing.assert_close(score(5, 3), score(105, 103), atol=1e-4, rtol=1e-4)
    assert (score(5, 3) - score(5, 4)).abs() > 1e-3


def test_rotation_is_a_turn_by_position_times_frequency():
    """Against the complex numbers of arXiv:2104.09864, pair by pair."""
    x = torch.randn(1, 7, 2, 16)
    angles = torch.arange(7)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.exp(-1j * angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    rope = rotary(GPTConfig(5, block_size=9, n_head=1, n_embd=16))
    torch.testing.assert_close(rotate(x, rope[:, :7]), expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def transformers_gpt2(tmp_path):
    """-> a tiny random GPT-2 of transformers, and the folder that it was saved to."""
    transformers = pytest.importorskip(
        'transformers', reason='a test-only package: pip install transformers'
    )

    def build(activation):
        torch.manual_seed(3)
        config = transformers.GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=32,
            n_positions=24,
            vocab_size=50,
            activation_function=activation,
        )
        theirs = transformers.GPT2LMHeadModel(config).eval()
        for p in theirs.parameters():
            torch.nn.init.normal_(p, std=0.2)
        theirs.save_pretrained(tmp_path)
        return theirs, tmp_path

    return build


def test_gpt2_logits_equal_those_of_transformers(transformers_gpt2):
    theirs, folder = transformers_gpt2('gelu_new')
    idx = torch.randint(50, (3, 24))
    difference = load_gpt2(str(folder)).eval()(idx)[0] - theirs(idx).logits
    assert difference.abs().max() < 1e-4


def test_a_nanogpt_checkpoint_loads_and_gives_its_logits(transformers_gpt2, tmp_path):
    """nanoGPT is GPT-2 with the exact GELU; its matrices are out x in, prefixed if compiled."""
    theirs, _ = transformers_gpt2('gelu')
    state = {}
    for name, p in theirs.state_dict().items():
        matrix = '.h.' in name and p.dim() == 2
        state['_orig_mod.' + name] = (p.t() if matrix else p).clone()
    args = dict(
        n_layer=2, n_head=2, n_embd=32, block_size=24, bias=True, vocab_size=50, dropout=0.0
    )
    torch.save(
        {
            'model': state,
            'model_args': args,
            'iter_num': 7,
            'best_val_loss': torch.tensor(1.5),
            'optimizer': {},
            'config': {'dataset': str(tmp_path)},
        },
        tmp_path / 'run.pt',
    )
    with open(tmp_path / 'meta.pkl', 'wb') as file:
        pickle.dump(
            {'vocab_size': 50, 'itos': {i: chr(65 + i) for i in range(50)}, 'stoi': {}}, file
        )
    model, tokenizer, checkpoint = load_model(str(tmp_path / 'run.pt'))
    idx = torch.randint(50, (2, 24))
    assert (model.eval()(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    assert tokenizer.decode([0, 2]) == 'AC' and checkpoint['iter_num'] == 7


def newton_schulz_float64(G):
    """Keller Jordan's iteration on one matrix, as the formula stands."""
    X = G.double() / (G.double().norm() + 1e-7)
    if G.shape[0] > G.shape[1]:
        return newton_schulz_float64(G.T).T
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


@pytest.mark.parametrize('shapes', [[(8, 8), (24, 8), (8, 24), (8, 24)]], ids=str)
def test_muon_equals_the_plain_formula_in_float64(shapes):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    plain = [w.detach().double() for w in weights]
    momentum = [torch.zeros_like(w) for w in plain]
    optimizer = Muon(weights, lr=0.1, weight_decay=0.05, dtype=torch.float32)
    for _ in range(3):
        for i, w in enumerate(weights):
            w.grad = torch.randn_like(w)
            g = w.grad.double()
            momentum[i] = 0.95 * momentum[i] + 0.05 * g
            update = newton_schulz_float64(0.05 * g + 0.95 * momentum[i])
            scale = max(1, w.shape[0] / w.shape[1]) ** 0.5
            plain[i] = plain[i] * (1 - 0.1 * 0.05) - 0.1 * scale * update
        optimizer.step()
    for w, p in zip(weights, plain):
        torch.testing.assert_close(w.detach().double(), p, atol=1e-4, rtol=1e-4)


def test_orthogonalized_matrices_have_singular_values_near_one():
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 16, 40)))
    assert 0.6 < singular.min() and singular.max() < 1.3


def test_every_parameter_has_exactly_one_optimizer(model):
    for muon_lr in 0.0, 0.02:
        groups = [
            g
            for o in model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), muon_lr)
            for g in o.param_groups
        ]
        owned = [id(p) for g in groups for p in g['params']]
        assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_flops_are_those_that_torch_counts():
    """torch counts attention's two products in full, once forward, twice backward: as PaLM."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(vocab_size=64)
    idx = torch.randint(64, (2, 24))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == pytest.approx(
        flops_per_token(model, model.config.block_size) * idx.numel(), rel=0.02
    )


@pytest.mark.parametrize(
    'wrong, words',
    [
        (dict(n_embd=33), 'n_embd = 33'),
        (dict(n_head=4, n_kv_head=3), 'n_kv_head=3'),
        (dict(norm='batch'), 'norm'),
        (dict(n_embd=6, n_head=2), 'even width'),
    ],
)
def test_an_impossible_architecture_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(50, **{**dict(n_embd=32, n_head=2), **wrong})


def test_the_two_families_differ_in_what_the_table_says():
    names = {
        name: {n for n, _ in tiny(**changes).named_parameters()}
        for name, changes in FAMILIES.items()
    }
    assert 'transformer.wpe.weight' in names['GPT-2'] - names['modern']
    assert 'lm_head.weight' in names['modern'] - names['GPT-2']
    assert json.dumps(GPT2)  # plain values: it travels in checkpoints


@pytest.mark.parametrize('family', FAMILIES)
def test_a_widened_model_says_the_same_of_the_tokens_it_knew(family):
    model = tiny(**{**FAMILIES[family], 'vocab_size': 50})
    wider = widen(model, 57).eval()
    idx = torch.randint(50, (2, 9))
    old, new = model(idx)[0], wider(idx)[0]
    assert new.shape == (2, 9, 57)
    torch.testing.assert_close(new[..., :50], old)
    torch.testing.assert_close(new[..., 50:], old.mean(-1, keepdim=True).expand(-1, -1, 7))
    assert (wider.lm_head.weight is wider.transformer.wte.weight) == model.config.tied


def test_each_block_sees_the_embedding_again_as_much_as_it_learned_to_want():
    plain, model = tiny(x0=False), tiny(seed=1)
    model.load_state_dict(plain.state_dict(), strict=False)
    model.keep.data = torch.tensor([1.0, 1.0])
    model.again.data = torch.tensor([0.0, 0.0])
    idx = torch.randint(50, (2, 9))
    torch.testing.assert_close(model(idx)[0], plain(idx)[0])
    model.keep.data = torch.tensor([0.9, 0.5])
    model.again.data = torch.tensor([0.2, -0.3])
    context = model.make_context(idx, None)
    first, second = model.transformer.h
    x0 = F.rms_norm(model.transformer.wte(idx), (32,))
    x = first(1.1 * x0, context)
    x = second(0.5 * x - 0.3 * x0, context)
    expected = F.rms_norm(x, (32,)) @ model.lm_head.weight.T
    torch.testing.assert_close(model(idx)[0], expected[..., :50], atol=1e-5, rtol=1e-4)
