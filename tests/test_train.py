"""The loop: gradients against one big batch, two processes against one, kills, refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TORCHRUN, inside, run, tiny

import train
from configurator import read_settings
from data import files, rows, runs, sources
from data.files import mixture_of, program, read_meta
from data.models import read_checkpoint
from data.rows import read_rows
from data.runs import read_log
from data.tokenizer import Tokenizer
from extras.plot import draw, points
from model import GPT2


@pytest.fixture
def settings(monkeypatch, dataset):
    """-> a function that sets train.py's settings for one test."""

    def lay(**values):
        for name, value in values.items():
            monkeypatch.setattr(train, name, value)

    lay(
        batch_size=4,
        gradient_accumulation_steps=2,
        block_size=16,
        seed=1,
        dataset=str(dataset),
        grad_clip=0.0,
        warmup_iters=0,
        decay_lr=False,
        eval_iters=0,
    )
    return lay


def make_run(dataset, model=None, **changes):
    model = model or tiny(block_size=16, vocab_size=40)
    made = train.Run(
        config={name: vars(train)[name] for name in read_settings(vars(train))},
        stage=train.Stage(read_rows),
        device='cpu',
        dtype=torch.float32,
        rank=0,
        world=1,
        data={dataset: 1.0},
        meta=read_meta(dataset),
        tokenizer=Tokenizer(read_meta(dataset)['tokenizer']),
        model=model,
        network=model,
        optimizers=model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 0.02, torch.float32),
        scaler=torch.amp.GradScaler('cuda', enabled=False),
        lineage=[{'init_from': 'scratch'}],
    )
    vars(made).update(changes)
    return made


def gradients_of(run, batches, monkeypatch):
    """The gradients that one_step hands to the optimizers."""
    seen = []
    for optimizer in run.optimizers:
        monkeypatch.setattr(optimizer, 'step', lambda *_: seen.append(None))
    monkeypatch.setattr(run.model, 'zero_grad', lambda set_to_none: None)
    result = train.one_step(run, batches, 0)
    gradients = [p.grad.clone() for p in run.model.parameters()]
    monkeypatch.undo()
    run.model.zero_grad()
    return gradients, result, len(seen)


def unequal_batches(step):
    torch.manual_seed(step)
    x, y, w = torch.randint(40, (4, 16)), torch.randint(40, (4, 16)), torch.randn(4, 16)
    y[0, 3:] = y[1, :9] = y[2] = -1  # 3, 7, 0 and 16 tokens in play
    return x, y, w


@pytest.mark.parametrize('parts', [1, 2, 4])
def test_accumulated_microbatches_equal_one_big_batch(dataset, settings, monkeypatch, parts):
    x, y, w = unequal_batches(0)
    run = make_run(dataset)
    _, loss = run.model(x, y, w)
    (loss / (y >= 0).sum()).backward()
    expected = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()

    def batches(step):
        return zip(x.chunk(parts), y.chunk(parts), w.chunk(parts))

    got, (mean, count, _), _ = gradients_of(run, batches, monkeypatch)
    assert count == 26 and mean == pytest.approx(loss.item() / 26, rel=1e-5)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_clipping_limits_the_norm_of_the_whole_gradient(dataset, settings, monkeypatch):
    x, y, w = unequal_batches(0)
    free, (_, _, norm), _ = gradients_of(make_run(dataset), lambda step: [(x, y, w)], monkeypatch)
    monkeypatch.setattr(train, 'grad_clip', 0.01)
    clipped, _, _ = gradients_of(make_run(dataset), lambda step: [(x, y, w)], monkeypatch)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in free]).norm().item(), rel=1e-4)
    assert torch.cat([g.flatten() for g in clipped]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_step_with_nothing_in_play_changes_nothing(dataset, settings):
    run = make_run(dataset)
    before = [p.detach().clone() for p in run.model.parameters()]
    nothing = torch.zeros(2, 16, dtype=torch.long), torch.full((2, 16), -1), None
    loss, count, norm = train.one_step(run, lambda step: [nothing], 0)
    assert (loss, count, norm, run.skipped) == (0.0, 0, 0.0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_step_that_is_not_finite_is_skipped_and_counted(dataset, settings, bad):
    run = make_run(dataset)
    before = [p.detach().clone() for p in run.model.parameters()]
    x, y, w = unequal_batches(0)
    for step in range(2):
        train.one_step(run, lambda step: [(x, y, w * bad)], step)
    assert run.skipped == 2 and all(
        torch.equal(a, b) for a, b in zip(before, run.model.parameters())
    )
    train.one_step(run, lambda step: [(x, y, w)], 2)
    assert run.skipped == 0 and not any(
        torch.equal(a, b) for a, b in zip(before, run.model.parameters())
    )
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_the_batch_of_a_step_is_the_same_for_every_number_of_processes(dataset, settings):
    def rows(world, step):
        parts = []
        for rank in range(world):
            batches, _ = read_rows(make_run(dataset, rank=rank, world=world))
            parts.append(torch.cat([torch.cat((x, y[:, -1:]), 1) for x, y, _ in batches(step)]))
        return sorted(torch.cat(parts).tolist())

    assert rows(1, 7) == rows(2, 7) == rows(4, 7) == rows(8, 7) != rows(1, 8)


@pytest.mark.parametrize('seed', range(5))
def test_an_epoch_reads_every_window_once_and_the_next_in_another_order(
    dataset, settings, tmp_path, seed
):
    for split in 'train', 'val':
        np.arange(800, dtype=np.uint16).tofile(tmp_path / f'{split}.bin')  # a token is its place
    settings(batch_size=1, gradient_accumulation_steps=6, seed=seed)
    model = tiny(block_size=16, vocab_size=1000)
    batches, _ = read_rows(make_run(dataset, model, data={tmp_path: 1.0}))
    orders = []
    for epoch in range(3):  # (800 - 1) // 16 - 1 = 48 windows are 8 steps of 6 rows
        rows = [row for step in range(8 * epoch, 8 * epoch + 8) for row in batches(step)]
        starts = [int(x[0, 0]) for x, _, _ in rows]
        assert all((torch.cat((x[0], y[0, -1:])).diff() == 1).all() for x, y, _ in rows)
        assert np.diff(sorted(starts)).tolist() == [16] * 47
        orders.append(starts)
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])


