"""
The folders of runs: checking a run's settings, making its model, writing and reading checkpoints.

A checkpoint holds plain tensors, numbers and strings, so that reading one executes nothing.
"""
import contextlib
import hashlib
import json
import math
import os
import pickle
import shlex
import sys
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

from data.files import DATA, find_data, missing, mixture_of, read_meta, say, verify, write
from data.rows import TEXT_STAGES, all_sum
from data.tokenizer import Tokenizer, same_ids
from model import GPT, GPT2, GPTConfig


def step_tokens(config):
    """How many tokens a step of rows reads."""
    return config['batch_size'] * config['gradient_accumulation_steps'] * config['block_size']


def model_config(config, vocab_size):
    return GPTConfig(vocab_size, **{f.name: config[f.name] for f in fields(GPTConfig)[1:]})


def check(config, stage, schedules):
    """Check settings against each other before anything is done. ValueError says what to change"""
    if config['init_from'] == 'scratch':
        model_config(config, vocab_size=1)
    if config['lr_schedule'] not in schedules:
        raise ValueError(f'--lr_schedule={config["lr_schedule"]}: choose one of '
                         f'{", ".join(schedules)}')
    world = int(os.environ.get('WORLD_SIZE', 1))
    if config['decay_lr'] and config['min_lr'] > config['learning_rate']:
        raise ValueError(f'--min_lr={config["min_lr"]} is above --learning_rate='
                         f'{config["learning_rate"]}: the rate would rise')
    names = ['num_prompts'] if stage.samples else ['batch_size', 'gradient_accumulation_steps']
    if math.prod(config[name] for name in names) % world:
        named = ' x '.join(f'--{name}={config[name]}' for name in names)
        raise ValueError(f'{named} do not divide among {world} processes')
    if config['dropout'] and (stage.reference or stage.samples):
        raise ValueError(f'--dropout={config["dropout"]}: must be 0 in stage {config["stage"]}, '
                         'whose weights w come from what the whole model says')
    if Path(config['out_dir']).resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f'--out_dir={config["out_dir"]}: a run needs a folder of its own')
    if config['wandb_log']:
        import wandb  # noqa: F401  so that a missing one is said before anything is done
    if config['compile'] is None and torch.cuda.is_available():     # then it is a default:
        torch._dynamo.config.suppress_errors = True     # what cannot be compiled runs as it is
    writes = not (config['eval_only'] or config['dry_run'])
    for name in 'init_from', 'teacher':
        source = config.get(name) or 'scratch'
        itself = folder_of(source).resolve() == Path(config['out_dir']).resolve()
        if writes and itself and source not in ('scratch', 'resume'):
            raise ValueError(f'--out_dir={config["out_dir"]} is the run that --{name} reads: '
                             'choose another')


def choose_data(config, origin, local_rank):
    """
    Prepare dataset or, if that cannot be downloaded, the fallback_dataset of the same layer (or of
    the command line), with a warning. The first process of a machine does; the others wait.
    origin: {setting: the layer that set it}. Changes dataset and out_dir in config
    """
    dataset, fallback = config['dataset'], config['fallback_dataset']
    if config['dry_run']:
        for why in filter(None, map(missing, mixture_of(dataset))):
            say(f"{why}; GPT-2's vocabulary is assumed")
        return
    if local_rank and dist.is_initialized():
        dist.barrier()
    try:
        find_data(dataset, prepare=not local_rank)
    except ConnectionError as error:
        own = origin.get('fallback_dataset') in ('command line', origin.get('dataset'))
        if not fallback or not own:
            raise
        find_data(fallback, prepare=not local_rank)
        out_dir = config['out_dir'].replace(dataset.replace('_', '-'), fallback.replace('_', '-'))
        config.update(dataset=fallback, out_dir=out_dir)
        say(f'{error}\n!!! NOT {dataset.upper()}: TRAINING ON {fallback.upper()} INSTEAD, IN '
            f'{out_dir} !!!')
    for folder in mixture_of(config['dataset']) if config['verify'] else ():
        verify(folder)
    if not local_rank and dist.is_initialized():
        dist.barrier()


def out_of_memory(error, config):
    """-> advice if the error is about memory; others are raised again"""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and (
            "can't allocate" not in str(error)):
        raise error
    samples = 'rollout_rows' in config and config.get('on_policy', True)
    rollouts = f' or --rollout_rows={config["rollout_rows"]}' if samples else ''
    more = '' if rollouts else (' and double --gradient_accumulation_steps='
                                f'{config["gradient_accumulation_steps"]}')
    return (f'out of memory: halve --batch_size={config["batch_size"]}{rollouts}{more}: the same '
            'step, in less memory')


def open_folder(run, resumed):
    """Make out_dir ready to be written to; a run that it holds is moved aside, never overwritten"""
    if run.rank:
        return
    folder = Path(run.config['out_dir'])
    run.lock = lock(folder)
    if not resumed and ((folder / 'ckpt.pt').exists() or (folder / 'best.pt').exists()):
        numbered = (folder.with_name(f'{folder.name}.{n}') for n in range(1, 10 ** 6))
        aside = next(path for path in numbered if not path.exists())
        folder.rename(aside)
        say(f'{folder} holds a run already: moved to {aside}')
        run.lock = lock(folder)
    kept = [line for line in read_log(folder) if line['step'] <= run.step] if resumed else []
    write(folder / 'log.jsonl', ''.join(json.dumps(line) + '\n' for line in kept).encode())
    if run.config['wandb_log']:
        import wandb
        wandb.init(project=run.config['wandb_project'], name=run.config['wandb_run_name'],
                   config=run.config)


