"""The house's three laws: the core stands alone, doors open one way, settings stand where read."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TEXT, TINY, TORCHRUN

from configurator import read_settings

CORE = [ROOT / name for name in ('model.py', 'train.py', 'sample.py', 'configurator.py')]
BUDGETS = {'model.py': 350, 'train.py': 400, 'sample.py': 350, 'configurator.py': 170}
ROOMS = sorted([*ROOT.glob('stages/[a-z]*.py'), *ROOT.glob('extras/[a-z]*.py')])
FILES = [*CORE, *sorted(ROOT.glob('data/**/*.py')), *ROOMS]


def module_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def imports_of(path, top_level=False):
    """-> the project's modules that a file imports, at its top level or anywhere"""
    tree, known = ast.parse(path.read_text(encoding='utf-8')), set(map(module_of, FILES))
    nodes = tree.body if top_level else ast.walk(tree)
    nodes = [inner for node in nodes for inner in ([node, *ast.walk(node)] if isinstance(
        node, ast.Try | ast.If) and top_level else [node])]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found & known


def test_no_two_files_import_each_other_nor_a_longer_circle():
    graph = {module_of(path): imports_of(path) for path in FILES}
    done, path = set(), []

    def visit(module):
        assert module not in path, f'a circle: {" -> ".join([*path, module])}'
        if module not in done:
            path.append(module)
            for other in graph[module]:
                visit(other)
            path.pop()
            done.add(module)

    for module in graph:
        visit(module)
    assert len(done) == len(FILES) > 30


@pytest.mark.parametrize('path', [*CORE, *sorted(ROOT.glob('data/*.py'))], ids=module_of)
def test_the_core_imports_no_room_at_module_level(path):
    rooms = {module_of(room) for room in ROOMS}
    assert not imports_of(path, top_level=True) & rooms
    if path.name == 'model.py':
        tree = ast.parse(path.read_text())
        roots = {alias.name.split('.')[0] for node in ast.walk(tree)
                 if isinstance(node, ast.Import) for alias in node.names}  # fmt: skip
        roots |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {root.split('.')[0] for root in roots} <= {'torch', 'math', 'dataclasses', 'extras'}


@pytest.mark.parametrize('path', [ROOT / name for name in BUDGETS] + ROOMS, ids=module_of)
def test_every_setting_is_read_in_the_file_that_declares_it(path):
    text = path.read_text(encoding='utf-8')
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Load)}  # fmt: skip
    names = read_settings({'__file__': path})
    # What concerns a run's folder and its rows is read there, from run.config.
    runs = ''.join((ROOT / f'data/{name}.py').read_text() for name in (
        'runs', 'models', 'rows', 'processes'))
    for name in names:
        elsewhere = f"config['{name}']" in runs or f'config["{name}"]' in runs
        assert name in used or elsewhere, f'{path.name}: {name} is never read'


def test_every_field_of_the_network_is_read_in_model_py():
    from model import GPTConfig

    text = (ROOT / 'model.py').read_text() + (ROOT / 'extras/experts.py').read_text()
    for name in read_settings(GPTConfig):
        assert re.search(rf'(config|self)\.{name}\b|getattr\(self, name\)', text)
        assert len(re.findall(rf'\b{name}\b', text)) >= 2, f'{name} is never read'


def test_the_four_files_are_read_in_one_sitting():
    """Budgets of this repository, for its maintainers: in a copy of your own, raise them above."""
    for name, most in BUDGETS.items():
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) <= most, f'{name} is over its budget: simplify, or raise BUDGETS'
        assert max(map(len, lines)) <= 100
        statements = [node for node in ast.walk(ast.parse('\n'.join(lines)))
                      if isinstance(node, ast.stmt)]  # fmt: skip
        starts = [node.lineno for node in statements]
        assert len(starts) == len(set(starts)), f'{name}: two statements on a line'
        for node in statements:
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f'{name}: {node.name} is too long'