def test_evaluation_is_the_loss_over_every_target_once(dataset, settings):
    """Against the slow way, window by window; in bits per byte; from 3 processes' sums."""
    run = make_run(dataset)
    val = torch.from_numpy(np.fromfile(dataset / 'val.bin', np.uint16).astype(np.int64))
    total, last = 0.0, (len(val) - 1) // 16 * 16
    for i in range(0, last, 16):
        total += run.model(val[None, i : i + 16], val[None, i + 1 : i + 17])[1].item()
    y = val[-16:].clone()  # the last window slides back, and only its new targets count
    y[: last + 17 - len(val)] = -1
    assert 0 < (y >= 0).sum() < 16
    total += run.model(val[None, -17:-1], y[None])[1].item()
    metrics, score = read_rows(run)[1]()
    assert score == metrics['val_loss'] == pytest.approx(total / (len(val) - 1), rel=1e-5)
    assert metrics['val_bits_per_byte'] == pytest.approx(
        score / np.log(2), rel=1e-5
    )  # a character is a byte here
    sums = []
    for rank in range(3):
        part = make_run(dataset, rank=rank, world=3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, 'all_sum', lambda values: (sums.append(values), [1, 1, 1])[1])
            read_rows(part)[1]()
    assert (sum(sums)[0] / sum(sums)[1]).item() == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize('device', ['cpu', 'mps', 'cuda:1'])
def test_a_batch_goes_to_the_device_whatever_it_is(dataset, settings, device):
    class Tensor:
        is_cuda, moved = False, None

        def pin_memory(self):
            return self

        def to(self, where, non_blocking):
            self.moved = where
            return self

    run = make_run(dataset, device=device)
    batch = run.forward(lambda *batch: batch, Tensor(), Tensor(), None)
    assert [t.moved for t in batch] == [device, device]


def test_eval_iters_caps_the_batches(dataset, settings):
    settings(eval_iters=2)
    run, seen = make_run(dataset), []
    run.network = lambda x, y: (seen.append(x.shape[0]), (None, torch.zeros(())))[1]
    read_rows(run)[1]()
    assert seen == [4, 4]