def read_log(folder):
    """-> the lines of a run's log.jsonl, as dicts; [] if there is none. What is no line of a run,
    as one that was cut in the middle, is left out."""
    path, lines = Path(folder, 'log.jsonl'), []
    for text in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            line = json.loads(text)
            if line['step'] >= 0 and line['seconds'] >= 0:
                lines.append(line)
    return lines


def lock(folder):
    """-> the open file that is locked while a run writes to folder: until it is closed, or its
    process ends. ValueError if another run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:     # Windows has no such locks
        return None
    file = open(folder / 'lock', 'w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'{folder}: another run is writing there now') from None
    except OSError:         # nor have some file systems of a network
        pass
    return file


def log(run, **metrics):
    """Append a line to the run's log.jsonl, and to Weights & Biases if that is asked for."""
    line = dict(step=run.step, tokens=run.tokens, seconds=run.seconds) | {
        name: value if math.isfinite(value) else None for name, value in metrics.items()}
    if run.rank == 0:
        with open(Path(run.config['out_dir'], 'log.jsonl'), 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
        if run.config['wandb_log']:
            import wandb
            wandb.log(line)


def how_to_resume(run):
    rest = shlex.join(a for a in sys.argv[1:] if not a.startswith('--init_from'))
    launcher = 'python' if run.world == 1 else 'torchrun ...'
    if run.config['dataset'] == run.config['fallback_dataset']:
        rest += f' --dataset={run.config["dataset"]} --out_dir={run.config["out_dir"]}'
    return f'to go on: {launcher} train.py {rest} --init_from=resume'


def save(run, name):
    """Write out_dir/name, a checkpoint: under a temporary name, then renamed, so never half.
    ValueError for weights that are not finite: a good checkpoint is not replaced by those."""
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise ValueError(f'the weights of step {run.step} are not finite, and not saved: lower '
                         '--learning_rate and --muon_lr')
    if run.rank:
        return
    content = {
        'model': run.model.state_dict(), 'optimizer': [o.state_dict() for o in run.optimizers],
        'scaler': run.scaler.state_dict(), 'model_args': asdict(run.model.config),
        'config': run.config, 'iter_num': run.step, 'best_val_loss': run.best,
        'seconds': run.seconds, 'tokens': run.tokens, 'tokenizer': run.tokenizer.spec,
        'lineage': run.lineage}
    write(Path(run.config['out_dir'], name), lambda file: torch.save(content, file))


def restore(run, checkpoint):
    """Put a run where its checkpoint (nanoGPT's too, {}: none) was saved; its model is loaded."""
    if not checkpoint:
        return
    path = f'{run.config["out_dir"]}/ckpt.pt'
    try:
        states = checkpoint['optimizer']    # one in nanoGPT's checkpoints, a list in ours
        states = states if isinstance(states, list) else [states]
        if len(states) != len(run.optimizers):
            raise ValueError('set --muon_lr to ' + ('a rate' if len(states) > 1 else '0')
                             + ', as that run had it')
        for optimizer, state in zip(run.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        if checkpoint.get('scaler'):
            run.scaler.load_state_dict(checkpoint['scaler'])
        run.step, run.best = int(checkpoint['iter_num']), float(checkpoint['best_val_loss'])
        run.seconds = float(checkpoint.get('seconds', 0.0))
        run.tokens = int(checkpoint.get('tokens', run.step * step_tokens(run.config)))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f'--init_from=resume: {path}: {error}') from None
    if all_sum(torch.tensor([float(run.step)]))[0] != run.step * run.world:
        raise ValueError(f'{path} differs between processes: copy it to each node')


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


def load_model(source, dropout=0.0):
    """
    source: a run's folder (best.pt, else ckpt.pt), a checkpoint's path (nanoGPT's too), gpt2,
    gpt2-medium ..., or a folder with model.safetensors -> model (fp32, CPU), tokenizer, checkpoint
    """
    path = Path(source)
    named = str(source).startswith('gpt2') and not path.exists()
    if named or (path / 'model.safetensors').exists():
        from extras.gpt2 import load_gpt2
        checkpoint = {'lineage': [{'from': source}], 'model_args': {}}
        return load_gpt2(source, dropout), Tokenizer({'kind': 'gpt2'}), checkpoint
    if path.suffix != '.pt':
        path = path / 'best.pt' if (path / 'best.pt').exists() else path / 'ckpt.pt'
    checkpoint = read_checkpoint(path)
    args = checkpoint['model_args']
    try:
        if 'norm' not in args:      # nanoGPT's checkpoints know one architecture
            args = {**GPT2, **args}
        if args['n_layer'] > len(checkpoint['model']):
            raise ValueError(f'{args["n_layer"]} layers, {len(checkpoint["model"])} tensors')
        model = GPT(GPTConfig(**{**args, 'dropout': dropout}))
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
    if config['stage'] not in TEXT_STAGES and model.config.vocab_size < meta['vocab_size']:
        model = widen(model, meta['vocab_size'])      # GPT-2 knows no chat tokens
    elif model.config.vocab_size < meta['vocab_size']:
        meta['tokenizer'] = tokenizer.spec      # nanoGPT's characters without the special tokens
    if block_size > model.config.block_size:
        raise ValueError(f'--block_size={block_size}: {source} has {model.config.block_size}')
    return model, checkpoint


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
        padding = name == 'vocab_multiple' or (name, config[name]) == ('n_kv_head', 0)
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
    for name in ('stage', 'dataset', 'block_size', 'seed', 'weight_decay', 'beta1', 'beta2'):
        if known.get(name, config[name]) != config[name]:
            raise ValueError(f'--{name}={config[name]}: the run that is resumed has {name}='
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
