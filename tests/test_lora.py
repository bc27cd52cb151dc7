"""LoRA: what learns, that it starts as its model, resumes to the bit, and is PEFT's."""

import pytest
import torch
from conftest import TINY, inside, tiny
from torch.nn import functional as F

from data.models import load_model, read_checkpoint
from extras import lora
from extras.export_adapter import export_adapter
from extras.lora import add_lora, layers_of, merged_state, restore_lora

CONFIG = dict(lora_rank=4, lora_alpha=lora.lora_alpha, muon_lr=0.0, shard=False, seed=1,
              checkpoint='whole', fp8=False, init_from='out')  # fmt: skip
LLAMA = dict(x0=False, norm='rms_gain', activation='swiglu', qk_norm=False, n_inner=48, n_kv_head=1)


def with_lora(model, **changes):
    add_lora(model, {**CONFIG, **changes})
    return model


def stirred(model):
    for layer in layers_of(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def test_it_starts_as_the_model_that_it_is_from_and_only_it_learns(model):
    idx = torch.randint(50, (2, 20))
    before = model(idx)[0]
    if model.config.n_expert:
        with pytest.raises(ValueError, match='not for mixtures of experts'):
            with_lora(model)
        return
    with_lora(model)
    assert torch.equal(model(idx)[0], before)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(name.endswith(('lora_A', 'lora_B')) for name in names)
    optimizer, = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    model(idx, idx)[1].backward()
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in names}
    optimizer.step()
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    assert not torch.equal(model(idx)[0], before)
    assert sum(len(state) > 1 for state in optimizer.state.values()) == len(names)


def test_the_change_is_alpha_over_rank_times_b_a_and_merged_it_is_the_same():
    model, idx = stirred(with_lora(tiny())), torch.randint(50, (2, 20))
    layer = model.transformer.h[1].mlp.c_fc
    x = torch.randn(3, 32)
    by_hand = x @ (layer.weight + 16.0 / 4 * layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(x), by_hand, atol=1e-5, rtol=1e-4)
    state, plain = merged_state(model), tiny(seed=5)
    plain.load_state_dict(state['model'])
    torch.testing.assert_close(plain(idx)[0], model(idx)[0], atol=1e-4, rtol=1e-4)
    again = with_lora(tiny(seed=6), seed=9)
    again.load_state_dict({n: p for n, p in state['model'].items()}, strict=False)
    restore_lora(again, state['lora'])
    assert torch.equal(again(idx)[0], model(idx)[0])


def finetune(base, out, *more, ok=True):
    dataset = read_checkpoint(f'{base}/ckpt.pt')['config']['dataset']
    return inside('train.py', *TINY, f'--dataset={dataset}', f'--init_from={base}', '--lora_rank=4',
                  f'--out_dir={out}', '--eval_interval=3', '--learning_rate=1e-2', *more, ok=ok)


def test_a_run_resumes_to_the_bit_and_its_checkpoint_is_a_model(trained, tmp_path):
    whole, parts = f'{tmp_path}/whole', f'{tmp_path}/parts'
    finetune(trained, whole, '--max_iters=6', '--dropout=0.1')
    finetune(trained, parts, '--max_iters=3', '--lr_decay_iters=6', '--dropout=0.1')
    inside(
        'train.py', *TINY, f'--dataset={read_checkpoint(f"{whole}/ckpt.pt")["config"]["dataset"]}',
        '--init_from=resume', '--lora_rank=4', f'--out_dir={parts}', '--eval_interval=3',
        '--learning_rate=1e-2', '--max_iters=6', '--dropout=0.1')  # fmt: skip
    a, b = (read_checkpoint(f'{out}/ckpt.pt') for out in (whole, parts))
    assert a['model'].keys() == b['model'].keys() == load_model(whole)[0].state_dict().keys()
    assert all(torch.equal(a['model'][n], b['model'][n]) for n in a['model'])
    base = read_checkpoint(f'{trained}/ckpt.pt')['model']
    changed = {n for n in base if not torch.equal(base[n], a['model'][n])}
    assert changed == {f'{n}.weight' for n in a['lora']}
    inside('sample.py', f'--out_dir={whole}', '--num_samples=1', '--max_new_tokens=5')


def test_what_does_not_go_with_it_is_one_line(trained, tmp_path):
    for more, words in (
        (['--muon_lr=0.02'], 'set --muon_lr=0'), (['--lora_rank=-1'], 'at least 0'),
        (['--lora_targets=c_attn,c_x'], 'c_x is no matrix'),
        (['--checkpoint=sharded'], 'set --checkpoint=whole'), (['--fp8=True'], 'set --fp8=False'),
        (['--init_from=scratch'], 'choose a model to start from'),
        (['--stage=sft'], 'never taught to chat'),
    ):  # fmt: skip
        assert words in finetune(trained, f'{tmp_path}/x', '--max_iters=2', *more, ok=False)
    finetune(trained, f'{tmp_path}/y', '--max_iters=2')
    text = inside('train.py', *TINY, '--init_from=resume', f'--out_dir={tmp_path}/y',
                  '--lora_rank=2', '--max_iters=4', '--dataset='
                  + read_checkpoint(f'{tmp_path}/y/ckpt.pt')['config']['dataset'],
                  '--eval_interval=3', '--learning_rate=1e-2', ok=False)  # fmt: skip
    assert 'the run that is resumed has lora_rank=4' in text
    text = inside('train.py', *TINY, '--init_from=resume', f'--out_dir={tmp_path}/y',
                  '--lora_rank=4', '--lora_alpha=64', '--max_iters=4', '--dataset='
                  + read_checkpoint(f'{tmp_path}/y/ckpt.pt')['config']['dataset'],
                  '--eval_interval=3', '--learning_rate=1e-2', ok=False)  # fmt: skip
    assert 'the run that is resumed has lora_alpha=16.0' in text


@pytest.mark.parametrize('kind', ['Llama', 'NanoChat'])
def test_peft_computes_the_same_from_the_exported_adapter(kind, tmp_path):
    peft, hf = pytest.importorskip('peft'), pytest.importorskip('transformers')
    from test_export import LETTERS

    from extras.export import export

    shape = LLAMA if kind == 'Llama' else dict(x0=False)
    base = tiny(**shape, vocab_size=LETTERS.vocab_size)
    export(base, LETTERS, False, tmp_path / 'base')
    model = stirred(with_lora(base))
    checkpoint = {'config': CONFIG, **merged_state(model)}
    plain = tiny(**shape, vocab_size=LETTERS.vocab_size)
    export_adapter(checkpoint, plain, tmp_path / 'adapter')
    theirs = peft.PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / 'base'), tmp_path / 'adapter').eval()
    idx = torch.randint(1, LETTERS.vocab_size, (2, 20))
    with torch.no_grad():
        ours, expected = model(idx)[0], theirs(idx).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    assert F.mse_loss(ours, tiny(**shape, vocab_size=LETTERS.vocab_size)(idx)[0]) > 1e-3


def test_the_card_counts_what_learns():
    from types import SimpleNamespace

    from extras.card import memory

    model = tiny(n_embd=128)
    run = SimpleNamespace(
        model=model, world=1, dtype=torch.float32, stage=SimpleNamespace(samples=0, reference=0),
        config=dict(batch_size=1, block_size=24, muon_lr=0, shard=False, recompute=False))
    weights, state, _, _ = memory(run)
    count = sum(p.numel() for p in model.parameters())
    assert (weights, state) == (8 * count, 8 * count)
    with_lora(model, lora_rank=2)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights, state, _, _ = memory(run)
    assert (weights, state) == (4 * (count + 2 * learned), 8 * learned)
