"""
SmolTalk (arXiv:2502.02737), its small version: half a million conversations.

    python data/smoltalk/prepare.py [--source='a/folder/*.jsonl']

Any conversations of this form will do: lines of {"messages": [{"role", "content"}, ...]}.
"""
import glob
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.files import tokenizer_of  # noqa: E402
from data.sources import load, read_each, run_prepare, write_texts  # noqa: E402

source = ''      # local files: 'folder/*.jsonl'; '' fetches HuggingFaceTB/smol-smoltalk
tokenizer = ''   # a folder with a vocabulary, of extras/train_tokenizer.py; '' is GPT-2's
held_out = 100   # of local files, one conversation in this many is held out; at least 1
strict = False   # stop at a row that cannot be read, instead of leaving it out


def rendered(row):
    """A row of the data set -> ids, in play, small in memory; other roles are left out."""
    messages = [message for message in row['messages']
                if message['role'] in ('system', 'user', 'assistant') and message['content']]
    if not any(message['role'] == 'assistant' for message in messages):
        raise ValueError('no message of an assistant')
    ids, in_play = tokenizer_of(tokenizer).render(messages)
    return np.array(ids, tokenizer_of(tokenizer).dtype), np.array(in_play, np.uint8)


def fetch(source='', folder=HERE):
    if source and not glob.glob(source):
        raise ValueError(f'--source={source}: no such files')
    if source:
        found = load('json', data_files=source, split='train')
        found = found.train_test_split(test_size=max(1, len(found) // held_out), seed=0)
    else:
        found = load('HuggingFaceTB/smol-smoltalk')
    source = source or 'HuggingFaceTB/smol-smoltalk'
    train, val = (read_each(found[split], rendered, f'{source}, {split}', strict)
                  for split in ('train', 'test'))
    write_texts(folder, tokenizer_of(tokenizer), source, train=train, val=val)


if __name__ == '__main__':
    run_prepare(globals(), fetch, 'source')
