"""
Data sets on disk: getting a text, writing its tokens, finding them (data/tokens.py reads them).

data/<name>/{train,val}.bin (or train_*.bin, val_*.bin) are flat arrays of token ids, meta.json says
of which type and vocabulary. A nanoGPT folder works as it is: no meta.json means GPT-2 tokens, or
the characters in its meta.pkl.
"""
import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import random
import sys
import traceback
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import configure
from data.tokenizer import check_spec

DATA = Path(__file__).parent


def say(text):
    """Print a line, above a progress bar; of several processes only the first does."""
    if os.environ.get('RANK', '0') == '0':
        tqdm.write(text, sys.stdout)


def program(main):
    """Run a script's main(): bad input ends it with a one-line message."""
    sys.stdout.reconfigure(errors='replace')    # a terminal may not know every character
    try:
        main()
    except RuntimeError as error:
        if not type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            raise
        sys.exit(f'--compile=True does not work here: {str(error).strip().splitlines()[0]}')
    except BrokenPipeError:     # whoever read the output has left, as in `| head`
        os._exit(1)
    except ImportError as error:
        sys.exit(f'{error}: pip install it, or restore the file if it is one of extras/')
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not is_message(error):
            raise
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def is_message(error):
    """Whether a line of this project says `raise`: then it is about the input. Any other is a bug,
    in a line that somebody has just changed perhaps, and is shown with its traceback."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return place.line.startswith('raise') and DATA.parent in Path(place.filename).parents


def run_prepare(script, prepare, *names):
    """A prepare.py as a program. script: its globals(); prepare() takes these of its settings."""
    def main():
        configure(script)
        try:
            prepare(*[script[name] for name in names])
        except KeyError as error:
            raise ValueError(f'the source has no column {error}') from None
    program(main)


def download(urls, path, sha256, timeout=30):
    """Put at path, whole or not at all, the first of urls that gives the text of this checksum."""
    import requests
    problems = []
    for url in urls:
        try:
            print(f'downloading {url}', flush=True)
            reply = requests.get(url, timeout=timeout)
            reply.raise_for_status()
            if hashlib.sha256(reply.content).hexdigest() == sha256:
                return write(path, reply.content)
            problems.append(f'{url}: not the expected text (checksum differs)')
        except requests.RequestException as error:
            problems.append(f'{url}: {type(error).__name__}')
    raise ConnectionError(f'cannot download {Path(path).name}: ' + '; '.join(problems))


def read_text(path):
    """-> the text of a file, without a byte-order mark. ValueError: where it is not UTF-8"""
    if not Path(path).is_file():    # a device, such as /dev/zero, might never end
        raise FileNotFoundError(f'{path}: No such file')
    try:
        return Path(path).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8 at byte {error.start:,}; convert it first') from None


def write(path, content):
    """Write bytes, or let content(file) write: path is never half-written."""
    write_all({path: content})


def write_all(contents):
    """Write {path: content} under temporary names, flush, then rename in this order: what was there
    is intact until all is written."""
    temporary = {Path(path): Path(path).with_suffix(f'.{os.getpid()}.tmp') for path in contents}
    try:
        for (path, new), content in zip(temporary.items(), contents.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(new, 'wb') as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:    # torch reports a full disk as a RuntimeError
        for new in temporary.values():
            new.unlink(missing_ok=True)
        raise OSError(f'{path}: cannot be written ({str(error).splitlines()[0]}); what was there '
                      'before is intact') from None
    for path, new in temporary.items():
        os.replace(new, path)


def write_tokens(folder, tokenizer, source, files=None, **splits):
    """Write a data set: files {name: bytes}, meta.json, {split}.bin of each split's ids."""
    folder, dtype = Path(folder), 'uint16' if tokenizer.vocab_size <= 2 ** 16 else 'uint32'
    arrays = {split: np.asarray(ids, dtype=dtype) for split, ids in splits.items()}
    for split, array in arrays.items():
        if len(array) < 2:
            raise ValueError(f'{source}: too short, {len(array)} tokens for {split}.bin')
    meta = meta_of(tokenizer, source, dtype, {s: len(array) for s, array in arrays.items()},
                   {s: hashlib.sha256(array).hexdigest() for s, array in arrays.items()})
    bins = {f'{split}.bin': arrays[split] for split in sorted(arrays, reverse=True)}    # train last
    write_all({folder / name: content
               for name, content in {**(files or {}), 'meta.json': meta, **bins}.items()})
    for split, array in arrays.items():
        print(f'{split} has {len(array):,} tokens')


def write_texts(folder, tokenizer, source, files=None, **splits):
    """The same for texts as (ids, in play); {split}.mask.bin has 1 for a token in play."""
    masks = {}
    for split, texts in splits.items():
        if not texts:
            raise ValueError(f'{source}: no conversations for {split}')
        mask = np.concatenate([np.asarray(in_play, np.uint8) for _, in_play in texts])
        masks[f'{split}.mask.bin'] = mask
    write_tokens(folder, tokenizer, source, {**(files or {}), **masks}, **{
        split: np.concatenate([np.asarray(ids) for ids, _ in texts])
        for split, texts in splits.items()})


