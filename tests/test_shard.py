"""FSDP2 over gloo: sharded is whole, in updates, checkpoints of both kinds, rollouts."""

import pickle
import shutil

import pytest
import torch
from conftest import ROOT, TINY, TORCHRUN, inside, run

from data.models import load_model

COMMON = [*TINY, '--muon_lr=0.02', '--decay_lr=False', '--eval_interval=3', '--zero_init=False']
FOUR = [*TORCHRUN[:-1], '--nproc_per_node=4']


def state_of(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


def start(launcher, *arguments, ok=True):
    return run('train.py', *COMMON, *arguments, launcher=launcher, env={'OMP_NUM_THREADS': '1'},
               ok=ok)  # fmt: skip


@pytest.mark.parametrize(
    'changes',
    [('--tied=True', '--ngrams=2'), ('--n_expert=3', '--n_kv_head=1')],
    ids=str,
)
def test_two_processes_that_share_a_model_are_one_that_has_it(dataset, tmp_path, changes):
    """After one step AdamW's and Muon's averages are gradients; the weights, too, are the same."""
    found = []
    for name, launcher, more in ('one', (), ()), ('two', TORCHRUN, ('--shard=True',)):
        start(launcher, *changes, *more, f'--dataset={dataset}', f'--out_dir={tmp_path}/{name}',
              '--max_iters=1', '--grad_clip=0.1')  # fmt: skip
        found.append(state_of(tmp_path / name))
    for name, weight in found[0]['model'].items():
        torch.testing.assert_close(found[1]['model'][name], weight, atol=1e-5, rtol=1e-4)
    for one, two in zip(found[0]['optimizer'], found[1]['optimizer'], strict=True):
        assert one['state'].keys() == two['state'].keys()
        for i, values in one['state'].items():
            for name, value in values.items():
                torch.testing.assert_close(two['state'][i][name], value, atol=1e-7, rtol=1e-4)


@pytest.fixture(scope='module')
def half(dataset, tmp_path_factory):
    """-> a folder with runs of three steps of two processes, with checkpoints of each kind."""
    folder = tmp_path_factory.mktemp('shards')
    for kind in 'whole', 'sharded':
        start(TORCHRUN, '--shard=True', f'--checkpoint={kind}', f'--dataset={dataset}',
              f'--out_dir={folder}/{kind}', '--max_iters=3')  # fmt: skip
    start((), f'--dataset={dataset}', f'--out_dir={folder}/six', '--max_iters=6')
    return folder


@pytest.mark.parametrize(
    'kind, launcher, more',
    [
        ('whole', TORCHRUN, ('--shard=True',)),
        ('whole', (), ()),
        ('sharded', TORCHRUN, ('--shard=True', '--checkpoint=sharded')),
        ('sharded', FOUR, ('--shard=True',)),
        ('sharded', (), ('--checkpoint=sharded',)),
    ],
    ids=str,
)
def test_a_shared_run_goes_on_with_any_number_of_processes(
    half, dataset, tmp_path, kind, launcher, more
):
    shutil.copytree(half / kind, tmp_path / 'out')
    start(launcher, *more, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--max_iters=6',
          '--init_from=resume')  # fmt: skip
    model, _, checkpoint = load_model(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter_num'] == 6
    whole, _, _ = load_model(half / 'six' / 'ckpt.pt')
    for ours, truth in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, truth, atol=2e-4, rtol=1e-3)
    folders = [path for path in (tmp_path / 'out').iterdir() if path.is_dir()]
    assert len(folders) == 2 * ('--checkpoint=sharded' in more)     # ckpt's and best's, no others


def test_a_shared_run_is_bitwise_the_same_when_it_is_resumed(half, dataset, tmp_path):
    """By as many processes, from either kind of checkpoint."""
    start(TORCHRUN, '--shard=True', f'--dataset={dataset}', f'--out_dir={tmp_path}/six',
          '--max_iters=6')  # fmt: skip
    truth = state_of(tmp_path / 'six')
    for kind in 'whole', 'sharded':
        shutil.copytree(half / kind, tmp_path / kind)
        start(TORCHRUN, '--shard=True', f'--dataset={dataset}', f'--out_dir={tmp_path}/{kind}',
              '--max_iters=6', '--init_from=resume')  # fmt: skip
        ours = state_of(tmp_path / kind)
        assert all(torch.equal(ours['model'][name], w) for name, w in truth['model'].items())


class Bomb:
    def __reduce__(self):
        return print, ('exploded',)


@pytest.mark.parametrize('wrong', ['missing', 'cut', 'index', 'empty index', 'code', 'object'])
def test_a_part_that_is_missing_damaged_or_carries_code_is_one_line(half, tmp_path, capsys, wrong):
    shutil.copytree(half / 'sharded', tmp_path / 'out')
    parts = next((tmp_path / 'out').glob('best-*'))
    part = next(parts.glob('__1*'))
    if wrong == 'missing':
        part.unlink()
    elif wrong == 'cut':
        part.write_bytes(part.read_bytes()[:1000])
    elif wrong == 'index':
        (parts / '.metadata').unlink()
    elif wrong == 'empty index':
        (parts / '.metadata').write_bytes(b'')
    elif wrong == 'code':
        (parts / '.metadata').write_bytes(pickle.dumps(Bomb()))
    else:   # of a kind that torch would unpickle
        import torch.distributed.checkpoint as dcp

        weights = load_model(tmp_path / 'out')[0].state_dict()
        dcp.save({'model': {**weights, 'keep': Bomb()}}, checkpoint_id=parts, no_dist=True)
    text = inside('sample.py', f'--out_dir={tmp_path}/out', '--num_samples=1', ok=False)
    assert f'{parts}: a part is missing or damaged' in text
    assert 'exploded' not in text + capsys.readouterr().out and 'Traceback' not in text


def test_what_else_is_in_the_folder_of_a_run_is_left_alone(dataset, tmp_path):
    (tmp_path / 'out' / 'best-of-week').mkdir(parents=True)
    for name in 'ckpt-3.pt', 'best-of-week/notes.txt', 'ckpt-old':
        (tmp_path / 'out' / name).write_text('mine')
    for kind, steps in ('sharded', 3), ('sharded', 6), ('whole', 9):
        inside('train.py', *COMMON, f'--dataset={dataset}', f'--out_dir={tmp_path}/out',
               f'--checkpoint={kind}', f'--max_iters={steps}', '--init_from=resume')  # fmt: skip
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'best-of-week', 'best.pt', 'ckpt-3.pt', 'ckpt-old', 'ckpt.pt', 'lock', 'log.jsonl',
        'loss.png']  # fmt: skip


