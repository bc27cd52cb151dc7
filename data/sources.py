"""
What the prepare.py of data sets share: getting texts, rows and questions, writing their tokens.
"""
import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np

from configurator import configure
from data.files import program, write, write_all


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


def write_tokens(folder, tokenizer, source, files=None, **splits):
    """Write a data set: files {name: bytes}, meta.json, {split}.bin of each split's ids."""
    folder = Path(folder)
    arrays = {split: np.asarray(ids, dtype=tokenizer.dtype) for split, ids in splits.items()}
    for split, array in arrays.items():
        if len(array) < 2:
            raise ValueError(f'{source}: too short, {len(array)} tokens for {split}.bin')
    meta = meta_of(tokenizer, source, {s: len(array) for s, array in arrays.items()},
                   {s: hashlib.sha256(array).hexdigest() for s, array in arrays.items()})
    bins = {f'{split}.bin': arrays[split] for split in sorted(arrays, reverse=True)}    # train last
    write_all({folder / name: content
               for name, content in {**(files or {}), 'meta.json': meta, **bins}.items()})
    for split, array in arrays.items():
        print(f'{split} has {len(array):,} tokens')


def write_texts(folder, tokenizer, source, files=None, **splits):
    """The same for texts as (ids, in play); {split}.mask.bin has 1 for a token in play, 2 for the
    first one of a text."""
    masks = {}
    for split, texts in splits.items():
        if not texts:
            raise ValueError(f'{source}: no conversations for {split}')
        mask = np.concatenate([np.asarray(in_play, np.uint8) for _, in_play in texts])
        mask[np.cumsum([0, *[len(in_play) for _, in_play in texts[:-1]]])] |= 2
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


def meta_of(tokenizer, source, counts, sha256):
    """-> the bytes of a meta.json"""
    return json.dumps(dict(dtype=tokenizer.dtype, vocab_size=tokenizer.vocab_size,
                           tokenizer=tokenizer.spec, counts=counts, source=str(source),
                           sha256=sha256), indent=1).encode()