def write_conversations(folder, tokenizer, source, files=None, **splits):
    """The same for lists of conversations: lists of messages, see Tokenizer.render."""
    write_texts(folder, tokenizer, source, files, **{
        split: list(map(tokenizer.render, conversations))
        for split, conversations in splits.items()})


def write_questions(folder, tokenizer, source, conversation, **splits):
    """
    Write a task's questions (lists of dicts) for read_questions(), and their conversations. One in
    20 to train on is kept for validation, so that nothing is chosen by the test questions.
    """
    train = splits['train']
    splits.update(train=[q for i, q in enumerate(train) if i % 20 or len(train) < 20],
                  val=train[::20])
    write_conversations(folder, tokenizer, source, {'questions.json': json.dumps(splits).encode()},
                        train=map(conversation, splits['train']),
                        val=map(conversation, splits['val']))


def read_questions(folder, split, seed=0):
    """Yields what was written: those to train on endlessly, shuffled by seed, others in order."""
    known = json.loads((Path(folder) / 'questions.json').read_text(encoding='utf-8'))[split]
    if split != 'train':
        return (yield from known)
    for epoch in itertools.count():
        yield from random.Random(f'{seed} {epoch}').sample(known, len(known))


def load_splits(source, *hub, read, strict=False):
    """-> {'train' and 'test': read_each() of the rows}, from {split}.jsonl in the folder source, or
    from the hub"""
    files = {split: str(Path(source, f'{split}.jsonl')) for split in ('train', 'test')}
    found = load('json', data_files=files) if source else load(*hub)
    return {split: read_each(found[split], read, f'{source or hub[0]}, {split}', strict)
            for split in files}


def load(*args, **how):
    """datasets.load_dataset(), whose failures of many kinds become a ValueError of one line."""
    from datasets import load_dataset
    try:
        return load_dataset(*args, **how)
    except Exception as error:
        place = how.get('data_files', args[0])
        place = ', '.join(place.values()) if isinstance(place, dict) else place
        why = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise ValueError(f'{place}: cannot be loaded: {why[0]}') from None


def read_each(rows, read, source, strict=False):
    """-> list of read(row). A row for which that fails is left out and reported; if strict, or if
    there is no other, ValueError names it."""
    found, wrong = [], []
    for number, row in enumerate(rows, 1):
        try:
            found.append(read(row))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            wrong.append(f'row {number}: {type(error).__name__}: {error}')
    if wrong and (strict or not found):
        raise ValueError(f'{source}: {wrong[0]}')
    if wrong:
        print(f'{source}: {len(wrong)} of {len(wrong) + len(found)} rows are left out, the first '
              f'is {wrong[0]}')
    return found


def meta_of(tokenizer, source, dtype, counts, sha256):
    """-> the bytes of a meta.json"""
    return json.dumps(dict(dtype=dtype, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.spec,
                           counts=counts, source=str(source), sha256=sha256), indent=1).encode()


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings, numbers; a pickle that names a class or function is refused unrun."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'refused: it wants to load {module}.{name}')


META = {    # what each part of meta.json must be
    'dtype': lambda dtype: dtype in ('uint16', 'uint32'),   # others read anything into memory
    'vocab_size': lambda size: type(size) is int and 0 < size <= 2 ** 32,
    'tokenizer': lambda spec: check_spec(spec) is None,
    'counts': lambda counts: type(counts) is dict and all(type(n) is int for n in counts.values()),
    'sha256': lambda sums: type(sums) is dict and all(type(s) is str for s in sums.values())}


def read_meta(folder):
    """-> meta of a data set; for a nanoGPT folder, what its meta.pkl or its absence implies."""
    folder = Path(folder)
    if (folder / 'meta.json').exists():
        try:
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
            wrong = [name for name, test in META.items() if not test(meta.get(name, {}))]
            if wrong:
                raise ValueError(f'its {" and ".join(wrong)}')
            return meta
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f'{folder}/meta.json: damaged ({error}); prepare it again') from None
    if (folder / 'meta.pkl').exists():
        with open(folder / 'meta.pkl', 'rb') as file:
            try:
                itos = PlainUnpickler(file).load()['itos']
                chars = ''.join(itos[i] for i in range(len(itos)))
            except (pickle.UnpicklingError, LookupError, TypeError, EOFError, ValueError) as error:
                raise ValueError(f'{folder}/meta.pkl: no table of characters ({error})') from None
        spec = {'kind': 'char', 'chars': chars, 'special': []}
        return {'dtype': 'uint16', 'vocab_size': len(itos), 'tokenizer': spec}
    return {'dtype': 'uint16', 'vocab_size': 50304, 'tokenizer': {'kind': 'gpt2'}}


