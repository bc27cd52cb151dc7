"""Decoding: the cached loop against the slow way, windows, sampling, hostile checkpoints."""

import dataclasses
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ROOT, inside, tiny
from torch.nn import functional as F

from data.models import read_checkpoint
from extras import quantize
from extras.machine import weight_bytes
from extras.quantize import Int4Linear, Int8Linear, quantize_model
from extras.row_linear import RowLinear, use_row_linears
from sample import Request, Sampling, decode, generate, probabilities


def slow(model, prompt, count, seed=0, end=None, **how):
    """The slow way: a pass over the whole context for every token, and the window rule."""
    rng, window = np.random.default_rng(seed), model.config.block_size
    text, context = list(prompt), list(prompt)[-window:]
    while len(text) < len(prompt) + count:
        logits = model(torch.tensor([context]))[0][:, -1]
        sums = probabilities(logits, **how)[0].double().cumsum(0)
        token = int(torch.searchsorted(sums, rng.random() * sums[-1], right=True))
        text.append(token)
        if token == end:
            break
        context = text[-(window // 2) :] if len(context) == window else context + [token]
    return text[len(prompt) :]


def test_cached_decoding_writes_the_same_tokens_as_the_slow_way(model):
    for how in (
        dict(temperature=0),
        dict(temperature=1.0, seed=5),
        dict(temperature=0.7, top_k=5),
        dict(top_p=0.5),
    ):
        seed = how.pop('seed', 0)
        written = generate(model, [[1, 2, 3]], 18, Sampling(**how), seed)
        assert written == [slow(model, [1, 2, 3], 18, seed, **how)]


@pytest.mark.parametrize('family', FAMILIES)
def test_a_large_model_laid_for_reading_computes_the_same(family):
    """Its one-row products are shared out among threads; also where they do not divide evenly."""
    model = tiny(n_embd=256, vocab_size=1100, **FAMILIES[family])
    expected = generate(model, [[1, 2, 3]], 20, Sampling(0))
    x = torch.randn(1, 1, 256)
    logits, before = model.lm_head(x), model.state_dict()
    assert use_row_linears(model) is model and type(model.lm_head) is RowLinear
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    torch.testing.assert_close(model.lm_head(x), logits, atol=1e-5, rtol=1e-4)
    assert generate(model, [[1, 2, 3]], 20, Sampling(0)) == expected
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.testing.assert_close(model.lm_head(x), logits, atol=1e-5, rtol=1e-4)
    torch.set_num_threads(threads)


@pytest.mark.parametrize('bias', [True, False])
def test_one_row_in_bf16_is_the_product_rounded_once(bias):
    model = torch.nn.Sequential(torch.nn.Linear(300, 1000, bias=bias)).bfloat16()
    x = torch.randn(1, 1, 300).bfloat16()
    layer = use_row_linears(model)[0]
    assert type(layer) is RowLinear and layer.weight.is_contiguous()
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    assert (layer(x).double() - exact).norm() < 4e-3 * exact.norm()
    rows = torch.randn(5, 300).bfloat16()
    assert torch.equal(layer(rows), F.linear(rows, layer.weight, layer.bias))


@pytest.mark.parametrize('length', [23, 24, 25, 60])
def test_prompts_around_the_window_and_samples_beyond_it(model, length):
    prompt = [(7 * i) % 50 for i in range(length)]
    assert generate(model, [prompt], 40, seed=2) == [slow(model, prompt, 40, seed=2)]


def test_batched_rows_get_what_each_gets_alone(model):
    prompts = [[1], [4, 5, 6, 7, 8, 9, 10], [2, 3]]
    together = generate(model, prompts, 30, Sampling(0.9), seed=11)
    assert together == [
        generate(model, [p], 30, Sampling(0.9), seed=11 + i)[0] for i, p in enumerate(prompts)
    ]


def test_a_row_stops_at_its_end_token_and_the_others_go_on(model):
    prompts = [[i] for i in range(6)]
    free = generate(model, prompts, 20, seed=3)
    end = free[2][4]
    stopped = generate(model, prompts, 20, seed=3, end=(end,))
    assert stopped == [text[: text.index(end) + 1] if end in text else text for text in free]
    assert len(stopped[2]) <= 5


def mixture():
    """Requests of every kind: prompts at and around the window, twins, own ways to draw, ends."""
    rng = np.random.default_rng(0)
    lengths = [1, 3, 3, 23, 24, 25, 60, 1, 5, 5, 5, 12, 7, 2, 9]
    prompts = [rng.integers(0, 50, n).tolist() for n in lengths]
    prompts[9] = prompts[10] = prompts[8]
    prompts[2] = prompts[1]
    ways = [{}, {'temperature': 0}, {'top_k': 3}, {'top_p': 0.5}, {'temperature': 0.7, 'top_k': 9}]
    return [
        Request(
            prompt,
            int(rng.integers(1, 40)),
            Sampling(**ways[i % 5]),
            seed=i,
            end=(7, 9),
            tool=(lambda ids: [1, 2, 3] if ids[-1] % 5 == 0 else []) if i % 3 == 0 else None,
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize('rows', [1, 2, 4, 15])
def test_any_mixture_of_requests_gives_each_what_it_gets_alone(model, rows):
    """Refilled rows, gaps that close, shared prompts, forced tokens, windows that slide."""
    alone = mixture()
    for request in alone:
        for _ in decode(model, [request], 1):
            pass
    together = mixture()
    started = []

    def source():
        for request in together:
            started.append(request)
            yield request
            if len(started) % 4 == 0:
                yield None  # nothing to give for the moment

    for _ in decode(model, source(), rows):
        running = [request for request in started if not request.reason]
        assert len(running) <= rows
    assert [(r.ids, r.reason) for r in together] == [(r.ids, r.reason) for r in alone]
    for a, b in zip(together, alone):
        assert [x is None for x in a.logprobs] == [x is None for x in b.logprobs]
        real = [[x for x in r.logprobs if x is not None] for r in (a, b)]
        torch.testing.assert_close(*map(torch.tensor, real), atol=1e-4, rtol=1e-4)
    assert {r.reason for r in together} == {'end', 'length'}


def test_a_row_that_ends_is_refilled_without_waiting_for_the_others(model):
    lengths = [30, 2, 2, 2, 2, 2]
    requests = [Request([i], n) for i, n in enumerate(lengths)]
    order = [requests.index(r) for r in decode(model, requests, 2) if r.reason]
    assert order == [1, 2, 3, 4, 5, 0]


def test_samples_of_one_prompt_share_its_prefill(model):
    """Counted: the tokens that the model reads."""
    read, forward = [], model.forward
    prompt = list(range(20))
    model.forward = lambda idx, **how: (read.append(int((idx >= 0).sum())), forward(idx, **how))[1]
    generate(model, [prompt] * 5, 3)
    assert sum(read) == 20 + 4 * 1 + 5 * 2
    assert generate(model, [prompt] * 2, 3, seed=4)[1] == generate(model, [prompt], 3, seed=5)[0]


def test_a_context_is_read_in_one_pass_also_after_a_prompt_that_fills_the_window(monkeypatch):
    model, shapes = tiny(block_size=24), []
    forward = model.forward

    def watched(idx, **how):
        shapes.append(tuple(idx.shape))
        return forward(idx, **how)

    monkeypatch.setattr(model, 'forward', watched)
    for _ in decode(model, [Request([1] * 24, 4), Request([2] * 10, 4)], 2):
        pass
    assert shapes[:3] == [(1, 24), (1, 12), (1, 10)]  # the later half of the window is read again
    assert shapes[3:] and all(width == 1 for _, width in shapes[3:])


def test_a_prompt_is_not_shared_once_its_window_has_slid(model):
    prompt = [5, 6, 7, 8, 9]
    requests = [Request(prompt, 60), Request([1], 35), Request(prompt, 15, seed=8)]
    for _ in decode(model, requests, 2):
        pass
    assert requests[2].ids == generate(model, [prompt], 15, seed=8)[0]


def test_log_probabilities_are_those_of_one_pass_over_the_whole_text(model):
    requests = [
        Request([3, 1, 4, 1, 5], 12, seed=8),
        Request([2, 7], 15, Sampling(0.7, 4, 0.9), seed=1),
        Request([2, 7, 1], 14, seed=1, tool=lambda ids: [4, 4] if len(ids) == 5 else []),
    ]
    for _ in decode(model, requests, 3):
        pass
    for request in requests:
        text = torch.tensor([request.prompt + request.ids])
        logits = model(text)[0][0, len(request.prompt) - 1 : -1]
        how = dataclasses.asdict(request.sampling)
        expected = probabilities(logits, **how).log().gather(1, torch.tensor(request.ids)[:, None])
        for got, want in zip(request.logprobs, expected[:, 0].tolist(), strict=True):
            assert got is None or got == pytest.approx(want, abs=1e-4)
    assert [i for i, p in enumerate(requests[2].logprobs) if p is None] == [5, 6]
    assert requests[2].ids[5:7] == [4, 4]


def test_a_cancelled_request_leaves_its_row_and_its_neighbours_alone(model):
    alone = generate(model, [[1, 2], [3], [4, 5, 6]], 20, seed=7)
    requests = [Request(p, 20, seed=7 + i) for i, p in enumerate([[1, 2], [3], [4, 5, 6]])]
    for _ in decode(model, requests, 2):
        requests[0].cancelled = len(requests[0].ids) == 4
    assert requests[0].reason == 'cancelled' and requests[0].ids == alone[0][:4]
    assert [r.ids for r in requests[1:]] == alone[1:]


def test_an_endless_source_and_one_that_has_nothing_yet(model):
    def endless():
        for i in itertools.count():
            yield Request([i % 50], 3, seed=i)

    done = (r for r in decode(model, endless(), 4) if r.reason)
    assert [len(r.ids) for r in itertools.islice(done, 50)] == [3] * 50
    assert list(decode(model, [None, None], 2)) == [None, None]
    assert list(decode(model, [], 2)) == []


def test_probabilities_are_those_of_the_formula():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    softmax = logits.exp() / logits.exp().sum()
    torch.testing.assert_close(probabilities(logits), softmax)
    torch.testing.assert_close(
        probabilities(logits, temperature=0.5), (2 * logits).exp() / (2 * logits).exp().sum()
    )
    assert probabilities(logits, temperature=0).tolist() == [[1, 0, 0, 0]]
    torch.testing.assert_close(
        probabilities(logits, top_k=2), torch.tensor([[0.7310586, 0.2689414, 0, 0]])
    )
    torch.testing.assert_close(probabilities(logits, top_p=0.6), torch.tensor([[1.0, 0, 0, 0]]))
    torch.testing.assert_close(
        probabilities(logits, top_p=0.7), torch.tensor([[0.7310586, 0.2689414, 0, 0]])
    )


def test_tokens_are_drawn_as_often_as_their_probability():
    model = tiny(vocab_size=6)
    expected = model(torch.tensor([[1]]))[0][0, -1].softmax(0)
    drawn = torch.tensor(generate(model, [[1]] * 4000, 1, seed=100)).flatten()
    counted = torch.bincount(drawn, minlength=6) / 4000
    assert (counted - expected).abs().max() < 0.03


def test_ids_beyond_the_vocabulary_are_never_drawn():
    model = tiny(vocab_size=3, vocab_multiple=64)
    assert set(sum(generate(model, [[0]] * 50, 20, Sampling(5.0)), [])) <= {0, 1, 2}


def test_a_run_samples_by_its_folder_alone(trained, tmp_path):
    text = inside(
        'sample.py',
        f'--out_dir={trained}',
        '--start=To be',
        '--num_samples=3',
        '--max_new_tokens=40',
        cwd=tmp_path,
    )
    assert text.count('To be') >= 3 and text.count('---------------') == 3
    assert 'tokens/s' in text and 'memory bandwidth' in text
    assert (
        inside(
            'sample.py', f'--out_dir={trained}', '--num_samples=1', '--max_new_tokens=5', '--seed=4'
        ).split('-----')[0]
        == inside(
            'sample.py', f'--out_dir={trained}', '--num_samples=1', '--max_new_tokens=5', '--seed=4'
        ).split('-----')[0]
    )


@pytest.mark.skipif(os.name != 'posix', reason='pipes of a Unix shell')
def test_a_reader_that_leaves_ends_the_program_quietly(trained):
    command = [sys.executable, str(ROOT / 'sample.py'), f'--out_dir={trained}', '--device=cpu']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 1


def test_a_prompt_from_a_file_and_one_longer_than_the_window(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('that is the question.\n' * 3)
    text = inside(
        'sample.py',
        f'--out_dir={trained}',
        f'--start=FILE:{tmp_path}/prompt.txt',
        '--num_samples=1',
        '--max_new_tokens=40',
    )
    assert (
        'the prompt has 66 tokens; the model sees the last 16' in text
        and text.count('question') >= 3
    )


def test_the_end_token_in_a_prompt_is_the_token(trained):
    text = inside(
        'sample.py',
        f'--out_dir={trained}',
        '--start=<|endoftext|>To',
        '--num_samples=1',
        '--max_new_tokens=2',
    )
    assert text.startswith('<|endoftext|>To')


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--start=To \u00e9'], "'é' (U+00E9)"),
        (['--temperature=-1'], 'temperature=-1: must be from 0 to 100'),
        (['--top_k=-1'], 'top_k=-1: must be from 0'),
        (['--top_p=0'], 'top_p=0: must be from 1e-6 to 1'),
        (['--start=FILE:/nowhere'], 'No such file'),
        (['--start=FILE:/dev/null'], 'No such file'),     # /dev/zero would never end
        (['--device=tpu'], 'choose cuda'),
        (['--dtype=float16', '--device=cpu'], 'float16 (only on CUDA)'),
        (['--num_samples=0'], 'num_samples=0: must be from 1 to'),
        (['--quantize=int2'], '--quantize=int2: choose int8 or int4'),
    ],
)
def test_bad_input_to_sampling_is_one_clear_line(trained, arguments, words):
    assert words in inside('sample.py', f'--out_dir={trained}', *arguments, ok=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has the GPU')
@pytest.mark.parametrize('script', ['sample.py', 'train.py'])
def test_a_gpu_that_is_absent_is_refused(script):
    assert 'PyTorch finds no such device' in inside(script, '--device=cuda', ok=False)


def test_a_missing_run_lists_those_that_exist(trained):
    assert f'out-x: no run there; there are: {trained.name}' in inside(
        'sample.py', '--out_dir=out-x', cwd=trained.parent, ok=False
    )


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('exploded',)


@pytest.mark.parametrize('name', ['ckpt.pt', 'best.pt'])
def test_a_damaged_checkpoint_is_named_and_the_other_offered(trained, tmp_path, name):
    for file in 'ckpt.pt', 'best.pt':
        (tmp_path / file).write_bytes((trained / file).read_bytes())
    whole = (tmp_path / name).read_bytes()
    other = 'best.pt' if name == 'ckpt.pt' else 'ckpt.pt'
    for damaged in b'', whole[:1000], whole[:-500], b'garbage' * 100:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f'{name}: damaged.*cp .*{other}'):
            read_checkpoint(tmp_path / name)


def test_a_checkpoint_that_carries_code_is_refused_unexecuted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Bomb(), 'model_args': {}}, 'ckpt.pt')
    with pytest.raises(ValueError, match='carries code'):
        read_checkpoint('ckpt.pt')
    (tmp_path / 'ckpt.pt').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match='ckpt.pt: (damaged|refused)'):
        read_checkpoint('ckpt.pt')
    assert not (tmp_path / 'exploded').exists()


