"""Exported models, as transformers reads them; and read again, to the bit."""

import json

import pytest
import torch
from conftest import ROOT, inside, tiny

from data.models import is_taught, load_model
from data.tokenizer import Tokenizer
from data.vocabulary import PATTERN
from extras.export import architecture_of, chat_template, export, merge_of, tokenizer_of
from model import GPT2, GPTConfig
from sample import Sampling, generate

hf = pytest.importorskip('transformers')
OURS = dict(x0=False, ngrams=1)
LLAMA = dict(OURS, norm='rms_gain', norm_eps=1e-5, activation='swiglu', qk_norm=False, n_inner=48)
KINDS = {
    'GPT2': dict(GPT2),
    'GPT2 without biases': dict(GPT2, bias=False, activation='gelu_tanh', vocab_multiple=64),
    'NanoChat': dict(OURS, n_head=4, n_kv_head=2, rope_base=500.0),
    'Llama': dict(LLAMA, n_head=4, n_kv_head=2, tied=True, rope_factor=8.0),
    'Qwen2': dict(LLAMA, qkv_bias=True),
    'Qwen3': dict(LLAMA, qk_norm=True, qk_gain=True, head_width=8),
    'Mixtral': dict(LLAMA, n_expert=4, n_kv_head=1),
}
LETTERS = Tokenizer.of_text('abcdefghijklmnop .\n')
TALK = [{'role': 'user', 'content': 'a bad\ncab'}, {'role': 'assistant', 'content': 'ok.'}]


def written(kind, folder, tokenizer=LETTERS):
    model = tiny(**{'vocab_size': tokenizer.vocab_size, **KINDS[kind]})
    export(model, tokenizer, True, folder)
    return model


@pytest.mark.parametrize('kind', KINDS)
def test_transformers_computes_the_same_and_back_it_is_the_same_bits(kind, tmp_path):
    ours = written(kind, tmp_path)
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__.startswith(kind.split()[0])
    idx = torch.randint(1, ours.config.vocab_size, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=1e-5, rtol=1e-4)
    written_by = theirs.generate(idx[:1, :5], max_new_tokens=15, do_sample=False, pad_token_id=0,
                                 eos_token_id=None)[0, 5:].tolist()  # fmt: skip
    assert written_by == generate(ours, idx[:1, :5].tolist(), 15, Sampling(temperature=0.0))[0]
    if not kind.startswith('GPT2'):     # a GPT-2's vocabulary is known by its name
        back, tokenizer, _ = load_published(tmp_path, ours)
        assert all(torch.equal(p, ours.state_dict()[name][:len(p)])
                   for name, p in back.state_dict().items())  # fmt: skip
        assert torch.equal(back.eval()(idx)[0], ours(idx)[0])


def load_published(folder, ours):
    """The model alone: a tokenizer of characters is no byte-level BPE."""
    from extras.gpt2 import load_gpt2
    from extras.open_weights import load

    model = load_gpt2(folder) if ours.config.norm == 'layer' else load(folder)
    return model, None, None


def test_gpt2_comes_back(tmp_path):
    ours = written('GPT2', tmp_path)
    back, _, _ = load_published(tmp_path, ours)
    assert all(torch.equal(p, ours.state_dict()[name]) for name, p in back.state_dict().items())


def test_a_gpt2_of_another_vocabulary_comes_back_with_it(tmp_path):
    tokenizer = learned()
    ours = tiny(**GPT2, vocab_size=tokenizer.vocab_size, n_inner=48)
    export(ours, tokenizer, True, tmp_path)
    back, same, _ = load_model(str(tmp_path))
    idx = torch.randint(ours.config.vocab_size, (2, 9))
    assert torch.equal(back.eval()(idx)[0], ours(idx)[0])
    assert same.encode('def a README') == tokenizer.encode('def a README')


def learned():
    from extras.train_tokenizer import learn

    pytest.importorskip('rustbpe')
    return learn([(ROOT / 'README.md').read_text()], 600)


def words():
    return Tokenizer.of_words('Anna has 12 apples. Bob gives 3 apples to Anna #### 4')


