"""
The folders of runs: checking a run's settings, finding its data, its log, saving and resuming it.
"""
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from data.files import find_data, missing, mixture_of, say, verify, write
from data.models import folder_of, model_config
from data.processes import all_sum, plain


def step_tokens(config):
    """How many tokens a step of rows reads."""
    return config['batch_size'] * config['gradient_accumulation_steps'] * config['block_size']


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
    if config['checkpoint'] not in ('whole', 'sharded'):
        raise ValueError(f'--checkpoint={config["checkpoint"]}: choose whole or sharded')
    if config['shard'] and world == 1 and not config['dry_run']:
        raise ValueError('--shard=True shares a model out among processes: start several, with '
                         'torchrun')
    if config['dropout'] and 'S' in config['window_pattern']:
        raise ValueError(f'--dropout={config["dropout"]}: must be 0 with --window_pattern='
                         f'{config["window_pattern"]}, whose attention has none on a GPU')
    if config['depth'] not in (0, config['n_layer']):
        raise ValueError(f'--depth={config["depth"]}: config/depth.py, which computes a run from '
                         'it, must stand behind it')
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
    """-> advice if the error is about memory; others are raised again, but for the loss of another
    process, which has said why it ended"""
    if 'Connection closed by peer' in str(error):
        return 1
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and (
            "can't allocate" not in str(error)):
        raise error
    samples = 'rollout_rows' in config and config.get('on_policy', True)
    rollouts = f' or --rollout_rows={config["rollout_rows"]}' if samples else ''
    more = '' if rollouts else (' and double --gradient_accumulation_steps='
                                f'{config["gradient_accumulation_steps"]}')
    return (f'out of memory: halve --batch_size={config["batch_size"]}{rollouts}{more}: the same '
            'step, in less memory; a network that is itself too large needs a lower --n_layer='
            f'{config["n_layer"]} or --n_embd={config["n_embd"]}')


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
    if not all(plain(p.isfinite().all()) for p in run.model.parameters()):
        raise ValueError(f'the weights of step {run.step} are not finite, and not saved: lower '
                         '--learning_rate and --muon_lr')
    content = {
        'model': run.model.state_dict(), 'optimizer': [o.state_dict() for o in run.optimizers],
        'scaler': run.scaler.state_dict(), 'model_args': asdict(run.model.config),
        'config': run.config, 'iter_num': run.step, 'best_val_loss': run.best,
        'seconds': run.seconds, 'tokens': run.tokens, 'notes': run.notes, 'since': run.since,
        'tokenizer': run.tokenizer.spec, 'lineage': run.lineage}
    if run.config['lora_rank']:
        from extras.lora import merged_state
        content |= merged_state(run.model)
    path = Path(run.config['out_dir'], name)
    if run.config['checkpoint'] == 'sharded':
        from extras.shard import save_parts
        run.saves += 1      # each save has a folder of its own: the one before is intact meanwhile
        parts = path.with_name(f'{path.stem}-{run.step}.{run.saves}')
        save_parts(run.model, run.optimizers, parts)
        content |= {'model': {}, 'optimizer': [{}] * len(run.optimizers), 'parts': parts.name}
    elif run.config['shard']:
        from extras.shard import full_tensors
        content = full_tensors(content, run.rank == 0)
    if run.rank == 0:
        write(path, lambda file: torch.save(content, file))
        for older in path.parent.glob(f'{path.stem}-*/.metadata'):      # of parts, by our names
            name = older.parent.name
            if name != content.get('parts') and re.fullmatch(r'\w+-\d+\.\d+', name):
                shutil.rmtree(older.parent)


def restore_optimizers(run, checkpoint):
    states = checkpoint['optimizer']    # one in nanoGPT's checkpoints, a list in ours
    states = states if isinstance(states, list) else [states]
    if len(states) != len(run.optimizers):
        raise ValueError('set --muon_lr to ' + ('a rate' if len(states) > 1 else '0')
                         + ', as that run had it')
    if 'parts' in checkpoint:
        from extras.shard import load_parts
        folder = Path(run.config['out_dir'], Path(checkpoint['parts']).name)
        return load_parts(run.model, run.optimizers, folder)
    for optimizer, state in zip(run.optimizers, states, strict=True):
        if run.config['shard']:
            from extras.shard import sharded_state
            state = sharded_state(state, optimizer)
        optimizer.load_state_dict(state)


def restore(run, checkpoint):
    """Put a run where its checkpoint (nanoGPT's too, {}: none) was saved; its model is loaded."""
    if not checkpoint:
        return
    path = f'{run.config["out_dir"]}/ckpt.pt'
    try:
        if 'lora' in checkpoint:
            from extras.lora import restore_lora
            restore_lora(run.model, checkpoint['lora'])
        restore_optimizers(run, checkpoint)
        if checkpoint.get('scaler'):
            run.scaler.load_state_dict(checkpoint['scaler'])
        run.step, run.best = int(checkpoint['iter_num']), float(checkpoint['best_val_loss'])
        run.seconds = float(checkpoint.get('seconds', 0.0))
        run.tokens = int(checkpoint.get('tokens', run.step * step_tokens(run.config)))
        run.notes = {name: list(map(float, values))
                     for name, values in checkpoint.get('notes', {}).items()}
        seconds, tokens = checkpoint.get('since', (run.seconds, run.tokens))
        run.since = float(seconds), int(tokens)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f'--init_from=resume: {path}: {error}') from None
    if all_sum(torch.tensor([float(run.step)]))[0] != run.step * run.world:
        raise ValueError(f'{path} differs between processes: copy it to each node')
