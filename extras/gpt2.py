"""
OpenAI's GPT-2, from the Hugging Face hub or from a folder: --init_from=gpt2-xl or a folder with
config.json and model.safetensors.
"""
import json
from pathlib import Path

from model import GPT, GPT2, GPTConfig

SIZES = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
         'gpt2-xl': (48, 25, 1600)}    # n_layer, n_head, n_embd


def config_of(name):
    """-> GPTConfig of one of SIZES, with no download"""
    if name not in SIZES:
        raise ValueError(f'--init_from={name}: there are {", ".join(SIZES)}')
    n_layer, n_head, n_embd = SIZES[name]
    return GPTConfig(50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                     **{**GPT2, 'activation': 'gelu_tanh'})


def load_gpt2(source, dropout=0.0):
    """-> GPT with OpenAI's weights. source: one of SIZES, or a folder"""
    from safetensors.torch import load_file
    if not Path(source, 'model.safetensors').exists():
        config_of(source)       # a ValueError names the sizes
        from huggingface_hub import snapshot_download
        source = snapshot_download(f'openai-community/{source}',
                                   allow_patterns=['config.json', 'model.safetensors'])
    theirs = json.loads(Path(source, 'config.json').read_text(encoding='utf-8'))
    args = {name: theirs[name] for name in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
    activation = {'gelu': 'gelu'}.get(theirs.get('activation_function'), 'gelu_tanh')
    args |= {'block_size': theirs['n_positions'], 'activation': activation, 'dropout': dropout,
             'n_inner': theirs.get('n_inner') or 0,
             'norm_eps': theirs.get('layer_norm_epsilon', 1e-5)}
    model, weights = GPT(GPTConfig(**{**GPT2, **args})), {}
    for name, p in load_file(Path(source, 'model.safetensors')).items():
        name = name.removeprefix('transformer.')
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):      # the causal mask
            # GPT-2 keeps the matrices of its layers as (in, out), a Linear as (out, in).
            weights['transformer.' + name] = p.t() if name[0] == 'h' and p.dim() == 2 else p
    model.load_state_dict(weights | {'lm_head.weight': weights['transformer.wte.weight']})
    return model
