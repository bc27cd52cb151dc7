"""What the tests share: a tiny data set, tiny models, and the scripts run as a user runs them."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '2')
import data.tokenizer  # noqa: E402  isort: skip  (before torch: see data/__init__.py)
import pytest  # noqa: E402
import torch  # noqa: E402

from data.files import program  # noqa: E402
from data.sources import write_tokens  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import GPT, GPT2, GPTConfig  # noqa: E402

TEXT = (
    'To be, or not to be: that is the question.\nWhether it is nobler in the mind to suffer\n' * 40
)
TINY = (
    '--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 '
    '--gradient_accumulation_steps=2 --warmup_iters=2 --learning_rate=3e-3 --min_lr=0 '
    '--device=cpu --dtype=float32 --sample_tokens=8'
).split()
FAMILIES = {
    'modern': {},
    'grouped heads': {'n_head': 4, 'n_kv_head': 2},
    'experts': {'n_expert': 5, 'n_expert_active': 2, 'n_expert_shared': 1},
    'windows': {'n_layer': 4, 'window_pattern': 'SSL', 'short_window': 7},
    'n-grams': {'ngrams': 3, 'ngram_rows': 60},
    'GPT-2': dict(GPT2, vocab_multiple=64),
}


def tiny(seed=0, **changes):
    """A model of two layers with nothing left at zero, so that every weight matters."""
    torch.manual_seed(seed)
    config = dict(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=50)
    model = GPT(GPTConfig(**{**config, **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def model(request):
    return tiny(**FAMILIES[request.param])


@pytest.fixture
def bpe(monkeypatch):
    """GPT-2's tokenizer without its file: the 256 bytes and one merge, in the same class."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    ranks.update({b'th': 256})
    tiny = tiktoken.Encoding(
        'tiny', pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 257}
    )
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: tiny)
    data.vocabulary.gpt2_encoding.cache_clear()
    data.files.tokenizer_of.cache_clear()
    yield Tokenizer({'kind': 'gpt2'})
    data.vocabulary.gpt2_encoding.cache_clear()
    data.files.tokenizer_of.cache_clear()


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """-> the path of a prepared character data set, which --dataset takes as it takes a name."""
    folder = tmp_path_factory.mktemp('data') / 'tiny'
    folder.mkdir()
    tokenizer = Tokenizer.of_text(TEXT)
    ids = tokenizer.encode(TEXT)
    write_tokens(folder, tokenizer, 'a line of Hamlet', train=ids[:3000], val=ids[3000:])
    return folder


TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


def script_of(script):
    """-> how python is told to run it: rooms are run as modules, from the project's root"""
    if str(script).startswith('extras/'):
        return '-m', script.removesuffix('.py').replace('/', '.')
    return (str(ROOT / script),)


def run(script, *arguments, launcher=(), cwd=None, ok=True, env=None, timeout=240):
    """Run a script as a user would. -> stdout and stderr together; ok=False expects a refusal."""
    done = subprocess.run(
        [sys.executable, *launcher, *script_of(script), *map(str, arguments)],
        cwd=cwd,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )
    if ok:
        assert done.returncode == 0, done.stdout
    else:
        assert done.returncode != 0, done.stdout
        assert 'Traceback' not in done.stdout, done.stdout
    return done.stdout


def inside(script, *arguments, cwd=None, ok=True):
    """The same in this process, which is quicker. -> what it printed, then the refusal."""
    name = script.removesuffix('.py').replace('/', '.')
    printed = io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True)
    module, refusal = importlib.import_module(name), None
    names = 'stages.rl', 'stages.dpo', 'stages.distill', 'extras.card', 'extras.lora'
    rooms = list(map(importlib.import_module, names))
    before = [(each, dict(vars(each))) for each in (module, *rooms)]
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, 'argv', [script, *map(str, arguments)])
        if cwd:
            patch.chdir(cwd)
        try:
            program(module.main)
        except SystemExit as stop:
            refusal = stop.code
        finally:
            for each, values in before:
                vars(each).update(values)
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, signal.default_int_handler)
    text = printed.buffer.getvalue().decode()
    assert (refusal is None) == ok, (refusal, text)
    assert ok or (isinstance(refusal, str) and '\n' not in refusal), refusal
    return text + (refusal or '')


@contextlib.contextmanager
def serving(server):
    """A server of extras/serve.py at work in a thread of its own."""
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope='session')
def trained(dataset, tmp_path_factory):
    """-> the folder of a short finished run."""
    folder = tmp_path_factory.mktemp('runs') / 'out'
    inside(
        'train.py',
        *TINY,
        f'--dataset={dataset}',
        f'--out_dir={folder}',
        '--max_iters=12',
        '--eval_interval=6',
    )
    return folder