@pytest.fixture(scope='module')
def core(tmp_path_factory):
    """-> a copy of the repository without stages/ and extras/"""
    folder = tmp_path_factory.mktemp('core') / 'oneloop'
    ignored = shutil.ignore_patterns('*.bin', 'meta.json', '__pycache__')
    for name in 'data', 'config':
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in CORE:
        shutil.copy(path, folder)
    (folder / 'hamlet.txt').write_text(TEXT)
    command(folder, 'data/shakespeare_char/prepare.py', '--source=hamlet.txt')
    return folder


def command(folder, *arguments, launcher=(), ok=True):
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=folder, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def test_the_core_alone_prepares_trains_resumes_and_samples(core):
    import torch

    tiny = [*TINY, '--dataset=shakespeare_char', '--dropout=0.1', '--eval_interval=4']
    command(core, 'train.py', *tiny, '--out_dir=whole', '--max_iters=8')
    command(core, 'train.py', *tiny, '--out_dir=cut', '--max_iters=4', '--lr_decay_iters=8')
    command(core, 'train.py', *tiny, '--out_dir=cut', '--max_iters=8', '--init_from=resume')
    whole, cut = (torch.load(core / name / 'ckpt.pt')['model'] for name in ('whole', 'cut'))
    assert all(torch.equal(p, cut[name]) for name, p in whole.items())
    command(core, 'train.py', *tiny, '--stage=finetune', '--init_from=whole', '--out_dir=fine',
            '--max_iters=2')  # fmt: skip
    text = command(core, 'sample.py', '--out_dir=fine', '--num_samples=2', '--max_new_tokens=9')
    assert text.count('---------------') == 2
    assert not (core / 'extras').exists() and not (core / 'stages').exists()


def test_the_core_alone_does_sft_on_several_processes(core):
    sft = ['--stage=sft', '--dataset=smalltalk', '--n_layer=1', '--n_head=1', '--n_embd=16',
           '--block_size=64', '--batch_size=4', '--gradient_accumulation_steps=2', '--max_iters=2',
           '--eval_iters=2', '--device=cpu', '--dtype=float32', '--out_dir=talk']  # fmt: skip
    text = command(core, 'train.py', *sft, launcher=TORCHRUN)
    assert 'step 2: val_loss' in text and (core / 'talk' / 'best.pt').exists()


def test_a_stage_that_is_not_there_is_named(core):
    text = command(core, 'train.py', '--stage=rl', ok=False)
    assert '--stage=rl: no such stage; there are: pretrain finetune sft' in text
    assert 'Traceback' not in text


WITHOUT_ONE = """
import importlib, pathlib, sys
extras = sorted(pathlib.Path('extras').glob('[a-z]*.py'))
names = ['train'] + [f'{path.parent.name}.{path.stem}'
                     for path in extras + sorted(pathlib.Path('stages').glob('[a-z]*.py'))]
for missing in extras:
    for name in [name for name in sys.modules if name.split('.')[0] in (
            'train', 'sample', 'model', 'configurator', 'data', 'stages', 'extras')]:
        del sys.modules[name]
    text = missing.read_bytes()
    missing.unlink()
    for name in names:
        if name != f'extras.{missing.stem}':
            importlib.import_module(name)
    missing.write_bytes(text)
    print('without', missing.stem)
"""


def test_without_one_room_all_others_can_be_entered(tmp_path):
    """Every program and stage is imported in a copy where one file of extras/ is missing."""
    folder = tmp_path / 'oneloop'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        '.git', '*.bin', 'out*', 'tests', 'assets', '__pycache__'))  # fmt: skip
    text = command(folder, '-c', WITHOUT_ONE)
    assert text.count('without') == len(list(ROOT.glob('extras/[a-z]*.py'))) > 9


def test_assets_holds_pictures_alone():
    assert {Path(path).suffix for path in (ROOT / 'assets').iterdir()} == {'.png'}
