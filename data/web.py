"""
Web pages to tokens: parquet or jsonl files with a column `text`, or text files, to shards.

Each shard comes from a hundred row groups (100M tokens or so) and is written whole or not at all:
stopped and started again, the work goes on with the first shard that is missing. Memory stays flat:
a shard of tokens, and a row group of text in each process.
"""
import glob
import hashlib
import itertools
import json
import multiprocessing
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.files import tokenizer_of, write
from data.sources import meta_of, run_prepare

source = ''      # local files: 'folder/*.parquet', '*.jsonl' or '*.txt'; '' fetches from the hub
tokenizer = ''   # a folder with a vocabulary, of extras/train_tokenizer.py; '' is GPT-2's
max_shards = 0   # stop after this many shards of about 100M tokens; 0: all; at least 0
held_out = 1000  # one document in this many is held out for validation; at least 1
out_dir = ''     # where the token files go; '' is beside the data set's prepare.py
processes = 0    # tokenizing in parallel; 0: one per processor; at least 0

FINEWEB_EDU = 'HuggingFaceFW/fineweb-edu', 'sample/10BT/'   # on the hub
GROUPS = 100    # row groups a shard
LINES = 1000    # lines of a jsonl or text file that count as a row group
PAGE = 100      # lines of a text file that count as a document


def groups_of(path):
    """-> where each row group of a file begins: its number in parquet, its first byte in jsonl."""
    if path.endswith('.parquet'):
        import pyarrow.parquet as pq
        try:
            return range(pq.ParquetFile(path).num_row_groups)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None
    with open(path, 'rb') as lines:
        starts = itertools.accumulate(map(len, lines), initial=0)
        size = Path(path).stat().st_size
        return [start for start in itertools.islice(starts, 0, None, LINES) if start < size]


def texts_of(path, group):
    """-> the documents of one row group. KeyError where there is no column `text`."""
    if path.endswith('.parquet'):
        import pyarrow.parquet as pq
        return pq.ParquetFile(path).read_row_group(group, columns=['text'])['text'].to_pylist()
    with open(path, 'rb') as lines:
        lines.seek(group)
        if path.endswith('.txt'):
            block = list(itertools.islice(lines, LINES))
            parts = [b''.join(block[i:i + PAGE]) for i in range(0, len(block), PAGE)]
            starts = itertools.accumulate(map(len, parts), initial=group)
            return [plain_text(path, part, start) for part, start in zip(parts, starts)]
        return [text_of(path, f'line {number} after byte {group:,}', line)
                for number, line in enumerate(itertools.islice(lines, LINES), 1)]


def plain_text(path, content, start=0):
    """-> bytes as text. ValueError names the byte that is not UTF-8."""
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8 at byte {start + error.start:,}') from None


def text_of(path, place, line):
    """-> the text in a line of a jsonl file. ValueError names the place if there is none."""
    try:
        text = json.loads(line.decode('utf-8-sig'))['text']
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f'{path}: {place}: no JSON object with a text ({error})') from None
    if not isinstance(text, str):
        raise ValueError(f'{path}: {place}: its text is of type {type(text).__name__}')
    return text


def tokenize(job):
    """(path, row group, held_out, tokenizer's folder) -> train, val: their tokens, the end token
    before each text."""
    path, group, held_out, folder = job
    texts, train, val = texts_of(path, group), [], []
    known = tokenizer_of(folder)
    for i, text in enumerate(texts):
        number = zlib.crc32(text.encode()) if path.endswith('.txt') else group + i
        split = val if number % held_out == 0 else train
        split += [known.end, *known.encode(text)]
    return np.array(train, dtype=known.dtype), np.array(val, dtype=known.dtype)


def hub_files(repository, folder=''):
    """Yields the path of each parquet file of a data set on the hub, fetched at its turn."""
    from huggingface_hub import hf_hub_download, list_repo_files
    for revision in 'main', 'refs/convert/parquet':
        try:
            names = list_repo_files(repository, repo_type='dataset', revision=revision)
        except Exception as error:      # of httpx or requests, whichever the hub's client uses
            raise ConnectionError(f'{repository}: cannot be reached ({type(error).__name__}); '
                                  'give local files with --source=') from None
        names = sorted(n for n in names if n.startswith(folder) and n.endswith('.parquet'))
        if names:
            for name in names:
                yield hf_hub_download(repository, name, repo_type='dataset', revision=revision)
            return


def shards_of(paths):
    """Yields name, path, row groups of each shard."""
    for number, path in enumerate(paths):
        groups = groups_of(path)
        for first in range(0, len(groups), GROUPS):
            yield f'{number:04d}_{first // GROUPS:04d}', path, groups[first:first + GROUPS]


def prepare_web(folder, repository, within, out_dir, source, tokenizer, held_out, max_shards,
                processes):
    """Tokenize the files matching source, or those within a repository of the hub, into folder."""
    folder = Path(out_dir or folder)
    origin, source_file = [source or f'{repository}/{within}', held_out], folder / 'source.json'
    if source and not glob.glob(source):
        raise FileNotFoundError(f'--source={source}: no such file')
    if tokenizer:
        spec = tokenizer_of(tokenizer).spec
        origin.append(hashlib.sha256(json.dumps(spec).encode()).hexdigest())
    begun = source_file.read_text(errors='replace') if source_file.exists() else json.dumps(origin)
    if begun != json.dumps(origin):
        raise ValueError(f'{folder}: begun from {begun}; remove its *.bin and source.json to begin '
                         'anew')
    paths = sorted(glob.glob(source)) if source else hub_files(repository, within)
    with multiprocessing.Pool(processes or None) as pool:
        for name, path, groups in itertools.islice(shards_of(paths), max_shards or None):
            if (folder / f'train_{name}.bin').exists():
                continue
            jobs = [(path, group, held_out, tokenizer) for group in groups]
            done = pool.imap(tokenize, jobs)
            try:
                train, val = zip(*tqdm(done, total=len(jobs), desc=f'shard {name}'), strict=True)
            except ValueError as error:     # text_of() raised it, in another process
                raise ValueError(error) from None
            if not sum(map(len, train)):
                raise ValueError(f'{path}: all of it was held out: make --held_out larger than '
                                 f'{held_out}, or the text longer')
            write(source_file, json.dumps(origin).encode())
            if sum(map(len, val)):
                write(folder / f'val_{name}.bin', np.concatenate(val))
            write(folder / f'train_{name}.bin', np.concatenate(train))
    shards = {split: sorted(folder.glob(f'{split}_*.bin')) for split in ('train', 'val')}
    if not shards['val']:
        raise ValueError(f'no document was held out: make --held_out less than {held_out}')
    known = tokenizer_of(tokenizer)
    size = np.dtype(known.dtype).itemsize
    counts = {split: sum(p.stat().st_size // size for p in paths)
              for split, paths in shards.items()}
    sums = {path.name: hashlib.sha256(np.memmap(path, mode='r')).hexdigest()
            for paths in shards.values() for path in paths}
    write(folder / 'meta.json', meta_of(known, origin[0], counts, sums))
    print(f'{counts["train"]:,} tokens to train on, {counts["val"]:,} to validate')


def main(folder, doc, repository, within):
    """The program of a data set's prepare.py: its settings are those of this file."""
    run_prepare({**globals(), '__doc__': doc},
                lambda *values: prepare_web(folder, repository, within, *values),
                'out_dir', 'source', 'tokenizer', 'held_out', 'max_shards', 'processes')
