"""
Lays config files and --key=value over a script's settings, from left to right; the last one wins.

    python train.py config/train_shakespeare_char.py --batch_size=32 --learning_rate=1e-3

The settings are the names that a script assigns above its first function, and the comment behind
each is its help. A setting's type is its annotation, else its default's. Config files are Python
and are run as such: they are your own.
"""
import ast
import difflib
import io
import sys
import tokenize
from pathlib import Path
from types import ModuleType

KINDS = {'int': int, 'float': float, 'bool': bool, 'str': str}
WORDS = {'true': True, '1': True, 'false': False, '0': False}


def read_settings(path):
    """-> {name: (type, comment)} for the settings in the script at path, in their order there."""
    source, found = Path(path).read_text(encoding='utf-8'), {}
    comments = {token.start[0]: token.string.lstrip('# ')
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = KINDS[node.annotation.id], comments.get(node.end_lineno, '')
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.UnaryOp):
            name, kind = node.targets[0].id, type(ast.literal_eval(node.value))
            if name.islower():      # the others are constants
                found[name] = kind, comments.get(node.end_lineno, '')
    return found


def coerce(value, kind):
    """A command line's text, or a config file's object, as kind. ValueError if that would guess."""
    if kind is bool and str(value).lower() in WORDS:
        return WORDS[str(value).lower()]
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        number = float(value)
        if kind is float and number == number:      # not NaN
            return number
        if kind is int and number == number // 1:   # 1e3 is as good an int as 1000; 0.5 is none
            digits = str(value).lstrip('+-').isdigit()
            return int(value) if digits else int(number)
    raise ValueError(value)


def configure(namespace, argv=None):
    """
    Set a script's settings in namespace (its globals()) from argv, by default the command line.
    -> {name: the layer that set it}. A wrong setting ends the program, in one line.
    """
    settings, origin = read_settings(namespace['__file__']), {}
    defaults = {name: namespace[name] for name in settings}

    def lay(layer, key, value):
        if key not in settings:
            near = difflib.get_close_matches(key, settings, n=1)
            hint = f'did you mean {near[0]}?' if near else 'see --help'
            sys.exit(f'{layer}: {key}: no such setting; {hint}')
        kind = settings[key][0]
        if str(value) == 'None' and defaults[key] is None:
            namespace[key], origin[key] = None, layer
            return
        try:
            namespace[key], origin[key] = coerce(value, kind), layer
        except (TypeError, ValueError, OverflowError):
            sys.exit(f'{layer}: {key}={value!r} is not of type {kind.__name__}')

    for arg in sys.argv[1:] if argv is None else argv:
        key, equals, value = arg.removeprefix('--').partition('=')
        if arg in ('-h', '--help'):
            print((namespace['__doc__'] or '').strip() + '\n\nSettings and their defaults:\n')
            for name, (_, comment) in settings.items():
                print(f'  --{name}={namespace[name]!r}'.ljust(42), comment)
            sys.exit(0)
        if arg.startswith('-'):
            if not arg.startswith('--') or not equals:
                sys.exit(f'{arg}: a setting is written --key=value')
            lay('command line', key, value)
            continue
        before = {name: namespace[name] for name in settings}
        scope = dict(before, __file__=arg, __name__='config')
        try:
            exec(compile(Path(arg).read_text(encoding='utf-8'), arg, 'exec'), scope)
        except FileNotFoundError:
            there = ' '.join(sorted(path.as_posix() for path in Path('config').glob('*.py')))
            sys.exit(f'{arg}: no such config file; there are: {there}')
        except Exception as error:
            sys.exit(f'{arg}: fails with {type(error).__name__}: {error}')
        for name, value in scope.items():
            helper = name.startswith('_') or isinstance(value, ModuleType)
            if not helper and value is not before.get(name, scope):
                lay(arg, name, value)
    return origin
