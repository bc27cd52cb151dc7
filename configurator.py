"""Settings, and what `auto` means here.

A script's settings are the names assigned above its first function, a dataclass's its fields. The
comment behind each is its help, and its range if it ends in "at least 1" or "from 0 to 1". Config
files (Python) and --key=value are laid over them from left to right; the last one wins.
"""
import ast
import difflib
import functools
import inspect
import re
import sys
import timeit
import tokenize
from pathlib import Path

import torch

KINDS = {'int': int, 'float': float, 'bool': bool, 'str': str}
WORDS = {'true': True, '1': True, 'false': False, '0': False, 'none': None}


def read_settings(*sources):
    """sources: scripts' globals(), dataclasses or instances of one -> {name: (type, comment)}"""
    found = {}
    for source in reversed(sources):    # of two settings of one name, the first source's counts
        kind = source if isinstance(source, type) else type(source)
        found |= parse(Path(source['__file__']).read_text(encoding='utf-8') if kind is dict
                       else inspect.getsource(kind))
    return found


@functools.cache
def parse(text):
    body, found = ast.parse(text).body, {}
    comments = {token.start[0]: token.string.lstrip('# ')
                for token in tokenize.generate_tokens(iter(text.splitlines(True)).__next__)
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
    """A command line's text, or a config file's object, as kind. ValueError if ambiguous."""
    if kind is bool and str(value).lower() in WORDS:
        return WORDS[str(value).lower()]
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        number = float(value)
        if kind is float and number == number:      # not NaN
            return number
        if kind is int and number == number // 1:   # 1e3 is as good an int as 1000; 0.5 is not
            return int(value) if str(value).lstrip('+-').isdigit() else int(number)
    raise ValueError(value)


def range_of(comment):
    """'...; from 0 to 1' -> (0.0, 1.0), '...; at least 1' -> (1.0, inf)"""
    found = re.search(r'(?:at least|from) (\S+?)(?: to (\S+))?$', comment) or [None] * 3
    return float(found[1] or '-inf'), float(found[2] or 'inf')


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
            and not name.startswith('_') and not inspect.ismodule(value)}


def apply_layers(layers, sources):
    """(layer, name, value)s over the defaults of sources -> {name: value}, what is wrong"""
    values, settings, problems = {}, read_settings(*sources), []
    for source in reversed(sources):
        get = source.get if isinstance(source, dict) else functools.partial(getattr, source)
        values.update({name: get(name) for name in read_settings(source)})
    for layer, name, value in layers:
        kind, comment = settings.get(name, (None, ''))
        try:
            values[name] = coerce(value, kind) if kind else value
            low, high = range_of(comment)
            if kind is None:
                near = difflib.get_close_matches(name, settings, n=1)
                meant = f'did you mean {near[0]}?' if near else 'see --help'
                meant = sources[0].get('MOVED', {}).get(name, meant)    # a former setting
                problems.append(f'{layer}: {name}: no such setting; {meant}')
            elif kind in (int, float) and not low <= values[name] <= high:
                problems.append(f'{layer}: {name}={value}: must be {comment.rpartition("; ")[2]}')
        except (TypeError, ValueError, OverflowError):
            problems.append(f'{layer}: {name}={value!r} is not of type {kind.__name__}')
    return values, problems


def configure(namespace, argv=None, others=lambda values: []):
    """Set a script's settings in namespace, its globals(), from argv (None: the command line).
    others: {name: value} so far -> more sources, as a stage's globals(), which are set as well.
    A wrong setting ends the program in one line. -> {name: value}, {name: layer that set it}"""
    layers, sources, argv = [], [namespace], sys.argv[1:] if argv is None else argv
    try:
        for arg in [*argv, '']:
            sources = [namespace, *others(apply_layers(layers, sources)[0])]
            values, problems = apply_layers(layers, sources)
            name, equals, value = arg.removeprefix('--').partition('=')
            if arg and not arg.startswith('-'):
                layers += [(arg, *pair) for pair in run_file(arg, values).items()]
            elif arg.startswith('--') and equals:
                layers.append(('command line', name, value))
            elif arg not in ('-h', '--help', ''):
                raise ValueError(f'{arg}: expected --key=value')
        if {'-h', '--help'} & set(argv):
            print(namespace['__doc__'], '\nSettings and their values:\n')
            for name, (_, comment) in [p for s in sources for p in read_settings(s).items()]:
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


def auto_device(device='auto', local_rank=0):
    """-> 'cuda:<local_rank>', 'mps' or 'cpu': the best here, or what was asked for (ValueError)."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(),
                 'cpu': True}
    if device == 'auto':
        device = next(kind for kind in available if available[kind])
    kind, _, number = device.partition(':')
    exists = kind != 'cuda' or number in ('', *map(str, range(torch.cuda.device_count())))
    if not available.get(kind) or not exists:
        raise ValueError(f'--device={device}: PyTorch finds no such device; choose cuda, mps, cpu')
    return f'cuda:{local_rank}' if device == 'cuda' else device


def auto_dtype(dtype, device):
    """-> torch dtype; auto: bf16 where faster (a CPU is measured), fp16 on old CUDA, else fp32."""
    if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
        raise ValueError(f'--dtype={dtype}: choose auto, float32, bfloat16 or float16')
    if dtype == 'float16' and not device.startswith('cuda'):
        raise ValueError(f'--dtype=float16: only on CUDA; on {device} use bfloat16 or float32')
    if dtype == 'auto' and device.startswith('cuda'):
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(False) else 'float16'
    elif dtype == 'auto':
        faster = device == 'cpu' and cpu_flops(torch.bfloat16, 256) > 1.3 * cpu_flops(n=256)
        dtype = 'bfloat16' if faster else 'float32'
    return getattr(torch, dtype)


def cpu_flops(dtype=torch.float32, n=1024):
    """FLOP/s of this CPU in a product of two n x n matrices, the best of six."""
    a = torch.ones(n, n, dtype=dtype)
    return 2 * n ** 3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=6))