def is_ready(folder):
    """Whether a data set can be read: of one file, train.bin comes last; of many, meta.json."""
    shards = any(Path(folder).glob('train_*.bin')) and (Path(folder) / 'meta.json').exists()
    return shards or (Path(folder) / 'train.bin').exists()


def mixture_of(dataset):
    """'a:0.8,b:0.2' -> {data/a: 0.8, data/b: 0.2}, 'a' -> {data/a: 1.0}; a folder that exists is
    that folder, whatever its name. ValueError if it is none of these."""
    parts = {}
    for part in [dataset] if dataset and (DATA / dataset).is_dir() else dataset.split(','):
        name, _, share = part.strip().rpartition(':')
        if not part.strip():
            raise ValueError(f'--dataset={dataset}: a data set without a name')
        alone = not name or DATA.joinpath(part).is_dir()
        folder = DATA / (part.strip() if alone else name)
        if folder in parts:
            raise ValueError(f'--dataset={dataset}: {folder.name} is there twice')
        try:
            parts[folder] = 1.0 if alone else float(share)
        except ValueError:
            raise ValueError(f'--dataset={dataset}: a mixture is written a:0.8,b:0.2') from None
    if not all(0 < share <= 1e6 for share in parts.values()):
        raise ValueError(f'--dataset={dataset}: a share is a number above 0')
    return parts


def find_data(dataset, prepare=True):
    """
    Prepare the data sets of a mixture that are not there yet and small; large ones are prepared by
    hand. ValueError or OSError says what is wrong, ConnectionError that one cannot be downloaded.
    """
    for folder in mixture_of(dataset):
        why = missing(folder)
        script = script_of(folder) if why and prepare else None
        if hasattr(script, 'prepare'):
            try:
                script.prepare()
            except (OSError, ValueError, ImportError):
                raise
            except Exception as error:      # somebody's own script
                raise ValueError(f'{folder}/prepare.py: {type(error).__name__}: {error}') from None
            why = missing(folder)
            if why:
                raise ValueError(why)
        elif why:
            raise ConnectionError(why) if not prepare else ValueError(why)


def verify(folder):
    """Raises ValueError if a file of a data set is not what its meta.json says by checksum."""
    for name, known in read_meta(folder).get('sha256', {}).items():
        path = folder / (name if name.endswith('.bin') else f'{name}.bin')
        if hashlib.sha256(np.memmap(path, mode='r')).hexdigest() != known:
            raise ValueError(f'{path}: not what was written (checksum differs); prepare it again')


def missing(folder):
    """-> how to prepare a data set that is not; '' if it can be read. ValueError: there is none"""
    if not folder.is_dir():
        known = ' '.join(sorted(path.parent.name for path in DATA.glob('*/prepare.py')))
        raise ValueError(f'--dataset={folder.name}: there is no data/{folder.name}; '
                         f'there are: {known}')
    if is_ready(folder):
        return ''
    script = script_of(folder)
    run = f'run python data/{folder.name}/prepare.py' if script else 'it has no prepare.py'
    command = getattr(script, 'COMMAND', '')      # which writes it
    return f'data/{folder.name}: not prepared; {f"run {command}" if command else run}'


def read_metas(parts, check=True):
    """-> the meta of the data sets in parts together: tokens in train, hashes by folder, and the
    first one's tokenizer, which must be that of all (ValueError)"""
    metas = {str(folder): read_meta(folder) for folder in parts}
    for folder, meta in metas.items():
        if 'counts' not in meta and Path(folder, 'train.bin').exists():
            say(f'{folder}: no meta.json, so uint16 tokens of {meta["tokenizer"]["kind"]} kind are '
                f'assumed, {meta["vocab_size"]} of them')
    first = next(iter(metas.values()))
    if check and any(meta['tokenizer'] != first['tokenizer'] for meta in metas.values()):
        names = ','.join(folder.name for folder in parts)
        raise ValueError(f'--dataset={names}: these do not have the same tokenizer')
    return {**first, 'tokens': sum(m.get('counts', {}).get('train', 0) for m in metas.values()),
            'hashes': {folder: meta.get('sha256', {}) for folder, meta in metas.items()}}


def extra(name):
    """-> the module extras/<name>.py, None in a copy of the repository without it"""
    known = DATA.parent.joinpath('extras', f'{name}.py').exists()
    return importlib.import_module(f'extras.{name}') if known else None


def script_of(folder):
    """-> the module folder/prepare.py, None if there is none"""
    if not (folder / 'prepare.py').exists():
        return None
    spec = importlib.util.spec_from_file_location(f'data.{folder.name}.prepare',
                                                  folder / 'prepare.py')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f'{folder}/prepare.py: {type(error).__name__}: {error}') from None
    return module
