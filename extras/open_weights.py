"""
Published models, from the Hugging Face hub or from a folder: the networks of Llama (SmolLM2 too),
Mistral, Qwen2, Qwen3, Mixtral and NanoChat, with a tokenizer that is byte-level BPE.

    python sample.py --init_from=HuggingFaceTB/SmolLM2-135M --start="Gravity is"
    python data/fineweb/prepare.py --source="pages/*.parquet" --tokenizer=folder
    python train.py --init_from=folder --dataset=fineweb --learning_rate=1e-4 --lora_rank=8

A folder has config.json, model*.safetensors and tokenizer.json. Tensors are read one by one into
their place, in their own precision: the memory that it takes is that of the model. Pickled weights
are refused, since to read them may run code.
"""
import functools
from pathlib import Path

import torch

from data.files import read_json
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig, rotary

# architecture: what it has beside Llama's
FAMILIES = {'LlamaForCausalLM': {}, 'MistralForCausalLM': {}, 'MixtralForCausalLM': {},
            'Qwen2ForCausalLM': {'qkv_bias': True},
            'Qwen3ForCausalLM': {'qk_norm': True, 'qk_gain': True},
            'NanoChatForCausalLM': {'norm': 'rms', 'qk_norm': True, 'activation': 'relu2'}}
LONGEST = 4096      # tokens of context at most: a cache has room for all of them


def find(source):
    """-> the folder of a model: source itself, or the hub's copy of it. ConnectionError"""
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=[
            'config.json', 'tokenizer*.json', 'chat_template.jinja', 'model*.safetensors*']))
    except Exception as error:      # the hub's own, those of HTTP, of the disk
        why = str(error).strip().splitlines()[0][:120]
        raise ConnectionError(f'{source}: no folder here, and not to be had from the hub ({why})'
                              ) from None


def config_of(theirs, dropout=0.0):
    """Their config.json -> GPTConfig. ValueError where this network cannot do the same"""
    name = (theirs.get('architectures') or ['none'])[0]
    if name not in FAMILIES:
        raise ValueError(f'architecture {name}: known are {", ".join(FAMILIES)}; GPT-2 as gpt2')
    rope = theirs.get('rope_parameters') or {
        **(theirs.get('rope_scaling') or {}), 'rope_theta': theirs.get('rope_theta', 10000.0)}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    llama3 = [rope.get(key) for key in (
        'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')] == [1, 4, 8192]
    if kind != 'default' and not (kind == 'llama3' and llama3):
        raise ValueError(f'positions of the kind {rope}: known are default and llama3')
    act = 'relu2' if name[:8] == 'NanoChat' else 'silu'
    for key, known in dict(hidden_act=act, mlp_bias=False, attention_bias=False,
                           final_logit_softcapping=None).items():
        if theirs.get(key, known) != known:
            raise ValueError(f'{key}={theirs[key]}: known is {known}')
    window = theirs.get('sliding_window') if theirs.get('use_sliding_window', True) else None
    heads = theirs['num_attention_heads']
    experts = theirs['num_local_experts'] if name == 'MixtralForCausalLM' else 0
    if experts and theirs['num_experts_per_tok'] == 1:
        raise ValueError('num_experts_per_tok=1: known are two and more')
    return GPTConfig(
        theirs['vocab_size'], n_layer=theirs['num_hidden_layers'], n_head=heads,
        block_size=min(theirs['max_position_embeddings'], window or LONGEST, LONGEST),
        n_kv_head=theirs.get('num_key_value_heads') or heads, n_embd=theirs['hidden_size'],
        head_width=theirs.get('head_dim') or 0, n_inner=theirs['intermediate_size'],
        n_expert=experts, n_expert_active=theirs.get('num_experts_per_tok', 2), dropout=dropout,
        norm_eps=theirs['rms_norm_eps'], rope_base=rope['rope_theta'],
        rope_factor=rope.get('factor', 1.0), tied=theirs.get('tie_word_embeddings', False),
        zero_init=False, x0=False, vocab_multiple=1,
        **{'norm': 'rms_gain', 'activation': 'swiglu', 'qk_norm': False, **FAMILIES[name]})