def test_schedules(settings):
    settings(
        decay_lr=True,
        warmup_iters=10,
        max_iters=110,
        lr_decay_iters=0,
        min_lr=1e-4,
        learning_rate=1e-3,
        lr_schedule='cosine',
    )
    assert [train.schedule(i) for i in (0, 9)] == pytest.approx([1 / 11, 10 / 11])
    assert [train.schedule(i) for i in (10, 60, 110, 500)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    settings(lr_schedule='linear', warmdown=0.5, min_lr=0.0)
    assert [train.schedule(i) for i in (10, 55, 82.5, 110)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    settings(lr_decay_iters=50)
    assert train.schedule(60) == 0.0
    settings(decay_lr=False)
    assert train.schedule(0) == 1.0


def final_weights(folder):
    return {name: p for name, p in read_checkpoint(folder / 'ckpt.pt')['model'].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LONG = ['--dropout=0.1', '--max_iters=40', '--eval_interval=5', '--log_interval=1']


def test_a_picture_has_the_runs_one_after_the_other_and_no_loss_of_weighed_answers(tmp_path):
    logs = {
        'sft': [
            {'step': 1, 'seconds': 60.0, 'loss': 2.0},
            {'step': 2, 'seconds': 120.0, 'val_loss': 1.5},
        ],
        'rl': [{'step': 1, 'seconds': 30.0, 'loss': 0.0, 'reward': 0.5}],
    }
    for name, lines in logs.items():
        (tmp_path / name).mkdir()
        text = '\n'.join(map(json.dumps, lines))
        (tmp_path / name / 'log.jsonl').write_text(text)
    assert points(read_log(tmp_path / 'sft'), 'loss', 0.0) == ([1.0], [2.0])
    assert points(read_log(tmp_path / 'rl'), 'loss', 2.0) == ([], [])
    assert points(read_log(tmp_path / 'rl'), 'reward', 2.0) == ([2.5], [0.5])
    assert read_log(tmp_path / 'none') == []
    target = tmp_path / 'stages.png'
    draw([tmp_path / 'sft', tmp_path / 'rl'], target, 'both', [0.25, 0.75])
    both = target.read_bytes()
    draw([tmp_path / 'sft'], target, 'one')
    assert both[:4] == target.read_bytes()[:4] == b'\x89PNG' and both != target.read_bytes()


@pytest.mark.parametrize('muon', [0.02, 0.0])
def test_a_killed_run_resumes_to_the_very_same_weights(dataset, tmp_path, muon):
    """kill -9 at two arbitrary moments, with dropout and accumulation; each step is logged once."""
    common = [*TINY, *LONG, f'--dataset={dataset}', f'--muon_lr={muon}']
    inside('train.py', *common, f'--out_dir={tmp_path}/whole')
    command = [
        sys.executable,
        str(ROOT / 'train.py'),
        *common,
        f'--out_dir={tmp_path}/killed',
        '--init_from=resume',
    ]
    for lines in 7, 16:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log, deadline = tmp_path / 'killed' / 'log.jsonl', time.monotonic() + 120
        while (
            not (log.exists() and len(log.read_text().splitlines()) > lines)
            and time.monotonic() < deadline
        ):
            assert process.poll() is None
        process.kill()
        process.wait()
    inside('train.py', *command[2:])
    assert same(final_weights(tmp_path / 'killed'), final_weights(tmp_path / 'whole'))
    logs = [
        [json.loads(line) for line in open(tmp_path / name / 'log.jsonl')]
        for name in ('killed', 'whole')
    ]
    assert [(line['step'], line.get('loss')) for line in logs[0]] == [
        (line['step'], line.get('loss')) for line in logs[1]
    ]


def test_a_resumed_run_logs_the_means_of_the_uninterrupted_one(dataset, tmp_path):
    common = [*TINY, f'--dataset={dataset}', '--decay_lr=False', '--log_interval=4',
              '--eval_interval=3']  # fmt: skip
    inside('train.py', *common, '--max_iters=9', f'--out_dir={tmp_path}/whole')
    inside('train.py', *common, '--max_iters=6', f'--out_dir={tmp_path}/cut')
    inside('train.py', *common, '--max_iters=9', f'--out_dir={tmp_path}/cut', '--init_from=resume')
    logs = [{line['step']: line.get('loss') for line in runs.read_log(tmp_path / name)}
            for name in ('whole', 'cut')]  # fmt: skip
    assert logs[0] == logs[1] and logs[0][8] is not None


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(dataset, tmp_path, number):
    command = [
        *TINY,
        '--dropout=0.1',
        '--max_iters=60',
        '--eval_interval=30',
        f'--dataset={dataset}',
    ]
    inside('train.py', *command, f'--out_dir={tmp_path}/whole')
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'train.py'), *command, f'--out_dir={tmp_path}/cut'],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith('step 4:'):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == 0, rest
    assert re.search(
        r'stopped and saved after step \d+; to go on: python train.py .*--init_from=resume', rest
    )
    assert read_checkpoint(tmp_path / 'cut' / 'ckpt.pt')['iter_num'] < 60
    inside('train.py', *command, f'--out_dir={tmp_path}/cut', '--init_from=resume')
    assert same(final_weights(tmp_path / 'cut'), final_weights(tmp_path / 'whole'))


TWO = '''
import sys, torch
sys.path.insert(0, {root!r})
import train
step = train.one_step
def spy(run, batches, number):
    for optimizer in run.optimizers:
        optimizer.step = lambda *_: torch.save(
            [p.grad for p in run.model.parameters()], {out!r} + str(run.rank))
    return step(run, batches, number)
train.one_step = spy
train.main()
'''


@pytest.mark.parametrize(
    'rows',
    [
        ('--batch_size=4', '--gradient_accumulation_steps=2'),
        ('--batch_size=8', '--gradient_accumulation_steps=1'),
    ],
    ids=str,
)
def test_two_processes_give_the_gradients_of_one(dataset, tmp_path, rows):
    """Over gloo; the gradients are compared, since adaptive optimizers hide a wrong scale."""

    def gradients(name, launcher):
        (tmp_path / f'{name}.py').write_text(TWO.format(root=str(ROOT), out=str(tmp_path / name)))
        run(
            tmp_path / f'{name}.py',
            *TINY,
            *rows,
            f'--dataset={dataset}',
            '--max_iters=1',
            '--zero_init=False',
            f'--out_dir={tmp_path}/{name}-run',
            '--grad_clip=0',
            launcher=launcher,
            env={'OMP_NUM_THREADS': '1'},
        )
        return [torch.load(tmp_path / f'{name}{rank}') for rank in range(2 if launcher else 1)]

    one = gradients('one', ())[0]
    two = gradients('two', TORCHRUN)
    for single, first, second in zip(one, *two, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, single, atol=1e-7, rtol=1e-4)


def test_processes_that_rows_do_not_divide_among_are_refused(dataset, tmp_path):
    text = run(
        'train.py',
        *TINY,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/out',
        ok=False,
        env=dict(RANK='0', WORLD_SIZE='3', LOCAL_RANK='0'),
    )
    assert (
        '--batch_size=4 x --gradient_accumulation_steps=2 do not divide among 3 processes' in text
    )


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='limits of a process are for Unix')
def test_a_full_disk_says_so_and_keeps_the_last_good_checkpoint(dataset, tmp_path):
    folder, common = (
        tmp_path / 'out',
        [*TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--eval_interval=4'],
    )
    inside('train.py', *common, '--max_iters=4')
    before = {name: (folder / name).read_bytes() for name in ('best.pt', 'ckpt.pt')}
    code = (
        'import resource, runpy, sys;'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));'
        f'sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:];'
        'runpy.run_path(sys.argv[0], run_name="__main__")'
    )
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            code,
            str(ROOT / 'train.py'),
            *common,
            '--max_iters=8',
            '--init_from=resume',
        ],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode != 0
        and 'cannot be written' in done.stderr
        and 'Traceback' not in done.stderr
    ), done.stderr
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert not list(folder.glob('*.tmp'))


