"""
OpenWebText, GPT-2's training set made anew, in GPT-2's tokens: about 18 GB (see data/web.py).

    python data/openwebtext/prepare.py [--max_shards=10] [--source="a/folder/*.parquet"]
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.web import main  # noqa: E402

if __name__ == '__main__':
    main(HERE, __doc__, 'Skylion007/openwebtext', '')