def places(model):
    """-> {name of one of their tensors: the part of our parameters that it is, whether it is of
    queries or keys: these turn the other way round, see turn()}"""
    config, found = model.config, {}
    D, H, G = config.head_width, config.n_head, config.n_kv_head

    def put(theirs, ours, rows=slice(None), turned=False):
        for kind in 'weight', 'bias':
            if (tensor := getattr(ours, kind, None)) is not None:
                found[f'{theirs}.{kind}'] = tensor.detach()[rows], turned and llama

    llama, real = config.norm == 'rms_gain', slice(0, config.vocab_size)    # no padding rows
    put('model.embed_tokens', model.transformer.wte, real)
    put('model.norm', model.transformer.ln_f)
    if not config.tied:
        put('lm_head', model.lm_head, real)
    for i, block in enumerate(model.transformer.h):
        layer, attn, mlp = f'model.layers.{i}', block.attn, block.mlp
        put(f'{layer}.input_layernorm', block.ln_1)
        put(f'{layer}.post_attention_layernorm', block.ln_2)
        put(f'{layer}.self_attn.q_proj', attn.c_attn, slice(0, H * D), True)
        put(f'{layer}.self_attn.k_proj', attn.c_attn, slice(H * D, (H + G) * D), True)
        put(f'{layer}.self_attn.v_proj', attn.c_attn, slice((H + G) * D, None))
        put(f'{layer}.self_attn.o_proj', attn.c_proj)
        if config.qk_gain:
            found[f'{layer}.self_attn.q_norm.weight'] = attn.q_gain.detach(), True
            found[f'{layer}.self_attn.k_norm.weight'] = attn.k_gain.detach(), True
        hidden = mlp.c_fc.weight.shape[-2] // 2
        gate, up = slice(0, hidden), slice(hidden, None)
        if not llama:
            put(f'{layer}.mlp.fc1', mlp.c_fc)
            put(f'{layer}.mlp.fc2', mlp.c_proj)
            continue
        if not config.n_expert:
            put(f'{layer}.mlp.gate_proj', mlp.c_fc, gate)
            put(f'{layer}.mlp.up_proj', mlp.c_fc, up)
            put(f'{layer}.mlp.down_proj', mlp.c_proj)
            continue
        put(f'{layer}.block_sparse_moe.gate', mlp.router)
        for e in range(config.n_expert):
            expert = f'{layer}.block_sparse_moe.experts.{e}'
            put(f'{expert}.w1', mlp.c_fc, (e, gate))
            put(f'{expert}.w3', mlp.c_fc, (e, up))
            put(f'{expert}.w2', mlp.c_proj, (e,))
    return found


def turn(tensor, D):
    """Rows of heads of width D: the halves of each change places, which turns rotary positions
    round: theirs grow counterclockwise, ours clockwise. Its own inverse."""
    return tensor.unflatten(0, (-1, 2, D // 2)).flip(1).flatten(0, 2)


def open_tensors(folder):
    """-> {name: (shape, a function that reads the tensor)} of a folder's *.safetensors"""
    from safetensors import SafetensorError, safe_open

    def read(path, key):    # a file that stays open would keep all that was read of it in memory
        with safe_open(path, 'pt') as file:
            return file.get_tensor(key)

    index, names = folder / 'model.safetensors.index.json', ['model.safetensors']
    if index.exists():
        names = sorted(set(read_json(index).get('weight_map', {}).values()))
    found = {}
    for name in names:
        path = folder / Path(name).name
        if not path.exists():
            pickled = ': pickled weights are not read' if list(folder.glob('*.bin')) else ''
            raise ValueError(f'{folder}: no {path.name} there{pickled}')
        try:
            with safe_open(path, 'pt') as file:
                for key in file.keys():  # noqa: SIM118  it is no dict
                    shape = tuple(file.get_slice(key).get_shape())
                    found[key] = shape, functools.partial(read, path, key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f'{path}: damaged ({error})') from None
    return found


@torch.no_grad()
def load(source, dropout=0.0):
    """-> GPT with the weights of a model, in their precision. source: its folder, or its name"""
    folder = find(source)
    try:
        config = config_of(read_json(folder / 'config.json'), dropout)
        tensors = open_tensors(folder)
        if max(config.n_layer, config.n_expert) > len(tensors):
            raise ValueError(f'{config.n_layer} layers, {config.n_expert} experts, but '
                             f'{len(tensors)} tensors')
        with torch.device('meta'):
            model = GPT(config)
        compare(places(model), tensors)
        model.to(next(read().dtype for _, read in tensors.values())).to_empty(device='cpu')
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        why = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise ValueError(f'{folder}/config.json: damaged ({why})') from None
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from None
    for buffer in model.buffers():
        buffer.zero_()
    model.rope = rotary(config)
    if config.tied:
        model.lm_head.weight = model.transformer.wte.weight
    for name, (part, turned) in places(model).items():
        tensor = tensors[name][1]()
        part.copy_(turn(tensor, config.head_width) if turned else tensor)
    return model


def compare(parts, tensors):
    """Raises ValueError unless what a model consists of is what there is."""
    known = {*parts, 'lm_head.weight'}      # a file may have it beside the table it is tied to
    for name in tensors:
        if name not in known and 'rotary_emb' not in name:
            raise ValueError(f'{name} is unknown')
    for name, (part, _) in parts.items():
        if name not in tensors:
            raise ValueError(f'{name} is missing')
        if tensors[name][0] != tuple(part.shape):
            raise ValueError(f'{name} is {tensors[name][0]}, not {tuple(part.shape)}')


def load_published(source, dropout=0.0):
    """-> model, its tokenizer, and a checkpoint that says where they are from"""
    from extras.open_tokenizer import read_spec
    folder = find(source)
    tokenizer = Tokenizer(read_spec(folder))
    stage = 'sft' if tokenizer.spec['template'] else 'pretrain'
    checkpoint = {'lineage': [{'from': str(source), 'stage': stage}], 'model_args': {}}
    return load(folder, dropout), tokenizer, checkpoint