def test_a_run_that_is_there_is_moved_aside_and_never_overwritten(dataset, tmp_path):
    common = [*TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--max_iters=2']
    inside('train.py', *common)
    first = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    assert 'moved to' in inside('train.py', *common, '--seed=2')
    inside('train.py', *common, '--seed=3')
    assert (tmp_path / 'out.1' / 'ckpt.pt').read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {'out', 'out.1', 'out.2'}
    for harmless in '--eval_only=True', '--dry_run=True':
        inside('train.py', *common, harmless, '--init_from=resume', '--seed=3')
        inside('train.py', *common, harmless)
    assert {p.name for p in tmp_path.iterdir()} == {'out', 'out.1', 'out.2'}
    text = inside('train.py', *common, f'--init_from={tmp_path}/out', ok=False)
    assert 'is the run that --init_from reads' in text


def test_finetuning_starts_from_a_run_and_records_where_it_came_from(dataset, trained, tmp_path):
    text = inside(
        'train.py',
        *TINY,
        '--stage=finetune',
        f'--init_from={trained}',
        f'--dataset={dataset}',
        '--max_iters=2',
        f'--out_dir={tmp_path}/fine',
    )
    lineage = read_checkpoint(tmp_path / 'fine' / 'ckpt.pt')['lineage']
    assert [entry['stage'] for entry in lineage] == ['pretrain', 'finetune'] and lineage[1][
        'init_from'
    ] == str(trained)
    first = float(re.search(r'step 0: val_loss (\S+),', text)[1])
    best = json.loads((trained / 'log.jsonl').read_text().splitlines()[-1])['val_loss']
    assert first == pytest.approx(best, abs=1e-3)


def test_the_log_the_picture_and_the_card(trained, dataset, tmp_path):
    lines = [json.loads(line) for line in open(trained / 'log.jsonl')]
    assert all(
        {'step', 'tokens', 'seconds'} < line.keys() and ('loss' in line) != ('val_loss' in line)
        for line in lines
    )
    assert [line['step'] for line in lines if 'val_loss' in line] == [6, 12]
    assert (trained / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    text = inside(
        'train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/none', '--dry_run=True'
    )
    assert 'a step      128 tokens: 2 x 4 rows of 16' in text and not (tmp_path / 'none').exists()


@pytest.mark.parametrize('muon', [0.02, 0.0])
def test_the_card_foretells_the_size_of_a_checkpoint(dataset, tmp_path, muon):
    text = inside(
        'train.py',
        *TINY,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/out',
        f'--muon_lr={muon}',
        '--n_embd=256',
        '--max_iters=1',
    )
    size = (tmp_path / 'out' / 'ckpt.pt').stat().st_size / 1e6
    assert size > 10
    assert float(re.search(r'checkpoint  ([\d.]+) MB', text)[1]) == pytest.approx(size, rel=0.01)


def test_without_a_data_set_the_fallback_is_named_in_every_record(tmp_path, monkeypatch):
    """As config/train_shakespeare_char.py does it: Shakespeare is neither there nor to be had."""
    import requests

    monkeypatch.setattr(
        requests, 'get', lambda *a, **k: (_ for _ in ()).throw(requests.ConnectionError())
    )
    for name in 'shakespeare_char', 'pydocs_char':
        (tmp_path / 'data' / name).mkdir(parents=True)
        script = (ROOT / 'data' / name / 'prepare.py').read_text()
        (tmp_path / 'data' / name / 'prepare.py').write_text(script)
    np.zeros(99, np.uint16).tofile(tmp_path / 'data' / 'pydocs_char' / 'train.bin')
    said = []
    monkeypatch.setattr(files, 'DATA', tmp_path / 'data')
    for name, value in dict(
        dataset='shakespeare_char',
        fallback_dataset='pydocs_char',
        dry_run=False,
        out_dir='out-shakespeare-char',
    ).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(runs, 'say', said.append)
    config = {name: vars(train)[name] for name in read_settings(vars(train))}
    runs.choose_data(config, {}, 0)
    assert (config['dataset'], config['out_dir']) == ('pydocs_char', 'out-pydocs-char')
    assert any('NOT SHAKESPEARE_CHAR' in line for line in said) and any(
        'cannot download' in line for line in said
    )


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--n_head=3'], 'does not divide into n_head = 3'),
        (['--dataset=nowhere'], 'there are:'),
        (['--batch_size=0'], 'batch_size=0: must be from 1 to'),
        (['--stage=dream'], 'no such stage; there are: pretrain'),
        (['--block_size=4000'], 'make --block_size smaller'),
        (['--init_from=/nowhere'], 'no run there'),
        (['--dtype=float64'], 'choose auto'),
        (['--batch_sise=2'], 'did you mean batch_size?'),
        (['none.py'], 'no such config'),
        (['--norm=batch'], "norm = 'batch'"),
        (['--dropout=2'], 'dropout'),
        (['--min_lr=1'], '--min_lr=1.0 is above --learning_rate=0.003'),
        (['--n_layer=1000000'], 'must be from 1 to 1e4'),
        (['--dry_run=True', '--gpus=0xH100'], 'write a number and a GPU'),
        (['--dry_run=True', '--gpus=-3xH100'], 'write a number and a GPU'),
        (['--warmdown=0'], 'warmdown=0: must be from 1e-6 to 1'),
    ],
    ids=str,
)
def test_bad_settings_are_one_clear_line_and_leave_nothing(dataset, tmp_path, arguments, words):
    common = [*TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--max_iters=2']
    text = inside('train.py', *common, *arguments, ok=False)
    assert words in text.splitlines()[-1] and not (tmp_path / 'out').exists(), text


def test_several_bad_steps_in_a_row_stop_with_advice(dataset, tmp_path):
    text = inside(
        'train.py',
        *TINY,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/out',
        '--learning_rate=1e30',
        '--grad_clip=0',
        '--muon_lr=1e30',
        '--max_iters=30',
        '--warmup_iters=0',
        '--eval_interval=100',
        ok=False,
    )
    assert 'not finite: skipped, 5 in a row' in text and 'lower --learning_rate' in text


def test_weights_that_are_not_finite_are_not_saved_and_the_run_fails(dataset, tmp_path):
    common = [*TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--eval_interval=2']
    inside('train.py', *common, '--max_iters=2')
    good = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    text = inside('train.py', *common, '--max_iters=4', '--init_from=resume', '--decay_lr=False',
                  '--learning_rate=1e38', '--min_lr=0', ok=False)  # fmt: skip
    assert 'not finite' in text and (tmp_path / 'out' / 'ckpt.pt').read_bytes() == good
    lines = (tmp_path / 'out' / 'log.jsonl').read_text().splitlines()
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))