TOKENIZERS = {'characters': lambda: LETTERS, 'words': words, 'byte pairs': learned}


@pytest.mark.parametrize('name', TOKENIZERS)
def test_the_tokenizer_and_the_chat_template_go_along(name, tmp_path):
    ours = TOKENIZERS[name]()
    written('NanoChat', tmp_path, ours)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    texts = ['a bad cab.\n', '  ab  ', '']
    if name != 'characters':
        texts += ["Anna has 123 apples, don't\n\n she? été 中文", '<|end|', '## README\n`pip`']
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    pytest.importorskip('jinja2')
    for reply in False, True:
        ids = theirs.apply_chat_template(TALK, add_generation_prompt=reply, return_dict=False)
        assert ids == ours.render(TALK, reply)[0]
    assert theirs.eos_token == '<|endoftext|>'
    ends = hf.GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert ends == [ours.special['<|endoftext|>'], ours.special['<|end|>']]
    if name == 'byte pairs':    # and it can be read as any published one
        model, again, checkpoint = load_model(str(tmp_path))
        assert again.encode(texts[-3]) == ours.encode(texts[-3]) and is_taught(checkpoint)
        assert again.render(TALK) == ours.render(TALK) and again.begin == ours.begin


def test_a_merge_is_of_the_two_tokens_that_come_before():
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b'ab': 256, b'cd': 257, b'abcd': 258, b'xyz': 259}
    assert merge_of(ranks, b'abcd', 258) == (b'ab', b'cd')
    assert merge_of(ranks, b'ab', 256) == (b'a', b'b')
    assert merge_of(ranks, b'xyz', 259) == ()
    own = learned()
    assert len(tokenizer_of(own, 10**6)['model']['merges']) == len(own.spec['tokens'])
    assert own.spec['pattern'] == PATTERN


def test_what_no_family_has_is_refused_with_the_setting_to_train_without(trained, tmp_path):
    for wrong, words in (
        (dict(), 'NanoChatForCausalLM is what'), (dict(), '--x0=False'),
        (dict(x0=False, ngrams=3), '--ngrams=1'), (dict(OURS, tied=True), '--tied=False'),
        (dict(GPT2, n_kv_head=1), '--n_kv_head=4'), (dict(LLAMA, bias=True), '--bias=False'),
        (dict(OURS, window_pattern='SL'), '--window_pattern=L'),
        (dict(LLAMA, n_expert=2, n_expert_shared=1), '--n_expert_shared=0'),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            architecture_of(GPTConfig(50, n_head=4, n_embd=32, **wrong))
    text = inside('extras/export.py', f'--out_dir={trained}', f'--to={tmp_path}/x', ok=False)
    assert 'train with --x0=False' in text and not (tmp_path / 'x').exists()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'a').write_text('mine')
    for arguments, words in (
        ([f'--to={tmp_path}/full'], 'there is something already'), ([], '--to=folder'),
        ([f'--to={tmp_path}/y', '--dtype=int8'], 'choose float32'),
    ):  # fmt: skip
        assert words in inside('extras/export.py', f'--out_dir={trained}', *arguments, ok=False)


def test_a_run_is_exported_by_its_command(dataset, tmp_path):
    from conftest import TINY

    out, to = f'{tmp_path}/out', tmp_path / 'to'
    inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={out}', '--max_iters=2',
           '--x0=False')  # fmt: skip
    text = inside('extras/export.py', f'--out_dir={out}', f'--to={to}', '--dtype=bfloat16')
    assert 'NanoChatForCausalLM' in text
    assert json.loads((to / 'config.json').read_text())['dtype'] == 'bfloat16'
    theirs = hf.AutoModelForCausalLM.from_pretrained(to)
    ours = load_model(out)[0].bfloat16()
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight[:ours.config.vocab_size])
    assert 'chat_template' not in json.loads((to / 'tokenizer_config.json').read_text())
    assert chat_template(('', '<|{role}|>', '<|end|>', '')).count('message') == 4
