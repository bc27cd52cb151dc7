"""
A model for other programs: a folder in Hugging Face's layout, which transformers loads (and vLLM,
if it is Llama's network), with its tokenizer and its chat template.

    python -m extras.export --out_dir=out --to=folder

GPT-2's block becomes GPT2LMHeadModel; the modern one NanoChatForCausalLM, if it was trained with
--x0=False --ngrams=1; that of a published model what it was.
"""
import json
from pathlib import Path

import torch

from configurator import configure
from data.files import program, write
from data.models import is_taught, load_model
from data.vocabulary import PATTERNS
from model import GPT2

out_dir = 'out'         # the run to export, or a published model's folder
to = ''                 # the folder to write
dtype = 'float32'       # of the weights in it: float32, bfloat16 or float16

WANTED = {      # what a network must be for each architecture
    'GPT2LMHeadModel': {
        **{name: GPT2[name] for name in ('position', 'qk_norm', 'tied')}, 'qkv_bias': False},
    'NanoChatForCausalLM': dict(position='rope', qk_norm=True, qk_gain=False, activation='relu2',
                                tied=False, bias=False, qkv_bias=False, rope_factor=1.0),
    'LlamaForCausalLM': dict(position='rope', qk_norm=False, activation='swiglu', bias=False)}
WANTED |= {'Qwen2ForCausalLM': WANTED['LlamaForCausalLM'] | {'rope_factor': 1.0},
           'Qwen3ForCausalLM': WANTED['LlamaForCausalLM'] | {'qk_norm': True, 'rope_factor': 1.0},
           'MixtralForCausalLM': WANTED['LlamaForCausalLM'] | {'n_expert_shared': 0}}


def architecture_of(c):
    """GPTConfig -> the name of its architecture. ValueError says how to train for it"""
    if c.norm == 'rms_gain':
        name = ('MixtralForCausalLM' if c.n_expert else 'Qwen3ForCausalLM' if c.qk_gain else
                'Qwen2ForCausalLM' if c.qkv_bias else 'LlamaForCausalLM')
    else:
        name = 'GPT2LMHeadModel' if c.norm == 'layer' else 'NanoChatForCausalLM'
    wanted = dict(x0=False, ngrams=1, window_pattern='L') | WANTED[name]
    if name != 'MixtralForCausalLM':
        wanted['n_expert'] = 0
    if name == 'MixtralForCausalLM' and c.n_expert_active == 1:
        wanted['n_expert_active'] = 2
    if name == 'GPT2LMHeadModel':
        wanted['n_kv_head'] = c.n_head
        wanted['head_width'] = c.n_embd // c.n_head
    wrong = ' '.join(f'--{key}={value}' for key, value in wanted.items()
                     if getattr(c, key) != value)
    if wrong:
        raise ValueError(f'{name} is what this network is nearest to; for it, train with {wrong}')
    return name


def config_of(c, name):
    """-> config.json of a GPTConfig, as a dict"""
    config = {'architectures': [name], 'vocab_size': c.vocab_size, 'dtype': dtype,
              'tie_word_embeddings': c.tied}
    if name == 'GPT2LMHeadModel':
        return config | {
            'model_type': 'gpt2', 'n_positions': c.block_size, 'n_embd': c.n_embd,
            'n_layer': c.n_layer, 'n_head': c.n_head, 'n_inner': c.n_inner or None,
            'layer_norm_epsilon': c.norm_eps or 1e-5, 'activation_function': {
                'gelu': 'gelu', 'gelu_tanh': 'gelu_new'}[c.activation]}
    rope = {'rope_type': 'default', 'rope_theta': c.rope_base}
    if c.rope_factor > 1:
        rope |= {'rope_type': 'llama3', 'factor': c.rope_factor, 'low_freq_factor': 1.0,
                 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}
    config |= {
        'model_type': name.removesuffix('ForCausalLM').lower(), 'hidden_size': c.n_embd,
        'intermediate_size': c.n_inner or 4 * c.n_embd, 'num_hidden_layers': c.n_layer,
        'num_attention_heads': c.n_head, 'num_key_value_heads': c.n_kv_head,
        'head_dim': c.head_width, 'max_position_embeddings': c.block_size,
        'rms_norm_eps': c.norm_eps or torch.finfo(torch.float32).eps, 'rope_parameters': rope,
        'rope_theta': c.rope_base, 'attention_bias': False, 'sliding_window': None,
        'hidden_act': 'relu2' if c.activation == 'relu2' else 'silu'}
    if c.n_expert:
        config |= {'num_local_experts': c.n_expert, 'num_experts_per_tok': c.n_expert_active}
    if name == 'NanoChatForCausalLM':
        config['final_logit_softcapping'] = None
    return config


def tensors_of(model, name):
    """-> {name: tensor} as other programs call them"""
    if name != 'GPT2LMHeadModel':
        from extras.open_weights import places, turn
        return {key: turn(part, model.config.head_width) if turned else part
                for key, (part, turned) in places(model).items()}
    found = {}
    for key, p in model.state_dict().items():
        if key != 'lm_head.weight':
            # GPT-2 keeps the matrices of its layers as (in, out), a Linear as (out, in).
            found[key] = p.t() if '.h.' in key and p.dim() == 2 else p
            if key.endswith('.weight') and '.h.' in key or 'ln_f' in key:  # it has biases
                bias = key.replace('weight', 'bias')
                found.setdefault(bias, torch.zeros(p.shape[0]))
    found['transformer.wte.weight'] = found['transformer.wte.weight'][:model.config.vocab_size]
    return found