def test_a_run_whose_last_step_was_skipped_fails(dataset, tmp_path):
    text = inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out',
                  '--learning_rate=1e30', '--max_iters=2', ok=False)  # fmt: skip
    assert '1 updates in a row not finite' in text


def test_a_checkpoint_with_a_flipped_bit_is_named(trained, tmp_path):
    data = bytearray((trained / 'ckpt.pt').read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / 'ckpt.pt').write_bytes(data)
    with pytest.raises(ValueError, match='damaged .*checksum'):
        read_checkpoint(tmp_path / 'ckpt.pt')


def test_resuming_where_only_the_best_checkpoint_is_left_does_not_start_anew(trained, tmp_path):
    shutil.copy(trained / 'best.pt', tmp_path)
    text = inside('train.py', *TINY, f'--out_dir={tmp_path}', '--init_from=resume',
                  '--dataset=pydocs_char', '--max_iters=1', ok=False)  # fmt: skip
    assert 'has best.pt, but no ckpt.pt' in text and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    'setting, words',
    [
        ('--n_layer=3', 'has n_layer=2, which cannot be changed'),
        ('--activation=gelu', 'has activation=relu2, which cannot be changed'),
        ('--n_kv_head=1', 'has n_kv_head=2, which cannot be changed'),
    ],
)
@pytest.mark.parametrize('how', ['resume', 'another run'])
def test_a_network_that_is_loaded_is_not_another_one(
    dataset, trained, tmp_path, setting, words, how
):
    folder = trained if how == 'resume' else tmp_path / 'out'
    source = f'--init_from={"resume" if how == "resume" else trained}'
    text = inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={folder}', source, setting,
                  '--max_iters=14', ok=False)  # fmt: skip
    assert setting + ', of command line' in text and words in text


def test_a_layer_of_settings_for_another_network_is_said_not_refused(dataset, trained, tmp_path):
    (tmp_path / 'layer.py').write_text("activation = 'gelu'\nvocab_multiple = 1\n")
    rest = [setting for setting in TINY if not setting.startswith('--n_')]
    common = [str(tmp_path / 'layer.py'), *rest, f'--dataset={dataset}', '--max_iters=1']
    text = inside('train.py', *common, f'--init_from={trained}', f'--out_dir={tmp_path}/out')
    assert f'--activation=gelu, of {tmp_path}/layer.py: {trained} has activation=relu2' in text
    assert 'vocab_multiple' not in text.replace('settings', '').split('which cannot')[0]
    shutil.copytree(trained, tmp_path / 'again')
    common += ['--init_from=resume', f'--out_dir={tmp_path}/again']
    text = inside('train.py', *common, ok=False)
    assert 'has activation=relu2' in text


def test_a_run_is_evaluated_on_other_data(dataset, trained, tmp_path):
    shutil.copytree(dataset, tmp_path / 'other')
    common = [*TINY, f'--out_dir={trained}', '--init_from=resume', f'--dataset={tmp_path}/other']
    assert 'val_loss' in inside('train.py', *common, '--eval_only=True', '--seed=5')


def test_nanogpts_characters_go_on_with_data_that_has_special_tokens(dataset, tmp_path):
    saved = tiny(vocab_size=len(Tokenizer(read_meta(dataset)['tokenizer']).chars), block_size=16,
                 vocab_multiple=1)  # fmt: skip
    spec = {**read_meta(dataset)['tokenizer'], 'special': []}
    checkpoint = {'model': saved.state_dict(), 'model_args': vars(saved.config), 'tokenizer': spec}
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    rest = [setting for setting in TINY if not setting.startswith('--n_')]
    inside('train.py', *rest, f'--dataset={dataset}', f'--init_from={tmp_path}/ckpt.pt',
           f'--out_dir={tmp_path}/out', '--max_iters=1')  # fmt: skip
    assert read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['tokenizer'] == spec


