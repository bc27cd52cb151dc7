"""Settings, and what `auto` means here.

A script's settings are the names assigned above its first function or class, a dataclass's are its
fields. Their comments are the help, and the range if they end in "at least 1" or "from 0 to 1".
Config files (Python) and --key=value are laid over them from left to right; the last one wins.
"""
import ast
import difflib
import functools
import inspect
import math
import re
import sys
import timeit
import tokenize
from pathlib import Path

import torch

KINDS = {'int': int, 'float': float, 'bool': bool, 'str': str}
# What users of other programs type.
MEANT = {'lr': 'learning_rate', 'epochs': 'max_iters', 'steps': 'max_iters', 'layers': 'n_layer',
         'batch': 'batch_size', 'context': 'block_size', 'schedule': 'lr_schedule'}
WORDS = {'true': True, '1': True, 'false': False, '0': False, 'none': None}


def read_settings(*sources):
    """sources: scripts' globals(), dataclasses or instances of one -> {name: (type, comment)}"""
    found = {}
    for source in sources:      # of two settings of one name, the first source's counts
        text = (Path(source['__file__']).read_text(encoding='utf-8') if isinstance(source, dict)
                else inspect.getsource(source if isinstance(source, type) else type(source)))
        found = found | parse(text) | found
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
    number = float(value)       # 1e3 is as good an int as 1000; 0.5 is not
    if (kind is str or bool in (kind, type(value)) or not math.isfinite(number)
            or kind is int and number % 1):
        raise ValueError(value)
    return int(value) if kind is int and str(value).lstrip('+-').isdigit() else kind(number)


def range_of(comment):
    """'...; from 0 to 1' -> (0.0, 1.0), '...; at least 1' -> (1.0, inf)"""
    found = re.search(r'(?:at least|from) (-?[\d.e-]+)(?: to (-?[\d.e-]+))?$', comment)
    return float(found and found[1] or '-inf'), float(found and found[2] or 'inf')


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
        low, high = range_of(comment)
        try:
            values[name] = coerce(value, kind) if kind else value
            if kind in (int, float) and not low <= values[name] <= high:
                problems.append(f'{layer}: {name}={value}: must be {comment.rpartition("; ")[2]}')
        except (TypeError, ValueError, OverflowError):
            problems.append(f'{layer}: {name}={value!r} is not of type {kind.__name__}')
        if kind is None:
            near = difflib.get_close_matches(MEANT.get(name, name), settings)
            moved = sources[0].get('MOVED', {}).get(name)   # where a former setting is now
            advice = moved or (f'did you mean {near[0]}?' if near else 'see --help')
            problems.append(f'{layer}: {name}: no such setting; {advice}')
    return values, problems


def configure(namespace, argv=None, others=lambda values: []):
    """Set a script's settings in namespace, its globals(), from argv (None: the command line).
    others: {name: value} so far -> more sources, as a stage's globals(), which are set as well.
    -> {name: value}, {name: layer that set it}. ValueError for the first wrong setting."""
    layers, sources, argv = [], [namespace], sys.argv[1:] if argv is None else argv
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
        print(namespace['__doc__'] + '\nSettings and their values:\n')
        for name, (_, comment) in read_settings(*sources).items():
            print(f'  --{name}={values[name]!r}'.ljust(42), comment)
        sys.exit(0)
    if problems:
        raise ValueError(problems[0])
    for source in sources:
        if isinstance(source, dict):
            source.update({name: values[name] for name in read_settings(source)})
    return values, {name: layer for layer, name, _ in layers}


def auto_device(device='auto', local_rank=0):
    """-> 'cuda:<local_rank>', 'mps' or 'cpu': the best here, or what was asked for (ValueError)."""
    if device == 'auto':
        mps = 'mps' if torch.backends.mps.is_available() else 'cpu'
        device = 'cuda' if torch.cuda.is_available() else mps
    device = f'cuda:{local_rank}' if device == 'cuda' else device
    try:
        torch.empty(0, device=device).tolist()      # of no size: a GPU may be full
    except (RuntimeError, AssertionError):      # the latter of a build without CUDA
        raise ValueError(f'--device={device}: PyTorch finds no such device; choose cuda, mps or '
                         'cpu') from None
    return device


def auto_dtype(dtype, device):
    """-> torch dtype; auto: bf16 where faster (a CPU is measured), fp16 on old CUDA, else fp32."""
    cuda = device.startswith('cuda')
    if dtype == 'auto' and cuda:
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(False) else 'float16'
    elif dtype == 'auto':
        faster = device == 'cpu' and cpu_flops(torch.bfloat16, 256) > 1.3 * cpu_flops(n=256)
        dtype = 'bfloat16' if faster else 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16') or dtype == 'float16' and not cuda:
        raise ValueError(f'--dtype={dtype}: choose auto, float32, bfloat16, float16 (only on CUDA)')
    return getattr(torch, dtype)


def cpu_flops(dtype=torch.float32, n=1024):
    """FLOP/s of this CPU in a product of two n x n matrices, the best of six."""
    a = torch.ones(n, n, dtype=dtype)
    return 2 * n ** 3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=6))