@pytest.mark.parametrize('more', [[], ['--n_expert=3']], ids=str)
def test_saving_in_parts_moves_no_bit_of_a_run(dataset, trained, tmp_path, more):
    """Neither of one that saves before its first update, nor behind."""
    common = [*COMMON, '--zero_init=True']
    source = ['--stage=finetune', f'--init_from={trained}', '--eval_interval=1'] if not more else []
    for kind in 'whole', 'sharded':
        inside('train.py', *common, *more, *source, f'--dataset={dataset}', '--max_iters=3',
               f'--checkpoint={kind}', f'--out_dir={tmp_path}/{kind}')  # fmt: skip
    whole, parts = (load_model(tmp_path / kind / 'ckpt.pt')[0] for kind in ('whole', 'sharded'))
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))
    for kind in 'whole', 'sharded':     # and the optimizers go on from the same
        inside('train.py', *common, *more, *source[:1], f'--dataset={dataset}', '--max_iters=5',
               f'--out_dir={tmp_path}/{kind}', '--init_from=resume')  # fmt: skip
    whole, parts = (load_model(tmp_path / kind / 'ckpt.pt')[0] for kind in ('whole', 'sharded'))
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))


def test_a_resumed_run_in_parts_needs_its_optimizers(half, dataset, tmp_path):
    shutil.copytree(half / 'sharded', tmp_path / 'out')
    text = inside('train.py', *COMMON, '--muon_lr=0', f'--dataset={dataset}', '--max_iters=6',
                  f'--out_dir={tmp_path}/out', '--init_from=resume', ok=False)  # fmt: skip
    assert 'set --muon_lr to a rate, as that run had it' in text


def test_parts_of_far_fewer_layers_than_a_checkpoint_says_are_refused(half, tmp_path):
    shutil.copytree(half / 'sharded', tmp_path / 'out')
    path = tmp_path / 'out' / 'best.pt'
    content = torch.load(path, weights_only=True)
    torch.save({**content, 'model_args': {**content['model_args'], 'n_layer': 9999}}, path)
    assert '9999 layers' in inside('sample.py', f'--out_dir={tmp_path}/out', ok=False)


SPY = '''
import sys
sys.path.insert(0, {root!r})
import torch, train
from model import Block
forward = Block.forward
def spy(self, x, context):
    assert x.dtype == torch.float32 and self.attn.c_attn.weight.dtype == {dtype}, x.dtype
    return forward(self, x, context)
Block.forward = spy
train.main()
'''


@pytest.mark.parametrize('shard', [False, True])
def test_in_bfloat16_the_residual_stream_is_fp32_and_gathered_weights_are_not(
    dataset, tmp_path, shard
):
    dtype = 'torch.bfloat16' if shard else 'torch.float32'
    (tmp_path / 'spy.py').write_text(SPY.format(root=str(ROOT), dtype=dtype))
    run(tmp_path / 'spy.py', *COMMON, f'--shard={shard}', '--dtype=bfloat16', '--max_iters=1',
        f'--dataset={dataset}', f'--out_dir={tmp_path}/out', '--sample_tokens=0', '--eval_iters=1',
        launcher=TORCHRUN, env={'OMP_NUM_THREADS': '1'})  # fmt: skip


def test_sharing_among_one_process_is_refused(dataset, tmp_path):
    common = [*TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}/out']
    assert 'start several, with torchrun' in inside('train.py', *common, '--shard=True', ok=False)
    text = inside('train.py', *common, '--checkpoint=parts', ok=False)
    assert 'choose whole or sharded' in text
