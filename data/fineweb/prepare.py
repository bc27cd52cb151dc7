"""
FineWeb-Edu's sample of 10 billion tokens, in GPT-2's: about 20 GB, or any pages (see data/web.py).

    python data/fineweb/prepare.py [--max_shards=10] [--source='a/folder/*.parquet']
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from configurator import configure  # noqa: E402
from data.web import prepare_web  # noqa: E402

source = ''      # local files: 'folder/*.parquet' or '*.jsonl'; '' fetches them from the hub
max_shards = 0   # stop after this many shards of about 100M tokens; 0: all; at least 0
held_out = 1000  # one document in this many is held out for validation; at least 1
out_dir = ''     # where the token files go; '' is beside this file
processes = 0    # tokenizing in parallel; 0: one per processor; at least 0

REPOSITORY = 'HuggingFaceFW/fineweb-edu', 'sample/10BT/'

if __name__ == '__main__':
    configure(globals())
    try:
        prepare_web(out_dir or HERE, source, *REPOSITORY, held_out, max_shards,
                    processes or None)
    except (OSError, ValueError) as error:
        sys.exit(f'{__file__}: {error}')