def test_a_checkpoint_of_another_architecture_is_named(trained, tmp_path):
    checkpoint = read_checkpoint(trained / 'ckpt.pt')
    for change in {'n_embd': 64}, {'n_expert': 4}, {'n_head': 5}:
        torch.save(
            {**checkpoint, 'model_args': {**checkpoint['model_args'], **change}},
            tmp_path / 'ckpt.pt',
        )
        assert 'another architecture' in inside('sample.py', f'--out_dir={tmp_path}', ok=False)
    args = {**checkpoint['model_args'], 'n_layer': 9999}    # which would take for ever to make
    torch.save({**checkpoint, 'model_args': args}, tmp_path / 'ckpt.pt')
    assert '(9999 layers, ' in inside('sample.py', f'--out_dir={tmp_path}', ok=False)
    torch.save({'weights': 1}, tmp_path / 'ckpt.pt')
    assert 'not a checkpoint' in inside('sample.py', f'--out_dir={tmp_path}', ok=False)


def test_every_family_decodes_in_bfloat16():
    for changes in FAMILIES.values():
        assert len(generate(tiny(**changes).bfloat16(), [[1, 2], [3]], 30)[1]) == 30


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('rows', [1, 8])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kernel', [True, False])
def test_int8_is_the_product_with_the_rounded_weights(dtype, rows, bias, kernel, monkeypatch):
    """The kernel too rounds the weights alone: what it does to the rows is not to be seen."""
    if kernel and torch.backends.quantized.engine != 'x86':
        pytest.skip('this machine has no such kernel')
    if not kernel:
        monkeypatch.setattr(quantize, 'packed_for_cpu', lambda weight, scale: None)
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias=bias).to(dtype)
    x = torch.randn(2, rows, 96, dtype=dtype)[:1] * torch.logspace(-3, 3, rows)[:, None].to(dtype)
    linear.weight.data = linear.weight.data.t().contiguous().t()  # as laid for reading
    small = Int8Linear(linear)
    weight = linear.weight.detach().double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    dequantized = (weight / scale).round().clamp(-127, 127) * scale
    assert (dequantized - weight).abs().max() <= scale.max() * 0.51
    assert (small.packed is not None) == kernel and small.nbytes == weight.numel()
    exact = x.double() @ dequantized.T
    expected = exact + (linear.bias.double() if bias else 0)
    worst = (small(x).double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert worst.max() < (3e-4 if dtype == torch.float32 else 1e-2)
    assert small(x).dtype == dtype


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('rows', [1, 8])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('outputs', [48, 40])   # the kernel takes multiples of 16
def test_int4_is_the_product_with_the_rounded_weights(dtype, rows, bias, outputs):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, outputs, bias=bias).to(dtype)
    x = torch.randn(2, rows, 96, dtype=dtype)
    small = Int4Linear(linear)
    groups = linear.weight.detach().double().unflatten(1, (3, 32))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    dequantized = low + ((groups - low) / step).round() * step
    assert ((dequantized - groups).abs() <= step * 0.51).all()
    expected = x.double() @ dequantized.flatten(1).T + (linear.bias.double() if bias else 0)
    ours = small(x)
    assert (ours.double() - expected).norm() < 1e-2 * expected.norm() and ours.dtype == dtype
    assert (small.packed is not None) == (outputs == 48)
    assert small.nbytes == 96 * outputs * (1 / 2 + 4 / 32)


