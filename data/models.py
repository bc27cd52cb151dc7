"""
The models of runs: reading a checkpoint, fitting the model in it to a run's data and settings.

A checkpoint holds plain tensors, numbers and strings, so that reading one executes nothing.
"""
import hashlib
import pickle
import re
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import nn

from data.files import DATA, read_json, read_meta, say, tokenizer_of
from data.rows import TEXT_STAGES
from data.tokenizer import Tokenizer
from data.vocabulary import same_ids
from model import GPT, GPT2, GPTConfig


def model_config(config, vocab_size):
    return GPTConfig(vocab_size, **{f.name: config[f.name] for f in fields(GPTConfig)[1:]})


def read_checkpoint(path):
    """-> the dict in a checkpoint; nothing in the file is executed. ValueError says what to do."""
    path = Path(path)
    sibling = path.with_name('best.pt' if path.name == 'ckpt.pt' else 'ckpt.pt')
    other = f'; {sibling} is there: cp {sibling} {path}' if sibling.exists() else ''
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise RuntimeError(f'wrong checksum of {part}')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        runs = ' '.join(sorted({str(p.parent) for p in Path('.').glob('*/*.pt')}))
        there = f'; there are: {runs}' if runs else ''
        raise ValueError(f'{path.parent}: no run there{there}') from None
    except pickle.UnpicklingError as error:
        if 'GLOBAL' in str(error):
            raise ValueError(f'{path}: refused, it carries code, not only weights{other}') from None
        raise ValueError(f'{path}: damaged, or not a checkpoint{other}') from None
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, zipfile.BadZipFile) as error:
        why = (str(error) or 'it ends too soon').splitlines()[0][:80]
        raise ValueError(f'{path}: damaged ({why}){other}') from None
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
        raise ValueError(f'{path}: not a checkpoint of this program or of nanoGPT')
    return checkpoint