def test_a_run_records_the_network_that_it_has(dataset, trained, tmp_path):
    rest = [setting for setting in TINY if not setting.startswith('--n_')]
    inside('train.py', *rest, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--max_iters=1',
           f'--init_from={trained}', '--n_kv_head=0', '--dropout=0.5',
           '--block_size=8')  # fmt: skip
    saved = read_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    for name in 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'activation', 'dropout':
        assert saved['config'][name] == saved['model_args'][name]
    assert (saved['config']['n_layer'], saved['config']['dropout']) == (2, 0.5)


@pytest.mark.parametrize(
    'setting, was',
    [('--seed=7', 'seed=1337'), ('--weight_decay=0', 'weight_decay=0.1'), ('--beta2=0.9', '0.95'),
     ('--stage=finetune', 'stage=pretrain'), ('--block_size=8', 'block_size=16')],
)  # fmt: skip
def test_what_a_resumed_run_cannot_go_on_with_is_refused(dataset, trained, setting, was):
    common = [*TINY, f'--dataset={dataset}', f'--out_dir={trained}', '--init_from=resume']
    text = inside('train.py', *common, '--max_iters=14', setting, ok=False)
    assert setting in text and was in text


def test_what_a_resumed_run_goes_on_with_is_said(dataset, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    common = [*TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--init_from=resume']
    text = inside('train.py', *common, '--max_iters=12')
    assert 'this run has taken its 12 steps: raise --max_iters' in text
    text = inside('train.py', *common, '--max_iters=13', '--batch_size=8')
    assert 'resuming with batch_size=8 instead of 4' in text
    other = tmp_path / 'tiny'
    shutil.copytree(dataset, other)
    text = inside('train.py', *common, '--max_iters=14', f'--dataset={other}', ok=False)
    assert f'--dataset={other}: the run that is resumed has dataset={dataset}' in text


def test_only_a_configs_own_data_set_has_its_fallback(tmp_path):
    """A data set that was asked for is never replaced by another."""
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'prepare.py').write_text(
        "def prepare():\n    raise ConnectionError('no network')\n"
    )
    for folder, words in ('mine', 'it has no prepare.py'), ('other', 'no network'):
        text = inside('train.py', 'config/train_shakespeare_char.py', '--max_iters=1',
                      f'--dataset={tmp_path}/{folder}', f'--out_dir={tmp_path}/out', cwd=ROOT,
                      ok=False)  # fmt: skip
        assert words in text and 'INSTEAD' not in text and not (tmp_path / 'out').exists()


@pytest.mark.skipif(os.name != 'posix', reason='locks of Unix')
def test_two_runs_do_not_write_to_one_folder(dataset, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    held = runs.lock(tmp_path / 'out')
    for more in [], ['--init_from=resume']:
        text = inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out',
                      '--max_iters=13', *more, ok=False)  # fmt: skip
        assert 'another run is writing there now' in text
        assert [path.name for path in tmp_path.iterdir()] == ['out']
    held.close()
    inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--max_iters=1')


def test_a_package_that_is_missing_is_said_before_anything_is_done(
    dataset, trained, tmp_path, monkeypatch
):
    shutil.copytree(trained, tmp_path / 'out')
    monkeypatch.setitem(sys.modules, 'wandb', None)
    text = inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out',
                  '--wandb_log=True', ok=False)  # fmt: skip
    assert 'wandb' in text and 'pip install' in text
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_data_that_were_prepared_anew_do_not_go_on_with_an_old_run(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / 'data')
    common = [*TINY, f'--dataset={tmp_path}/data', f'--out_dir={tmp_path}/out']
    inside('train.py', *common, '--max_iters=1')
    ids = np.fromfile(tmp_path / 'data' / 'train.bin', np.uint16)
    tokenizer = Tokenizer(read_meta(dataset)['tokenizer'])
    sources.write_tokens(tmp_path / 'data', tokenizer, 'x', train=ids[::-1].copy(), val=ids[:500])
    text = inside('train.py', *common, '--max_iters=2', '--init_from=resume', ok=False)
    assert 'prepared anew since this run began' in text


def test_a_folder_of_tokens_without_a_meta_json_says_what_is_assumed(dataset, tmp_path):
    for split in 'train', 'val':
        shutil.copy(dataset / f'{split}.bin', tmp_path)
    text = inside('train.py', *TINY, f'--dataset={tmp_path}', '--dry_run=True')
    assert 'no meta.json, so uint16 tokens of gpt2 kind are assumed, 50304 of them' in text


def test_without_a_compiler_compile_is_one_clear_line(dataset, trained, tmp_path):
    nowhere = {'CXX': '/nowhere/g++', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)}
    for command in (
        ['train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--max_iters=1'],
        ['sample.py', f'--out_dir={trained}', '--device=cpu', '--num_samples=1'],
    ):
        text = run(*command, '--compile=True', env=nowhere, ok=False)
        assert '--compile=True does not work here' in text.splitlines()[-1]