def test_in_4_bits_blocks_are_narrow_and_the_head_is_not():
    idx, shape = torch.randint(50, (2, 20)), dict(n_embd=64)
    exact, model = tiny(**shape)(idx)[0], quantize_model(tiny(**shape), 'int4')
    kinds = {type(m) for m in model.transformer.h.modules() if hasattr(m, 'nbytes')}
    assert kinds == {Int4Linear} and type(model.lm_head) is Int8Linear
    assert 0 < (model(idx)[0] - exact).norm() < 0.3 * exact.norm()
    whole = quantize_model(tiny(n_embd=48), 'int4')     # 48 is no multiple of 32
    assert type(whole.transformer.h[0].attn.c_attn) is Int8Linear
    assert len(generate(model, [[1, 2], [3]], 9)[1]) == 9


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_bytes_are_counted_of_quantized_models(kind, trained):
    text = inside('sample.py', f'--out_dir={trained}', f'--quantize={kind}', '--num_samples=1',
                  '--max_new_tokens=4')  # fmt: skip
    assert 'of the memory bandwidth' in text
    model = tiny(n_embd=64)
    exact = weight_bytes(model)
    assert exact / 9 < weight_bytes(quantize_model(model, kind)) < exact / 3.9


def test_a_mixture_of_experts_is_not_quantized():
    with pytest.raises(ValueError, match='int8: not for mixtures of experts'):
        quantize_model(tiny(**FAMILIES['experts']))


def test_a_quantized_model_decodes_nearly_as_before(model):
    if model.config.n_expert:
        pytest.skip('refused, see above')
    x = torch.arange(20)[None]
    before = model(x)[0].log_softmax(-1)
    assert quantize_model(model) is model and not any(
        isinstance(m, torch.nn.Linear) for m in model.modules()
    )
    after = model(x)[0].log_softmax(-1)
    assert 0 < (before.exp() * (before - after)).sum(-1).mean() < 0.01  # KL
    assert len(generate(model, [[1], [2, 3]], 30)[1]) == 30