def flops_per_token(model, T):
    """Forward and backward, by the PaLM convention (arXiv:2204.02311, appendix B): 6 per weight of
    a matrix product, 12 per channel of the heads for each token that a layer sees in rows of T."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    weights += sum(getattr(m, 'active_weights', 0) for m in model.modules())    # of experts
    seen = sum(min(T, window) for window in model.config.windows)
    return 6 * weights + 12 * model.config.n_head * model.config.head_width * seen


def load_model(source, dropout=0.0):
    """
    source: a run's folder (best.pt, else ckpt.pt), a checkpoint's path (nanoGPT's too), gpt2,
    gpt2-medium ..., a published model's folder or its name on the hub -> model (on the CPU; fp32, a
    published one in its own precision), tokenizer, checkpoint
    """
    path, here = Path(source), Path(source).exists()
    theirs = read_json(path / 'config.json') if (path / 'config.json').exists() else {}
    if str(source).startswith('gpt2') and not here or 'n_positions' in theirs:
        from extras.gpt2 import load_gpt2
        checkpoint = {'lineage': [{'from': str(source)}], 'model_args': {}}
        is_other = theirs.get('vocab_size', 50257) != 50257 and (path / 'tokenizer.json').exists()
        return load_gpt2(source, dropout), tokenizer_of(source if is_other else ''), checkpoint
    if theirs or not here and re.fullmatch(r'[\w.-]+/[\w.-]+(?<!\.pt)', str(source)):
        from extras.open_weights import load_published
        return load_published(source, dropout)
    if path.suffix != '.pt':
        path = path / 'best.pt' if (path / 'best.pt').exists() else path / 'ckpt.pt'
    checkpoint = read_checkpoint(path)
    args = checkpoint['model_args']
    try:
        if 'norm' not in args:      # nanoGPT's checkpoints know one architecture
            args = {**GPT2, **args}
        tensors = checkpoint['model']
        if 'parts' in checkpoint:
            from extras.shard import load_parts, read_index
            parts = path.parent / Path(checkpoint['parts']).name
            tensors = read_index(parts)
        if args['n_layer'] > len(tensors):
            raise ValueError(f'{args["n_layer"]} layers, {len(tensors)} tensors')
        model = GPT(GPTConfig(**{**args, 'dropout': dropout}))
        if 'parts' in checkpoint:
            load_parts(model, (), parts)
        else:
            model.load_state_dict({
                name.removeprefix('_orig_mod.'): p for name, p in checkpoint['model'].items()
                if not name.endswith('.attn.bias')})    # the causal mask of an old nanoGPT
        spec = checkpoint.get('tokenizer') or read_meta(
            DATA / checkpoint.get('config', {}).get('dataset', ''))['tokenizer']
        tokenizer = Tokenizer(spec)
    except (LookupError, TypeError, RuntimeError, ValueError, AttributeError,
            ArithmeticError) as error:
        raise ValueError(f'{path}: damaged, or of another architecture than this model.py '
                         f'({str(error).splitlines()[0]})') from None
    if spec['kind'] == 'gpt2' and model.config.vocab_size < 50257:
        raise ValueError(f'{path}: its characters are in the data folder that it was trained on; '
                         'put its meta.pkl back there')
    return model, tokenizer, checkpoint


@torch.no_grad()
def widen(model, vocab_size):
    """-> the same model with room for more tokens; each starts as the mean of the known ones."""
    known, weights = model.config.vocab_size, model.state_dict()
    wider = GPT(replace(model.config, vocab_size=vocab_size))
    for name, p in wider.state_dict().items():
        old = weights[name]
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            p[:known], p[known:] = old[:known], old[:known].mean(0)
        else:
            p.copy_(old)
    return wider


def load_fitting(source, config, meta):
    """-> a model that fits the data and the settings of a run, and its checkpoint (ValueError)"""
    model, tokenizer, checkpoint = load_model(source, config['dropout'])
    dataset, block_size = config['dataset'], config['block_size']
    if not (config['dry_run'] or same_ids(tokenizer.spec, meta['tokenizer'])):
        raise ValueError(f'{source} and data/{dataset} do not have the same tokenizer')
    if config['stage'] not in TEXT_STAGES and config['lora_rank'] and not is_taught(checkpoint):
        raise ValueError(f'--lora_rank={config["lora_rank"]}: {source} was never taught to chat, '
                         'and LoRA learns no new tokens: teach it with all of its weights first')
    if config['stage'] not in TEXT_STAGES and model.config.vocab_size < meta['vocab_size']:
        model = widen(model, meta['vocab_size'])      # GPT-2 knows no chat tokens
    elif model.config.vocab_size < meta['vocab_size']:
        meta['tokenizer'] = tokenizer.spec      # nanoGPT's characters without the special tokens
    if block_size > model.config.block_size:
        raise ValueError(f'--block_size={block_size}: {source} has {model.config.block_size}')
    return model.float(), checkpoint


def make_model(config, origin, meta):
    """-> the model that a run starts with, on the CPU (in a dry run of a new one on no device),
    and the checkpoint that it comes from ({} if from scratch). Changes the settings of the network
    in config to those of a model that is loaded."""
    out_dir, init_from = config['out_dir'], config['init_from']
    if init_from == 'resume' and not Path(out_dir, 'ckpt.pt').exists():
        if Path(out_dir, 'best.pt').exists():
            raise ValueError(f'{out_dir} has best.pt, but no ckpt.pt: copy it there to go on')
        if config['stage'] != 'pretrain':
            raise ValueError(f'{out_dir}: nothing is saved there yet: drop --init_from=resume')
        say(f'{out_dir}: nothing is saved there yet, so this starts from scratch')
    elif init_from.startswith('gpt2') and not Path(init_from).exists() and config['dry_run']:
        from extras.gpt2 import config_of
        with torch.device('meta'):
            return GPT(config_of(init_from)), {}
    elif init_from != 'scratch':
        source = f'{out_dir}/ckpt.pt' if init_from == 'resume' else init_from
        model, checkpoint = load_fitting(source, config, meta)
        if init_from == 'resume' and not (config['eval_only'] or config['dry_run']):
            check_resumed(config, checkpoint, meta)
        adopt(config, origin, source, model)
        return model, checkpoint
    with torch.device('meta' if config['dry_run'] else 'cpu'):
        torch.manual_seed(config['seed'])
        return GPT(model_config(config, meta['vocab_size'])), {}


def adopt(config, origin, source, model):
    """Settings of the network become those of a loaded model, but for dropout and a shorter
    block_size. One that asks for others is refused; of a config file, if another run is loaded, it
    is said: a layer may be there for its other settings."""
    for name, value in asdict(model.config).items():
        if name in ('vocab_size', 'dropout', 'block_size'):
            continue
        padding = name == 'vocab_multiple' or (name, config[name]) in (
            ('n_kv_head', 0), ('head_width', 0))
        if name in origin and config[name] != value and not padding:
            text = (f'--{name}={config[name]}, of {origin[name]}: {source} has {name}={value}, '
                    'which cannot be changed')
            if origin[name] == 'command line' or config['init_from'] == 'resume':
                raise ValueError(text)
            say(text)
        config[name] = value


def check_resumed(config, checkpoint, meta):
    """Raises ValueError for what a resumed run cannot go on with; says what it goes on with."""
    known, begun = checkpoint.get('config', {}), (checkpoint.get('lineage') or [{}])[-1]
    for name in ('stage', 'dataset', 'block_size', 'seed', 'weight_decay', 'beta1', 'beta2',
                 'lora_rank', 'lora_alpha', 'lora_targets'):
        if known.get(name, config.get(name)) != config.get(name):
            raise ValueError(f'--{name}={config.get(name)}: the run that is resumed has {name}='
                             f'{known[name]}; give the settings that it had')
    if list(begun.get('data', meta['hashes']).values()) != list(meta['hashes'].values()):
        raise ValueError(f'--dataset={config["dataset"]}: prepared anew since this run began')
    for name in 'batch_size', 'gradient_accumulation_steps':
        if known.get(name, config[name]) != config[name]:
            say(f'resuming with {name}={config[name]} instead of {known[name]}')
    step = checkpoint.get('iter_num', 0)
    if isinstance(step, int) and step >= config['max_iters']:
        say(f'this run has taken its {step} steps: raise --max_iters to go on')


def load_reference(run, source):
    """
    -> the model that a stage compares with, which does not learn: a teacher, or what this run
    started from. Its hash is recorded, so that no resumed run goes on with another one.
    """
    if source in ('', 'scratch'):
        raise ValueError(f'--stage={run.config["stage"]} needs a run that has learned something: '
                         f'--{"teacher" if "teacher" in run.config else "init_from"}=')
    model, _ = load_fitting(source, run.config, run.meta)
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy().tobytes())
    if run.lineage[-1].setdefault('frozen', digest.hexdigest()) != digest.hexdigest():
        raise ValueError(f'{source} is not the model that this run began with')
    return model.to(run.device).eval()


def folder_of(source):
    """-> a run's folder; source is that, or one of its checkpoints"""
    return Path(source).parent if source.endswith('.pt') else Path(source)


def is_taught(checkpoint):
    """Whether one of the stages that made this model was about conversations."""
    return any(entry.get('stage', 'pretrain') not in TEXT_STAGES
               for entry in checkpoint.get('lineage', []))
