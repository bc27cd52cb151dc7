"""
Lays config files and --key=value over a script's settings, from left to right; the last one wins.

    python train.py config/train_shakespeare_char.py --batch_size=32 --learning_rate=1e-3

The settings are the names that a script assigns above its first function, and the comment behind each is its help. A
setting's type is its default's, or its annotation's. Config files are Python and are run as such: they are your own.
"""
import ast
import difflib
import io
import sys
import tokenize
from pathlib import Path
from types import ModuleType

KINDS = {'int': int, 'float': float, 'bool': bool, 'str': str}
WORDS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def read_settings(path):
    """-> {name: (type, comment)} for the settings in the script at path, in the order they stand there."""
    source = Path(path).read_text(encoding='utf-8')
    comments = {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(io.StringIO(source).readline)
                if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, 'targets', [None])[0]
        kind = None
        if isinstance(node, ast.AnnAssign):
            kind = KINDS[node.annotation.id]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.UnaryOp):
            kind = type(ast.literal_eval(node.value))
        if kind in KINDS.values() and isinstance(target, ast.Name):
            found[target.id] = kind, comments.get(node.end_lineno, '')
    return found


def coerce(value, kind):
    """value as kind, from a command line's text or a config file's object. Raises ValueError if that would guess."""
    if kind is bool:
        if str(value).lower() in WORDS:
            return WORDS[str(value).lower()]
    elif kind is str:
        if isinstance(value, str):
            return value
    elif not isinstance(value, bool):
        number = float(value) if not isinstance(value, int) else value
        if kind is float and number == number:      # not NaN
            return float(number)
        if kind is int and number == number // 1:   # 1e3 is as good an int as 1000; 0.5 is none
            return int(value) if isinstance(value, str) and value.lstrip('+-').isdigit() else int(number)
    raise ValueError(value)


def configure(namespace, argv=None):
    """
    Set the settings in namespace (a script's globals()) from argv (sys.argv[1:] by default).
    -> {name: the layer that set it}. A wrong setting ends the program with one line, before anything else is done.
    """
    settings = read_settings(namespace['__file__'])
    origin = {}

    def lay(layer, key, value):
        if key not in settings:
            near = difflib.get_close_matches(key, settings, n=1)
            hint = f'did you mean {near[0]}?' if near else 'see --help'
            sys.exit(f'{layer}: {key}: no such setting; {hint}')
        kind = settings[key][0]
        try:
            namespace[key] = coerce(value, kind)
        except (TypeError, ValueError, OverflowError):
            sys.exit(f'{layer}: {key}={value!r} is not {"an" if kind is int else "a"} {kind.__name__}')
        origin[key] = layer

    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ('-h', '--help'):
            print((namespace['__doc__'] or '').strip() + '\n\nSettings, with their defaults:\n')
            for key, (kind, comment) in settings.items():
                print(f'  --{key}={namespace[key]!r}'.ljust(44) + f' {comment}')
            sys.exit(0)
        if arg.startswith('-'):
            key, equals, value = arg.lstrip('-').partition('=')
            if not arg.startswith('--') or not equals:
                sys.exit(f'{arg}: a setting is written --key=value')
            lay('command line', key.replace('-', '_'), value)
            continue
        before = {key: namespace[key] for key in settings}
        scope = dict(before, __file__=arg, __name__='config')
        try:
            exec(compile(Path(arg).read_text(encoding='utf-8'), arg, 'exec'), scope)
        except FileNotFoundError:
            sys.exit(f'{arg}: no such config file; there are: {" ".join(map(str, sorted(Path("config").glob("*.py"))))}')
        except Exception as error:
            sys.exit(f'{arg}: fails with {type(error).__name__}: {error}')
        for key, value in scope.items():
            if not key.startswith('_') and not isinstance(value, ModuleType) and value is not before.get(key, scope):
                lay(arg, key, value)
    return origin
