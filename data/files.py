"""
Data sets on disk: getting a text, writing its tokens, finding them (data/tokens.py reads them).

data/<name>/{train,val}.bin (or train_*.bin, val_*.bin) are flat arrays of token ids, meta.json says
of which type and vocabulary. A nanoGPT folder works as it is: no meta.json means GPT-2 tokens, or
the characters in its meta.pkl.
"""
import functools
import hashlib
import importlib.util
import json
import os
import pickle
import sys
import traceback
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokenizer import Tokenizer
from data.vocabulary import check_spec

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
    ours = Path(__file__).parents[1] in Path(place.filename).parents
    return ours and place.line.startswith('raise')


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


def read_json(path):
    """-> the dict that a JSON file holds. ValueError if there is none, or it is damaged"""
    try:
        content = json.loads(read_text(path))
        if not isinstance(content, dict):
            raise ValueError('not an object')
        return content
    except FileNotFoundError:
        raise ValueError(f'{Path(path).parent}: no {Path(path).name} there') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: damaged ({error})') from None


@functools.cache
def tokenizer_of(folder):
    """-> the Tokenizer of a data set, of a folder that extras/train_tokenizer.py has written, or of
    a published model; GPT-2's if folder is ''"""
    if folder and Path(folder, 'tokenizer.json').exists():
        from extras.open_tokenizer import read_spec
        return Tokenizer(read_spec(folder))
    if folder and not Path(folder, 'meta.json').exists():
        raise ValueError(f'--tokenizer={folder}: there is no {folder}/meta.json')
    return Tokenizer(read_meta(folder)['tokenizer'] if folder else {'kind': 'gpt2'})


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