def test_where_compile_is_a_default_a_run_goes_on_without_a_compiler(dataset, tmp_path):
    script = f'''if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import train, torch
        from data import runs
        config, _ = train.configure(vars(train), ['--dataset={dataset}'], train.other_settings)
        torch.cuda.is_available = lambda: True
        runs.check(config | {{'compile': None}}, train.Stage(train.read_rows), train.SCHEDULES)
        print(torch.compile(lambda x: x + 1)(torch.ones(2)).tolist())'''
    nowhere = {'CXX': '/nowhere/g++', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', script], env={**os.environ, **nowhere},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == '[2.0, 2.0]\n', done.stderr


def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(tmp_path):
    (tmp_path / 'torch.py').write_text('raise KeyboardInterrupt')
    for script in ['train.py'], ['sample.py'], ['-m', 'extras.chat'], ['-m', 'extras.evaluate']:
        done = subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, 'PYTHONPATH': str(tmp_path)})  # fmt: skip
        assert done.returncode == 130 and not done.stderr


def test_bad_input_is_a_message_and_a_bug_is_a_traceback():
    for wrong in (lambda: int('x')), (lambda: torch.ones(2).view(3, 'x')), (lambda: [].remove(1)):
        with pytest.raises((ValueError, TypeError)):
            program(wrong)
    with pytest.raises(SystemExit) as stop:
        program(lambda: mixture_of(''))
    assert 'a data set without a name' in stop.value.code


@pytest.mark.parametrize(
    'name, value, words',
    [
        ('optimizer', None, "'optimizer'"),
        ('optimizer', 'x', 'ckpt.pt: '),
        ('optimizer', [{}], 'ckpt.pt: '),
        ('optimizer', [], 'set --muon_lr'),
        ('iter_num', None, "'iter_num'"),
        ('iter_num', 'x', 'ckpt.pt: '),
        ('best_val_loss', [], 'ckpt.pt: '),
        ('seconds', {}, 'ckpt.pt: '),
        ('tokens', 'many', 'ckpt.pt: '),
    ],
)
def test_a_checkpoint_that_is_damaged_inside_is_one_clear_line(
    dataset, trained, tmp_path, name, value, words
):
    checkpoint = {**read_checkpoint(trained / 'ckpt.pt'), name: value}
    if value is None:
        del checkpoint[name]
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    text = inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}',
                  '--init_from=resume', '--max_iters=14', ok=False)  # fmt: skip
    assert '--init_from=resume: ' in text and words in text


def test_lines_that_are_none_are_left_out_of_a_log(tmp_path):
    good = {'step': 3, 'seconds': 1.5, 'loss': 2.0}
    odd = ['', '[]', 'null', '{}', '3', '{"step":"x"}', '{"step": 1}', '[' * 99999, '{"step": 1,']
    (tmp_path / 'log.jsonl').write_text('\n'.join([*odd, json.dumps(good), *odd]))
    assert read_log(tmp_path) == [good]
    draw([tmp_path], tmp_path / 'loss.png', 'odd')
    (tmp_path / 'log.jsonl').write_text(json.dumps({**good, 'loss': 'x', 'val_loss': None}))
    draw([tmp_path], tmp_path / 'loss.png', 'odd')


def test_a_run_needs_a_folder_of_its_own(dataset, tmp_path):
    for out_dir in '.', '..', tmp_path:
        text = inside('train.py', *TINY, f'--dataset={dataset}', f'--out_dir={out_dir}',
                      cwd=tmp_path, ok=False)  # fmt: skip
        assert 'a run needs a folder of its own' in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize('dtype, copies', [('float32', 4), ('bfloat16', 4 + 2)])
def test_the_card_counts_what_rl_compares_with_and_in_bf16_what_answers(dataset, dtype, copies):
    def weights(stage):
        text = inside('train.py', f'--dataset={dataset}', f'--stage={stage}', '--dry_run=True',
                      f'--dtype={dtype}')  # fmt: skip
        return float(re.search(r'GB: ([\d.]+) weights and gradients', text)[1])

    assert weights('sft') > 0.5  # weights and gradients, 8 bytes each parameter
    assert weights('rl') == pytest.approx((8 + copies) / 8 * weights('sft'), rel=0.02)


@pytest.mark.parametrize(
    'stage, advice',
    [
        ('pretrain', '--batch_size=4 and double --gradient_accumulation_steps=2'),
        ('rl', '--batch_size=4 or --rollout_rows=64'),
    ],
)
def test_running_out_of_memory_says_what_to_halve(stage, advice, dataset, tmp_path):
    text = inside(
        'train.py',
        *TINY,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/out',
        '--n_embd=4194304',
        '--n_head=2',
        f'--stage={stage}',
        ok=False,
    )
    assert f'halve {advice}' in text


@pytest.mark.parametrize(
    'config', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem
)
def test_every_config_is_accepted_and_dry_runs(config, tmp_path):
    how = ['--dry_run=True', '--device=cpu', '--dtype=float32']
    source = re.search(r"^init_from = '(out-.*)'", config.read_text(), re.M)
    if source:  # its model is that of another run, which must be there
        text = inside('train.py', how[0], config, *how, cwd=tmp_path, ok=False)
        assert f'{source[1]}: no run there' in text
        how.append('--init_from=scratch')
    text = inside('train.py', how[0], config, *how)
    assert 'parameters' in text and 'FLOPs per token' in text
    assert ('answers of' in text) == (config.stem.endswith('_rl'))


