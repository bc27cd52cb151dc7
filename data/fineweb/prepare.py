"""
FineWeb-Edu's sample of 10 billion tokens: about 20 GB; or any pages (see data/web.py).

    python data/fineweb/prepare.py [--max_shards=10] [--source="a/folder/*.parquet"]
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.web import FINEWEB_EDU, main  # noqa: E402

if __name__ == '__main__':
    main(HERE, __doc__, *FINEWEB_EDU)
