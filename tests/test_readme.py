"""What the README says can be typed, and what nanoGPT's users type, is taken and works."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT, TORCHRUN, inside, run

import sample
from configurator import configure
from sample import Sampling

README = (ROOT / 'README.md').read_text(encoding='utf-8')
NOTEBOOK = (ROOT / 'config' / 'README.md').read_text(encoding='utf-8')
FOUND = re.findall(
    r'(?:python|&&|nnodes|torchrun)[^\n|`&]*?((?:\b(?:train|sample)\.py|-m extras\.)[^\n`#&|]*)',
    README + NOTEBOOK,
)
COMMANDS = sorted({command.strip() for command in FOUND if '--help' not in command})
NANOGPT = """
train.py config/train_shakespeare_char.py
sample.py --out_dir=out-shakespeare-char
train.py config/train_shakespeare_char.py --device=cpu --compile=False \
--eval_iters=20 --log_interval=1 \
--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 \
--lr_decay_iters=2000 --dropout=0.0
sample.py --out_dir=out-shakespeare-char --device=cpu
train.py config/train_gpt2.py
train.py config/eval_gpt2.py
train.py config/eval_gpt2_medium.py
train.py config/eval_gpt2_large.py
train.py config/eval_gpt2_xl.py
train.py config/finetune_shakespeare.py
sample.py --out_dir=out-shakespeare
sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?" \
--num_samples=5 --max_new_tokens=100
sample.py --start=FILE:prompt.txt
""".strip().splitlines()


@pytest.mark.parametrize('command', COMMANDS + NANOGPT)
def test_every_command_is_accepted(command):
    script, *arguments = shlex.split(command)
    if script == '-m':  # a program of extras/
        module = importlib.import_module(arguments[0])
        namespace = dict(vars(module))
        configure(namespace, arguments[1:], lambda values: [Sampling()])
    elif script == 'train.py':
        text = inside(
            script, *arguments, '--dry_run=True', '--dtype=float32', '--init_from=scratch', cwd=ROOT
        )
        assert 'FLOPs per token' in text
    else:
        configure(dict(vars(sample)), arguments, lambda values: [Sampling()])


def test_the_readme_names_files_that_are_there_and_measures_with_commands_that_exist():
    folders = 'config|data|tests|assets|stages|extras'
    paths = re.findall(rf'\b((?:{folders})/[\w/]+\.(?:py|png|html))', README)
    assert len(set(paths)) >= 8
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_nanogpts_cpu_command_runs_over_the_laptops_own_config(dataset, tmp_path):
    arguments = shlex.split(NANOGPT[2])[1:]
    shorter = [
        '--max_iters=3',
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/out',
        '--dtype=float32',
    ]
    text = inside('train.py', *arguments, *shorter, cwd=ROOT)
    assert 'step 3: val_loss' in text
    text = inside(
        'sample.py',
        f'--out_dir={tmp_path}/out',
        '--device=cpu',
        '--num_samples=2',
        '--max_new_tokens=9',
    )
    assert text.count('---------------') == 2


def test_the_laptop_config_runs_under_torchrun(dataset, tmp_path):
    run(
        'train.py',
        'config/train_shakespeare_char.py',
        '--max_iters=2',
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/out',
        '--n_layer=1',
        '--ngram_rows=64',
        launcher=TORCHRUN,
        cwd=ROOT,
    )
    assert (tmp_path / 'out' / 'best.pt').exists()


def test_the_command_line_refuses_before_anything_is_touched(tmp_path):
    text = run('train.py', '--batch_sise=2', cwd=tmp_path, ok=False)
    assert 'did you mean batch_size?' in text and not list(tmp_path.iterdir())
    assert '--learning_rate=0.0006' in run('train.py', '--help')
