"""
Python's own manual, a token a character: real English on every machine, with no download.

The text is the language reference in pydoc_data.topics and the docstrings of the standard library,
read from the Python that runs this (so it differs a little from version to version). Nothing of the
library is imported or run: its sources are only parsed.

    python data/pydocs_char/prepare.py
"""
import ast
import sys
import sysconfig
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.files import write  # noqa: E402
from data.sources import run_prepare, write_tokens  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402


def docstrings(path):
    """-> the docstrings in one Python source file, outermost first."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # old escapes in the standard library's strings
            tree = ast.parse(path.read_text(encoding='utf-8'))
    except (SyntaxError, ValueError, OSError):
        return []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    return [ast.get_docstring(node) or '' for node in ast.walk(tree) if isinstance(node, kinds)]


def read_texts():
    """-> list of texts: the manual's chapters, then every longer docstring, each once."""
    from pydoc_data.topics import topics
    library = Path(sysconfig.get_path('stdlib'))
    apart = {'site-packages', 'test', 'tests', 'idlelib'}
    found = [topics[key] for key in sorted(topics)]
    for path in sorted(library.rglob('*.py')):
        if not apart & set(path.relative_to(library).parts):
            found += docstrings(path)
    plain = [''.join(c for c in text if c == '\n' or ' ' <= c <= '~').strip() for text in found]
    return list(dict.fromkeys(text for text in plain if len(text) > 80))


def prepare(folder=HERE):
    texts = read_texts()
    tokenizer = Tokenizer.of_text('\n' + ''.join(map(chr, range(32, 127))))
    write(Path(folder, 'input.txt'), '\n\n\n'.join(texts).encode())     # to be read by people
    val = texts[9::10]
    train = [text for i, text in enumerate(texts) if i % 10 != 9]
    write_tokens(folder, tokenizer, f"Python {sys.version.split()[0]}'s manual and docstrings",
                 train=tokenizer.encode('\n\n\n'.join(train)),
                 val=tokenizer.encode('\n\n\n'.join(val)))


if __name__ == '__main__':
    run_prepare(globals(), prepare)