def merge_of(ranks, token, rank):
    """-> the two tokens that a token of byte pairs is made of; () if it is of no two"""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        found = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
        best = min(range(len(found)), key=found.__getitem__)
        if found[best] >= rank:
            return ()
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return tuple(parts) if len(parts) == 2 else ()


def tokenizer_of(tokenizer, vocab_size):
    """-> tokenizer.json of a Tokenizer, as a dict"""
    spec, vocab, merges, steps = tokenizer.spec, {}, [], None
    if tokenizer.bpe is None:       # of characters: pairs that are never merged
        vocab = tokenizer.chars
    else:
        from extras.open_tokenizer import byte_characters
        seen = {byte: character for character, byte in byte_characters().items()}

        def text(token):
            return ''.join(seen[byte] for byte in token)

        ranks = {token: rank for token, rank in tokenizer.bpe._mergeable_ranks.items()
                 if rank < tokenizer.vocab_size}    # beyond are bytes that have no token
        for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
            vocab[text(token)] = rank
            if len(token) > 1 and (pair := merge_of(ranks, token, rank)):
                merges.append([text(part) for part in pair])
        name = {'bpe': 'own'}.get(spec['kind'], spec['kind'])
        pattern = PATTERNS[spec['pattern'] if name == 'open' else name]
        steps = {'type': 'Sequence', 'pretokenizers': [
            {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated',
             'invert': False},
            {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
             'use_regex': False}]}
    special = spec['special'] if spec['kind'] == 'open' else tokenizer.special
    added = [{'id': i, 'content': name, 'single_word': False, 'lstrip': False, 'rstrip': False,
              'normalized': False, 'special': name not in spec.get('shown', ())}
             for name, i in sorted(special.items(), key=lambda pair: pair[1]) if i < vocab_size]
    begin = spec.get('begin')
    begins = [{'SpecialToken': {'id': begin, 'type_id': 0}}] if begin else []
    return {
        'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added,
        'normalizer': {'type': 'NFC'} if spec.get('nfc') else None, 'pre_tokenizer': steps,
        'post_processor': begin and {
            'type': 'TemplateProcessing', 'single': [
                *begins, {'Sequence': {'id': 'A', 'type_id': 0}}],
            'pair': [*begins, {'Sequence': {'id': 'A', 'type_id': 0}},
                     {'Sequence': {'id': 'B', 'type_id': 1}}],
            'special_tokens': {begin: {'id': begin, 'ids': [special[begin]], 'tokens': [begin]}}},
        'decoder': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True,
                    'use_regex': True} if steps else {'type': 'Fuse'},
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'fuse_unk': False,
                  'continuing_subword_prefix': None, 'end_of_word_suffix': None,
                  'byte_fallback': False, 'ignore_merges': True, 'vocab': vocab,
                  'merges': merges}}


def chat_template(template):
    """A Tokenizer's template -> the same in Jinja"""
    begin, opening, end, behind = (json.dumps(part) for part in template)
    opening = opening.replace('{role}', '" + message["role"] + "')
    reply = json.dumps(template[1].format(role='assistant'))
    return (f'{{{{ {begin} }}}}{{% for message in messages %}}{{{{ {opening} + message["content"] '
            f'+ {end} + {behind} }}}}{{% endfor %}}{{% if add_generation_prompt %}}'
            f'{{{{ {reply} }}}}{{% endif %}}')


def export(model, tokenizer, taught, folder):
    """Write all that other programs need of a model to a folder."""
    from safetensors.torch import save_file
    name, folder = architecture_of(model.config), Path(folder)
    if any(buffer.any() for key, buffer in model.named_buffers() if key.endswith('mlp.bias')):
        raise ValueError(f'{name}: its router has no biases, which this model learned')
    kind, size = getattr(torch, dtype), model.config.vocab_size
    special = tokenizer.special
    end, stop = special.get('<|endoftext|>'), special.get('<|end|>')
    names = {i: text for text, i in (tokenizer.spec['special'] if tokenizer.spec['kind'] == 'open'
                                     else special).items()}
    ends = [i for i in dict.fromkeys((end, stop)) if i is not None and i < size]
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': names.get(end),
                'bos_token': names[tokenizer.begin[0]] if ends else None,
                'clean_up_tokenization_spaces': False}
    if taught:
        settings['chat_template'] = chat_template(tokenizer.template)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'model.safetensors'
    tensors = {key: p.detach().to(kind).contiguous().clone()
               for key, p in tensors_of(model, name).items()}
    save_file(tensors, path.with_suffix('.tmp'), metadata={'format': 'pt'})
    path.with_suffix('.tmp').replace(path)
    for file, content in (
            ('tokenizer.json', tokenizer_of(tokenizer, size)), ('tokenizer_config.json', settings),
            ('generation_config.json', {'eos_token_id': ends, 'bos_token_id': tokenizer.begin[0]}),
            ('config.json', config_of(model.config, name) | {
                'bos_token_id': tokenizer.begin[0], 'eos_token_id': ends[0] if ends else None})):
        write(folder / file, json.dumps(content, ensure_ascii=False, indent=1).encode())
    return name


def main():
    configure(globals())
    if not to:
        raise ValueError('--to=folder: where to write the model')
    if Path(to).exists() and any(Path(to).iterdir()):
        raise ValueError(f'--to={to}: there is something already')
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f'--dtype={dtype}: choose float32, bfloat16 or float16')
    model, tokenizer, checkpoint = load_model(out_dir)
    name = export(model, tokenizer, is_taught(checkpoint), to)
    print(f'{to}: {name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, '
          f'{dtype}')


if __name__ == '__main__':
    program(main)