@pytest.mark.parametrize(
    'depth, width, steps, batch, rates, decay',
    [   # by hand, with 32,768 tokens: 12 * 12 * 768^2 + 32768 * 768 = 110,100,480 weights count
        (12, 768, 2520, 2**19, (3e-3, 0.02), 0.1),      # 12 * 110,100,480 / 2^19 = 2520
        # 11,534,336 weights, 0.10476 times as many: a batch of 2^(19 - 0.654 * 3.2548) = 2^16.87
        (4, 256, 1056, 2**17, (3e-3 * 3**0.5, 0.02), 0.1 / 4 / 0.104762),
        # 729,808,896 weights, 6.6286 times as many: a batch of 2^(19 + 0.383 * 2.7287) = 2^20.05
        (24, 1536, 8352, 2**20, (3e-3 * 0.5**0.5, 0.02), 0.1 * 2 / 6.62857),
    ],
)  # fmt: skip
def test_the_dial_by_hand(tmp_path, depth, width, steps, batch, rates, decay):
    tokenizer = {'kind': 'words', 'words': [f' {i:05d}' for i in range(32768 - 256 - 7)]}
    (tmp_path / 'meta.json').write_text(json.dumps(
        {'dtype': 'uint16', 'vocab_size': 32768, 'tokenizer': tokenizer}))  # fmt: skip
    before = dict(vars(train))
    try:
        found, _ = train.configure(vars(train), [
            f'--depth={depth}', f'--dataset={tmp_path}', '--dry_run=True',
            str(ROOT / 'config/depth.py'), '--warmdown=0.25'], train.other_settings)  # fmt: skip
    finally:
        vars(train).update(before)
    assert (found['n_layer'], found['n_embd'], found['n_head']) == (depth, width, width // 128)
    rows = found['batch_size'] * found['gradient_accumulation_steps']
    assert rows * found['block_size'] == batch and found['max_iters'] == steps
    assert (found['learning_rate'], found['muon_lr']) == pytest.approx(rates)
    assert found['weight_decay'] == pytest.approx(decay, rel=1e-5)
    assert found['warmdown'] == 0.25 and found['out_dir'] == f'out-d{depth}'


@pytest.mark.parametrize('depth, words', [('0', 'must be at least 1'), ('x', 'not of type int')])
def test_a_depth_that_is_none_is_refused(depth, words):
    layer = str(ROOT / 'config/depth.py')
    assert words in inside('train.py', f'--depth={depth}', '--dry_run=True', layer, ok=False)


def test_the_dial_needs_its_layer_behind_it_and_data_to_count(dataset, tmp_path, monkeypatch):
    layer, common = str(ROOT / 'config/depth.py'), [f'--dataset={dataset}', '--dry_run=True']
    for order in ['--depth=3'], [layer, '--depth=3']:
        assert 'must stand behind it' in inside('train.py', *common, *order, ok=False)
    monkeypatch.setattr(files, 'DATA', tmp_path / 'data')
    (tmp_path / 'data' / 'web').mkdir(parents=True)
    text = inside('train.py', '--dataset=web', '--depth=3', layer, ok=False)
    assert 'not prepared' in text and 'set --dry_run=True before this file' in text


def test_a_nanogpt_checkpoint_resumes_with_its_optimizer(dataset, tmp_path):
    """AdamW's state is kept by number: decayed parameters first, in the order that nanoGPT has."""
    layer = ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    matrices = ['wte', 'wpe'] + [f'h.{i}.{name}' for i in range(2) for name in layer]
    vectors = [f'h.{i}.{name}' for i in range(2) for name in ('ln_1', 'ln_2')] + ['ln_f']
    names = [f'transformer.{name}.weight' for name in matrices + vectors]
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, dropout=0.0)
    args['vocab_size'] = read_meta(dataset)['vocab_size']
    weights = tiny(**{**GPT2, **args}).state_dict()
    state = {
        i: {
            'step': torch.tensor(5.0),
            'exp_avg': weights[name] * 0,
            'exp_avg_sq': weights[name] ** 2,
        }
        for i, name in enumerate(names)
    }
    same = dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, amsgrad=False, maximize=False, foreach=None)
    groups = [
        {'params': list(range(10)), 'weight_decay': 0.1, **same},
        {'params': list(range(10, 15)), 'weight_decay': 0.0, **same},
    ]
    checkpoint = {
        'model': weights,
        'model_args': args,
        'iter_num': 5,
        'best_val_loss': torch.tensor(4.0),
        'optimizer': {'state': state, 'param_groups': groups},
        'config': {'dataset': str(dataset), 'learning_rate': 1e-3},
    }
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    text = inside(
        'train.py',
        *TINY,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}',
        '--init_from=resume',
        '--max_iters=8',
    )
    assert 'AdamW' in text and 'Muon' not in text and 'step 8: val_loss' in text
    after = read_checkpoint(tmp_path / 'ckpt.pt')
    assert after['iter_num'] == 8 and after['optimizer'][0]['state'][0]['step'].item() == 8


def test_bfloat16_trains_like_float32(dataset, tmp_path):
    losses = []
    for dtype in 'float32', 'bfloat16':
        folder = tmp_path / dtype
        inside(
            'train.py',
            *TINY,
            f'--dataset={dataset}',
            f'--out_dir={folder}',
            f'--dtype={dtype}',
            '--max_iters=20',
        )
        losses.append(read_checkpoint(folder / 'best.pt')['best_val_loss'])
    assert losses[0] < 3.3 and abs(losses[1] - losses[0]) < 0.05
