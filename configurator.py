"""
Settings, and what `auto` means on this machine.

The settings of a script are the names assigned above its first function, those of a dataclass its
fields; the comment behind each is its help, and its range if it ends in "at least 1" or "from 0 to
1". Config files (Python) and --key=value are laid over them from left to right; the last one wins.
"""
import ast
import difflib
import functools
import importlib
import inspect
import io
import re
import sys
import time
import tokenize
from pathlib import Path
from types import ModuleType

import torch

KINDS = {'int': int, 'float': float, 'bool': bool, 'str': str}
WORDS = {'true': True, '1': True, 'false': False, '0': False, 'none': None}


def read_settings(source):
    """source: a script's globals(), a dataclass or an instance -> {name: (type, comment)}"""
    if isinstance(source, dict):
        return parse(Path(source['__file__']).read_text(encoding='utf-8'))
    return parse(inspect.getsource(source if isinstance(source, type) else type(source)))


@functools.cache
def parse(text):
    body, found = ast.parse(text).body, {}
    comments = {token.start[0]: token.string.lstrip('# ')
                for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT}
    for node in body[0].body if isinstance(body[0], ast.ClassDef) else body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        if isinstance(node, ast.AnnAssign) and node.value:
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
            return int(value) if str(value).lstrip('+-').isdigit() else int(number)
    raise ValueError(value)


def range_of(comment):
    """'...; from 0 to 1' -> (0.0, 1.0), '...; at least 1' -> (1.0, inf), others -> None"""
    found = re.search(r'(?:at least|from) (\S+?)(?: to (\S+))?$', comment)
    return found and (float(found[1]), float(found[2] or 'inf'))


def run_file(path, values):
    """Run a config file over the values so far. -> {name: value} of those it changed"""
    if not Path(path).is_file():
        known = ' '.join(sorted(file.as_posix() for file in Path('config').glob('*.py')))
        raise ValueError(f'{path}: no such config file; there are: {known}')
    scope = dict(values, __file__=path, __name__='config')
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), scope)
    except Exception as error:
        raise ValueError(f'{path}: fails with {type(error).__name__}: {error}') from None
    return {name: value for name, value in scope.items() if value is not values.get(name, scope)
            and not name.startswith('_') and not isinstance(value, ModuleType)}


def lay(layers, sources):
    """Lay (layer, name, value)s over the defaults of sources. -> {name: value}, what is wrong"""
    values, settings, problems = {}, {}, []
    for source in reversed(sources):    # of two settings of one name, the first source's counts
        get = source.get if isinstance(source, dict) else functools.partial(getattr, source)
        values.update({name: get(name) for name in read_settings(source)})
        settings.update(read_settings(source))
    for layer, name, value in layers:
        kind, comment = settings.get(name, (None, ''))
        try:
            values[name] = coerce(value, kind) if kind else value
            if kind is None:
                near = difflib.get_close_matches(name, settings, n=1)
                moved = sources[0].get('MOVED', {}).get(name)
                meant = (f'that is now: python -m {moved}; see its --help' if moved else
                         f'did you mean {near[0]}?' if near else 'see --help, --stage=rl --help ...')
                problems.append(f'{layer}: {name}: no such setting; {meant}')
            elif (bounds := range_of(comment)) and not bounds[0] <= values[name] <= bounds[1]:
                problems.append(f'{layer}: {name}={value}: must be {comment.rpartition("; ")[2]}')
        except (TypeError, ValueError, OverflowError):
            problems.append(f'{layer}: {name}={value!r} is not of type {kind.__name__}')
    return values, problems


def configure(namespace, argv=None, others=lambda values: []):
    """
    Set a script's settings in namespace, its globals(), from argv (default: the command line).
    others: {name: value} so far -> more sources, as a stage's globals(), which are set as well.
    Ends the program, in one line, at a wrong setting. -> {name: value}, {name: layer that set it}
    """
    layers, sources, argv = [], [namespace], sys.argv[1:] if argv is None else argv
    try:
        for arg in [*argv, '']:
            sources = [namespace, *others(lay(layers, sources)[0])]
            values, problems = lay(layers, sources)
            name, equals, value = arg.removeprefix('--').partition('=')
            if arg and not arg.startswith('-'):
                layers += [(arg, *pair) for pair in run_file(arg, values).items()]
            elif arg.startswith('--') and equals:
                layers.append(('command line', name, value))
            elif arg not in ('-h', '--help', ''):
                raise ValueError(f'{arg}: a setting is written --key=value')
        if {'-h', '--help'} & set(argv):
            print((namespace['__doc__'] or '').strip() + '\n\nSettings and their values:\n')
            comments = {name: pair[1] for s in sources for name, pair in read_settings(s).items()}
            for name, comment in comments.items():
                print(f'  --{name}={values[name]!r}'.ljust(42), comment)
            sys.exit(0)
        if problems:
            raise ValueError(problems[0])
    except ValueError as error:
        sys.exit(str(error))
    for source in sources:
        if isinstance(source, dict):
            source.update({name: values[name] for name in read_settings(source)})
    return values, {name: layer for layer, name, _ in layers}


def extra(name):
    """-> the module extras/<name>.py, None in a copy of the repository without it"""
    known = Path(__file__).with_name('extras').joinpath(f'{name}.py').exists()
    return importlib.import_module(f'extras.{name}') if known else None


def auto_device(device='auto', local_rank=0):
    """-> 'cuda:<local_rank>', 'mps' or 'cpu': the best here, or what was asked for (ValueError)."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(),
                 'cpu': True}
    if device == 'auto':
        device = next(kind for kind in available if available[kind])
    kind = device.split(':')[0]
    if kind not in available:
        raise ValueError(f'--device={device}: choose cuda, mps or cpu')
    too_high = kind == 'cuda' and int(device[5:] or 0) >= torch.cuda.device_count()
    if not available[kind] or too_high:
        raise ValueError(f'--device={device}: PyTorch finds no such device here; try --device=cpu')
    return f'cuda:{local_rank}' if device == 'cuda' else device


def auto_dtype(dtype, device):
    """-> torch dtype; auto: bf16 where faster (a CPU is measured), fp16 on old CUDA, else fp32."""
    names = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
    if dtype == 'float16' and not device.startswith('cuda'):
        raise ValueError(f'--dtype=float16: only on CUDA; on {device} use bfloat16 or float32')
    if dtype not in (*names, 'auto'):
        raise ValueError(f'--dtype={dtype}: choose auto, {", ".join(names)}')
    if dtype in names:
        return names[dtype]
    if device.startswith('cuda'):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device == 'cpu':
        fast, full = cpu_flops(torch.bfloat16, 256), cpu_flops(torch.float32, 256)
        return torch.bfloat16 if fast > 1.3 * full else torch.float32
    return torch.float32


def cpu_flops(dtype, n=1024):
    """FLOP/s of this CPU in a product of two n x n matrices, the best of six."""
    a, seconds = torch.ones(n, n, dtype=dtype), []
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)
