"""
Lays config files and --key=value over a script's settings, from left to right; the last one wins.

The settings are the names that a script assigns above its first function, and the comment behind
each is its help; its type is its annotation, else its default's. Config files are run as Python.
"""
import ast
import difflib
import io
import sys
import tokenize
from pathlib import Path
from types import ModuleType

KINDS = {'int': int, 'float': float, 'bool': bool, 'str': str}
WORDS = {'true': True, '1': True, 'false': False, '0': False, 'none': None}


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


def run_file(path, settings):
    """Run a config file over the settings there are. -> {name: value} of those it changed"""
    if not Path(path).is_file():
        there = ' '.join(sorted(file.as_posix() for file in Path('config').glob('*.py')))
        sys.exit(f'{path}: no such config file; there are: {there}')
    scope = dict(settings, __file__=path, __name__='config')
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), scope)
    except Exception as error:
        sys.exit(f'{path}: fails with {type(error).__name__}: {error}')
    return {name: value for name, value in scope.items() if value is not settings.get(name, scope)
            and not name.startswith('_') and not isinstance(value, ModuleType)}


def configure(namespace, argv=None):
    """
    Set a script's settings in namespace (its globals()) from argv, by default the command line.
    -> {name: the layer that set it}. A wrong setting ends the program, in one line.
    """
    settings, origin = read_settings(namespace['__file__']), {}
    for arg in sys.argv[1:] if argv is None else argv:
        layer, (key, equals, value) = 'command line', arg.removeprefix('--').partition('=')
        if arg in ('-h', '--help'):
            print((namespace['__doc__'] or '').strip() + '\n\nSettings and their defaults:\n')
            for name, (_, comment) in settings.items():
                print(f'  --{name}={namespace[name]!r}'.ljust(42), comment)
            sys.exit(0)
        if not arg.startswith('-'):
            layer, found = arg, run_file(arg, {name: namespace[name] for name in settings})
        elif arg.startswith('--') and equals:
            found = {key: value}
        else:
            sys.exit(f'{arg}: a setting is written --key=value')
        for key, value in found.items():
            if key not in settings:
                near = difflib.get_close_matches(key, settings, n=1)
                hint = f'did you mean {near[0]}?' if near else 'see --help'
                sys.exit(f'{layer}: {key}: no such setting; {hint}')
            kind = settings[key][0]
            try:
                namespace[key], origin[key] = coerce(value, kind), layer
            except (TypeError, ValueError, OverflowError):
                sys.exit(f'{layer}: {key}={value!r} is not of type {kind.__name__}')
    return origin
