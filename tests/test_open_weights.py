"""Published models as transformers computes them, from folders as transformers writes them."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from extras.open_weights import FAMILIES, load, places, turn
from sample import Sampling, generate

LLAMA_3 = dict(rope_type='llama3', rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=8192)  # fmt: skip
KINDS = {
    'Llama': {},
    'Llama, tied': dict(tie_word_embeddings=True),
    'Llama, stretched': dict(max_position_embeddings=40000, hidden_size=64,
                             rope_parameters=LLAMA_3),
    'Mistral': dict(sliding_window=50),
    'Qwen2': {},
    'Qwen3': dict(head_dim=16),
    'Mixtral': dict(num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def write(kind, folder, **how):
    """-> transformers' model of a kind with random weights, which is written to a folder"""
    transformers = pytest.importorskip('transformers')
    name = kind.split(',')[0]
    torch.manual_seed(0)
    config = getattr(transformers, f'{name}Config')(**{**dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64), **KINDS[kind]})
    model = getattr(transformers, f'{name}ForCausalLM')(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float('norm' in name), std=0.2)
    model.save_pretrained(folder, **how)
    return model  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_logits_and_gradients_are_those_of_transformers(kind, tmp_path):
    theirs = write(kind, tmp_path)
    ours, idx = load(tmp_path).eval(), torch.randint(96, (2, 150 if 'stretched' in kind else 30))
    logits, expected = ours(idx)[0], theirs(idx).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    logits.cos().sum().backward()
    expected.cos().sum().backward()
    truth = dict(theirs.named_parameters())
    for i, block in enumerate(ours.transformer.h):
        grad = truth[f'model.layers.{i}.self_attn.o_proj.weight'].grad
        torch.testing.assert_close(block.attn.c_proj.weight.grad, grad, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_cached_rows_of_unequal_lengths_write_what_transformers_does(kind, tmp_path):
    theirs, prompts = write(kind, tmp_path), [[5, 17, 80, 3], [9], list(range(1, 21))]
    ours = load(tmp_path).eval()
    for prompt, ids in zip(prompts, generate(ours, prompts, 20, Sampling(temperature=0.0)),
                           strict=True):  # fmt: skip
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False,
                                   pad_token_id=0, eos_token_id=None)  # fmt: skip
        assert prompt + ids == expected[0].tolist()


def test_shards_and_half_precision(tmp_path):
    model = write('Llama', tmp_path / 'one')
    model.to(torch.bfloat16).save_pretrained(tmp_path / 'many', max_shard_size='20KB')
    assert len(list((tmp_path / 'many').glob('*.safetensors'))) > 2
    one, many = load(tmp_path / 'one'), load(tmp_path / 'many')
    assert next(many.parameters()).dtype == torch.bfloat16
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_places_are_all_of_the_model_and_turning_twice_changes_nothing(tmp_path):
    for kind in 'Llama, tied', 'Qwen3', 'Mixtral':
        write(kind, tmp_path)
        model = load(tmp_path)
        size = sum(part.numel() for part, _ in places(model).values())
        assert size == sum(p.numel() for p in model.parameters())
    x = torch.randn(12, 5)
    assert torch.equal(turn(turn(x, 4), 4), x) and not torch.equal(turn(x, 4), x)


def change(folder, **values):
    path = folder / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    'how, words',
    [
        (lambda f: os.remove(f / 'config.json'), 'no config.json there'),
        (lambda f: (f / 'config.json').write_text('{'), 'damaged'),
        (lambda f: change(f, architectures=['Falcon']), 'architecture Falcon: known are Llama'),
        (lambda f: change(f, rope_parameters={'rope_type': 'yarn', 'rope_theta': 1.0}), 'yarn'),
        (lambda f: change(f, hidden_act='gelu'), 'hidden_act=gelu'),
        (lambda f: change(f, attention_bias=True), 'attention_bias'),
        (lambda f: change(f, num_hidden_layers='3'), 'damaged'),
        (lambda f: change(f, num_hidden_layers=4), 'layers.3'),
        (lambda f: change(f, intermediate_size=40), 'is (48, 32), not (40, 32)'),
        (lambda f: os.remove(f / 'model.safetensors'), 'no model.safetensors there'),
        (lambda f: os.rename(f / 'model.safetensors', f / 'pytorch_model.bin'), 'pickled'),
        (lambda f: (f / 'model.safetensors').write_bytes(b'x' * 50), 'damaged'),
    ],
)
def test_what_cannot_be_read_is_one_line(how, words, tmp_path):
    write('Llama', tmp_path)
    how(tmp_path)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_a_tensor_too_many_and_one_too_few(tmp_path):
    write('Llama', tmp_path)
    path = tmp_path / 'model.safetensors'
    tensors = load_file(path)
    for name, content in (
        ('embed_tokens.weight is missing', {n: t for n, t in tensors.items() if 'embed' not in n}),
        ('more is unknown', {**tensors, 'more': torch.zeros(1)}),
    ):
        save_file(content, path)
        with pytest.raises(ValueError, match=name):
            load(tmp_path)


def test_the_hub_is_asked_for_what_is_no_folder(monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    monkeypatch.setattr(hub, 'snapshot_download', lambda *_, **__: 1 / 0)
    with pytest.raises(ConnectionError, match='nobody/nothing: no folder here'):
        load('nobody/nothing')
    assert len(FAMILIES) == 6
