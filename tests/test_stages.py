"""Stages: what is in play and how much it counts, against masks and gradients by hand."""

import collections
import importlib
import itertools
import re
import shutil
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TORCHRUN, inside, run, tiny
from test_train import TWO, gradients_of, make_run

import train
from configurator import read_settings
from data.files import mixture_of
from data.models import load_model, read_checkpoint
from data.rows import Conversations, Mixture, pad, read_rows
from data.sources import write_conversations, write_tokens
from data.tasks import answer_questions, task_of, tasks_of
from data.tokenizer import Tokenizer
from extras import evaluate
from sample import Request
from stages import distill, dpo, rl

LETTERS = Tokenizer.of_text('abcdefghijklmnopqrstuvwxyz ABC?!0123456789+-*/="().#:,\n')
SHAPE = dict(block_size=64, vocab_size=LETTERS.vocab_size)
TASK = '''
def examples(split, seed=0):
    i = 0
    while True:
        i += 1
        yield {'question': 'abc'[i % 3], 'answer': 'b'}
def conversation(example):
    return [{'role': 'user', 'content': example['question']},
            {'role': 'assistant', 'content': example['answer']}]
def reward(example, answer):
    return float(answer.startswith('b'))
'''


def conversations(count, seed=0):
    rng = np.random.default_rng(seed)
    words = [''.join(rng.choice(list('abcdefg '), rng.integers(1, 30))) for _ in range(2 * count)]
    return [
        [{'role': 'user', 'content': q}, {'role': 'assistant', 'content': a}]
        for q, a in zip(words[::2], words[1::2])
    ]


@pytest.fixture(scope='module')
def talks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('talks') / 'talks'
    folder.mkdir()
    made = dict(train=conversations(60), val=conversations(9, 1))
    write_conversations(folder, LETTERS, 'made up', **made)
    (folder / 'prepare.py').write_text(TASK)
    return folder


@pytest.fixture
def settings(monkeypatch, talks):
    def lay(**values):
        for name, value in values.items():
            owners = [room for room in (train, rl, dpo, distill) if hasattr(room, name)]
            for room in owners:
                if not callable(getattr(room, name)):
                    monkeypatch.setattr(room, name, value)
            assert owners, name

    lay(batch_size=3, gradient_accumulation_steps=2, block_size=64, seed=1, dataset=str(talks))
    lay(stage='sft')
    lay(grad_clip=0.0, warmup_iters=0, decay_lr=False, eval_iters=0, num_prompts=3, num_samples=4)
    lay(max_new_tokens=6, rollout_rows=5, eval_examples=4, log_interval=1)
    for room in rl, dpo, distill:
        monkeypatch.setattr(room, 'load_reference', lambda run, source: tiny(1, **SHAPE))
    return lay


@pytest.fixture
def mixed_rewards(monkeypatch):
    """Half of all answers are right, whatever they say."""

    def task(parts):
        made = tasks_of(parts)
        made.reward = lambda example, answer: zlib.crc32(answer.encode()) % 2
        return made

    monkeypatch.setattr(rl, 'tasks_of', task)


def run_for(talks, **changes):
    model = changes.pop('model', None) or tiny(**SHAPE)
    run = make_run(talks, model, **changes)
    return run


def in_play(x, y):
    """-> the targets in play of some rows, in order"""
    return [y[i, j].item() for i, j in (y >= 0).nonzero().tolist()]


def test_packing_loses_and_repeats_no_token_in_play(talks):
    packed = Conversations(talks, 'train', 65)
    expected = sorted(
        i
        for c in conversations(60)
        for i, m in zip(*LETTERS.render(c), strict=True)
        if m
    )
    for epoch in -1, 0, 1:
        rows = packed.plan(epoch, seed=3)
        assert sorted(itertools.chain(*rows)) == list(range(60))
        targets = [t for t in packed.assemble(rows)[1].flatten().tolist() if t >= 0]
        assert sorted(targets) == expected
        assert len(rows) < 50  # several in a row
    assert packed.plan(0, 3) != packed.plan(1, 3) and packed.truncated == 0


def test_a_row_is_its_conversations_side_by_side_and_then_nothing(talks):
    packed = Conversations(talks, 'train', 65)
    (x,), (y,) = packed.assemble([[4, 2]])
    ids, mask = [], []
    for i in 4, 2:
        more, also = LETTERS.render(conversations(60)[i])
        ids, mask = ids + more, mask + also
    assert x[: len(ids)].tolist() == ids[:64]
    wanted = [t if m else -1 for t, m in zip(ids[1:], mask[1:])]
    assert y.tolist() == (wanted + [-1] * 64)[:64]


def test_a_conversation_that_never_fits_is_cut_and_counted(talks):
    packed = Conversations(talks, 'train', 20)
    sizes = [len(LETTERS.render(c)[0]) for c in conversations(60)]
    assert packed.truncated == sum(size > 20 for size in sizes) > 0
    assert all(row.shape == (19,) for row in packed.assemble(packed.plan(0, 0))[0])


def test_sft_batches_are_the_same_for_every_number_of_processes(talks, settings):
    def rows(world):
        parts = []
        for rank in range(world):
            batches, _ = read_rows(run_for(talks, rank=rank, world=world))
            parts += [torch.cat((x, y), 1) for step in range(9) for x, y, _ in batches(step)]
        return sorted(torch.cat(parts).tolist())

    assert rows(1) == rows(2) == rows(3)


def test_sft_validation_is_over_the_assistants_tokens(talks, settings):
    run = run_for(talks)
    total = count = 0
    for talk in conversations(9, 1):
        ids, mask = LETTERS.render(talk)
        x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
        y[torch.tensor([mask[1:]]) == 0] = -1
        count += int((y >= 0).sum())
    metrics, score = read_rows(run)[1]()
    seen = 0
    packed = Conversations(talks, 'val', 65)
    for row in packed.plan(-1, 0):
        x, y = map(torch.from_numpy, packed.assemble([row]))
        total += run.model(x, y)[1].item()
        seen += int((y >= 0).sum())
    assert seen == count and score == pytest.approx(total / count, rel=1e-5)


def sampled(request):
    """The ids that the model itself wrote, not its tool."""
    return [i for i, p in zip(request.ids, request.logprobs) if p is not None]


def rollouts(run, step=0):
    batches, evaluate = rl.start(run)
    return list(batches(step)), evaluate


def test_rl_puts_what_was_sampled_in_play_with_its_advantage(
    talks, settings, mixed_rewards, monkeypatch
):
    asked = []

    def spy(*args, **how):
        asked.append(answer_questions(*args, **how))
        return asked[-1]

    monkeypatch.setattr(rl, 'answer_questions', spy)
    run = run_for(talks)
    rows, _ = rollouts(run)
    requests, rewards = asked[0]
    groups = np.array(rewards).reshape(3, 4)
    advantage = (groups - groups.mean(1, keepdims=True)).flatten()
    alive = np.repeat(groups.std(1) > 0, 4)
    assert 0 < alive.sum()
    expected, times = collections.Counter(), collections.Counter()
    for request, a in itertools.compress(zip(requests, advantage, strict=True), alive):
        expected[tuple(request.prompt), tuple(sampled(request))] += a
        times[tuple(request.prompt), tuple(sampled(request))] += 1
    got = {}
    for x, y, w in rows[:-1]:
        for i in range(len(x)):
            played = y[i] >= 0
            prompt = tuple(x[i][: int(played.nonzero()[0]) + 1].tolist())
            assert (x[i][1:][played[:-1]] == y[i][:-1][played[:-1]]).all()
            assert len(set(w[i][played].tolist())) == 1
            got[prompt, tuple(y[i][played].tolist())] = w[i][played][0].item()
    once = sum(len(ids) for _, ids in times)
    share = once / sum(len(ids) * count for (_, ids), count in times.items())
    assert got.keys() == expected.keys()    # the end token too: ids hold it
    for text in got:
        assert got[text] == pytest.approx(expected[text] * share, abs=1e-5)
    request = Request([1], ids=[5, 6, 7], logprobs=[-1.0, None, -1.0])  # 6 is a tool's
    _, y, _ = pad([rl.example_of(request, 1.0)])
    assert y.tolist() == [[5, -1, 7]]
    request = Request([1, 2], ids=[7, LETTERS.special['<|end|>']], logprobs=[-1.0, -2.0])
    _, y, w = pad([rl.example_of(request, 0.5)])
    assert y.tolist() == [[-1, 7, LETTERS.special['<|end|>']]] and w[0, 1:].tolist() == [0.5, 0.5]
    assert run.notes['reward'] == [pytest.approx(groups.mean())]
    assert run.notes['dead_groups'] == [pytest.approx((groups.std(1) == 0).mean())]


@pytest.mark.parametrize('length', [1, 6])
def test_the_rl_gradient_is_reinforce_by_hand(
    talks, settings, mixed_rewards, monkeypatch, length
):
    """Of a token each, some answers are the same: those are read once, with all their weights."""
    settings(max_new_tokens=length, num_samples=16 if length == 1 else 4)
    run, asked = run_for(talks), []
    spy = lambda *a, **k: (asked.append(answer_questions(*a, **k)), asked[-1])[1]  # noqa: E731
    monkeypatch.setattr(rl, 'answer_questions', spy)
    batches, _ = rl.start(run)
    got, (_, count, _), _ = gradients_of(run, batches, monkeypatch)
    requests, rewards = asked[0]
    total, tokens, seen, size = 0.0, 0, set(), len(asked[0][0]) // 3
    for group in range(3):
        here = slice(size * group, size * (group + 1))
        mean = sum(rewards[here]) / size
        if len(set(rewards[here])) == 1:
            continue
        for request, reward in zip(requests[here], rewards[here]):
            text = torch.tensor([request.prompt + request.ids])
            logits = run.model(text[:, :-1])[0][0, len(request.prompt) - 1 :]
            logp = logits.log_softmax(-1).gather(1, text[0, len(request.prompt) :, None])
            mine = torch.tensor([p is not None for p in request.logprobs])
            total = total - (reward - mean) * logp[mine].sum()
            tokens += len(sampled(request))
            seen.add((tuple(request.prompt), tuple(request.ids), tuple(sampled(request))))
    (total / tokens).backward()
    assert count == sum(len(mine) for _, _, mine in seen) and (count < tokens) == (length == 1)
    for a, p in zip(got, run.model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize('stage', [rl.start, distill.start_on_policy])
def test_what_is_asked_may_be_a_mixture_of_tasks(talks, settings, monkeypatch, tmp_path, stage):
    """Both are asked, rewarded in their own ways and reported; the whole is weighed by questions.
    Two processes share the questions, and find the same."""
    rewards, shares = {'one': 1.0, 'other': 0.25}, {'one': 0.3, 'other': 0.7}
    for name, reward in rewards.items():
        shutil.copytree(talks, tmp_path / name)
        with open(tmp_path / name / 'prepare.py', 'a') as file:
            file.write(f'def reward(example, answer):\n    return {reward}\n')
    settings(eval_examples=30, num_prompts=8, teacher='x')
    run = run_for(talks, data={tmp_path / name: share for name, share in shares.items()})
    batches, evaluate = stage(run)
    list(batches(0))
    assert 0.25 < np.mean(run.notes['reward']) < 1
    metrics, score = evaluate()
    asked = [folder for folder, _ in itertools.islice(tasks_of(run.data).examples('val'), 30)]
    count = asked.count(str(tmp_path / 'one'))
    assert 0 < count < 15
    assert metrics['accuracy_one'] == 1 and metrics['accuracy_other'] == 0.25
    assert -score == metrics['accuracy'] == pytest.approx((count + 0.25 * (30 - count)) / 30)
    found = []
    monkeypatch.setattr(rl, 'all_sum', lambda values: found.append(values) or [0.0, 0.0])
    for run.rank in 0, 1:
        run.world = 2
        evaluate()
    torch.testing.assert_close(sum(found).sum() / 30, torch.tensor(metrics['accuracy']))


def test_the_sample_of_rl_keeps_its_lines(talks, settings, tmp_path, monkeypatch, capsys):
    shutil.copytree(talks, tmp_path / 'lines')
    with open(tmp_path / 'lines' / 'prepare.py', 'a') as file:
        file.write("asked = conversation\ndef conversation(example):\n"
                   "    return asked({**example, 'question': 'ab\\ncd'})\n")  # fmt: skip
    settings(eval_examples=1)
    run = run_for(talks, data={tmp_path / 'lines': 1.0})
    monkeypatch.setattr(run.tokenizer, 'transcript', lambda ids: 'e\nf')
    rl.start(run)[1]()
    assert '  > ab\n  > cd\n  | e\n  | f\n' in capsys.readouterr().out


def test_the_policy_that_is_scored_is_the_one_that_sampled(talks, settings, monkeypatch):
    """The importance ratio of an on-policy step is 1, forced tokens of a tool aside."""
    run = run_for(talks)
    task = task_of(talks)
    asked = list(itertools.islice(task.examples(''), 6))
    requests, _ = answer_questions(run.model, LETTERS, task, asked, range(6), 4, 2, 9)
    for request in requests:
        text = torch.tensor([request.prompt + request.ids])
        logits = run.model(text[:, :-1])[0][0, len(request.prompt) - 1 :].log_softmax(-1)
        for i, (token, logp) in enumerate(zip(request.ids, request.logprobs)):
            assert logp is None or logits[i, token].item() == pytest.approx(logp, abs=1e-4)


def test_a_group_of_equal_rewards_costs_no_forward_and_is_not_in_play(
    talks, settings, monkeypatch
):
    run = run_for(talks)
    monkeypatch.setattr(
        rl, 'answer_questions',
        lambda *a, **k: (lambda r: (r[0], [1.0] * len(r[0])))(answer_questions(*a, **k)),
    )
    rows, _ = rollouts(run)
    assert rows == [None]  # nothing but the end of an update
    before = [p.clone() for p in run.model.parameters()]
    _, count, _ = train.one_step(run, rl.start(run)[0], 0)
    assert count == 0 and all(map(torch.equal, before, run.model.parameters()))
    assert run.notes['dead_groups'][0] == 1


@pytest.mark.parametrize('bad', ['1 / 0', 'float("nan")', '"x"'])
def test_a_reward_that_cannot_be_had_is_named_with_its_example(talks, bad):
    task = SimpleNamespace(**vars(task_of(talks)))
    task.reward = lambda example, answer: eval(bad)
    with pytest.raises(ValueError, match='reward .*question'):
        answer_questions(tiny(**SHAPE), LETTERS, task, [
            {'question': 'a', 'answer': 'b'}], [0], 1)  # fmt: skip


@pytest.fixture(scope='module')
def taught(talks, tmp_path_factory):
    """A run that has read some conversations."""
    folder = tmp_path_factory.mktemp('runs') / 'taught'
    inside('train.py', *common(talks, folder, None, stage='sft', eval_interval=9, max_iters=9))
    return folder


def common(talks, folder, init_from, **changes):
    how = dict(
        stage='rl', dataset=talks, out_dir=folder, init_from=init_from or 'scratch', block_size=64,
        num_prompts=4, num_samples=4, max_new_tokens=5, eval_examples=4, batch_size=8,
        max_iters=6, eval_interval=3, learning_rate=3e-3, muon_lr=0.01, ngrams=2,
    )  # fmt: skip
    how.update(changes)
    others = {name for room in (rl, dpo, distill) for name in read_settings(vars(room))}
    module = train.find_stage(how)
    for room in (module, *getattr(module, 'USES', ())) if module else ():
        others -= read_settings(vars(room)).keys()
    return [*TINY, *(f'--{name}={value}' for name, value in how.items() if name not in others)]


def test_rl_learns_a_bandit_in_seconds(talks, taught, tmp_path):
    """Answers that begin with b are right: chance is 1 in 64 at first, for every question."""
    text = inside(
        'train.py',
        *common(talks, tmp_path / 'out', taught, max_iters=60, eval_interval=60, num_samples=16,
                warmup_iters=0, decay_lr=False),
    )  # fmt: skip
    assert float(re.findall(r'accuracy (\S+),', text)[-1]) == 1.0


@pytest.fixture
def odd_answers_are_right(talks):
    """So that there is something to learn from in nearly every group."""
    (talks / 'prepare.py').write_text(TASK.replace("answer.startswith('b')", 'len(answer) % 2'))
    yield
    (talks / 'prepare.py').write_text(TASK)


@pytest.mark.parametrize('stage', ['sft', 'rl', 'dpo', 'distill'])
def test_a_stage_that_is_killed_resumes_to_the_very_same_weights(
    talks, taught, tmp_path, stage, odd_answers_are_right
):
    how = dict(stage=stage, dropout=0.1 if stage == 'sft' else 0.0, max_iters=12, eval_interval=4)
    folder = pairs_folder(tmp_path / 'pairs') if stage == 'dpo' else talks
    how.update(log_interval=1, teacher=taught if stage == 'distill' else '', updates=2)
    inside('train.py', *common(folder, tmp_path / 'whole', taught, **how))
    command = common(folder, tmp_path / 'cut', taught, **how)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'train.py'), *command], stdout=subprocess.DEVNULL
    )
    log, deadline = tmp_path / 'cut' / 'log.jsonl', time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 7):
        assert process.poll() is None and time.monotonic() < deadline
    process.kill()
    assert process.wait() == -9
    inside('train.py', *common(folder, tmp_path / 'cut', 'resume', **how))
    a, b = (read_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('whole', 'cut'))
    assert a['iter_num'] == b['iter_num'] == 12 and a['tokens'] == b['tokens'] > 0
    assert all(torch.equal(p, b['model'][name]) for name, p in a['model'].items())
    assert not all(
        torch.equal(p, read_checkpoint(taught / 'best.pt')['model'][name])
        for name, p in a['model'].items()
    )
    assert [entry['stage'] for entry in a['lineage']] == ['sft', stage]


@pytest.mark.parametrize('stage', ['sft', 'rl', 'dpo'])
def test_two_processes_give_the_gradients_of_one_in_every_stage(
    talks, taught, tmp_path, stage, odd_answers_are_right
):
    folder = pairs_folder(tmp_path / 'pairs') if stage == 'dpo' else talks
    how = dict(stage=stage, max_iters=1, grad_clip=0, num_prompts=6, batch_size=4)
    found = {}
    for name, launcher in {'one': (), 'two': TORCHRUN}.items():
        script, out = tmp_path / f'{name}.py', tmp_path / f'{name}-run'
        script.write_text(TWO.format(root=str(ROOT), out=str(tmp_path / name)))
        run(
            script,
            *common(folder, out, taught, **how),
            launcher=launcher,
            env={'OMP_NUM_THREADS': '1'},
        )
        found[name] = torch.load(tmp_path / f'{name}0')
    assert any(g.abs().max() > 1e-4 for g in found['one'])
    for one, two in zip(found['one'], found['two'], strict=True):
        torch.testing.assert_close(two, one, atol=2e-7, rtol=1e-3)


@pytest.mark.parametrize('stage', ['rl', 'dpo'])
def test_a_stage_of_a_model_that_is_shared_out_is_that_of_a_whole_one(
    talks, taught, tmp_path, stage, odd_answers_are_right
):
    """Processes roll out with unequal numbers of forward passes; AdamW's averages are gradients."""
    folder = pairs_folder(tmp_path / 'pairs') if stage == 'dpo' else talks
    how = dict(stage=stage, max_iters=1, grad_clip=0, num_prompts=6, batch_size=4)
    found = []
    for name, launcher, more in ('one', (), []), ('two', TORCHRUN, ['--shard=True']):
        run('train.py', *common(folder, tmp_path / name, taught, **how), *more, launcher=launcher,
            env={'OMP_NUM_THREADS': '1'})  # fmt: skip
        found.append(read_checkpoint(tmp_path / name / 'ckpt.pt')['optimizer'][0]['state'])
    assert any(values['exp_avg'].abs().max() > 1e-5 for values in found[0].values())
    for i, values in found[0].items():
        torch.testing.assert_close(found[1][i]['exp_avg'], values['exp_avg'], atol=2e-8, rtol=1e-3)


def test_several_updates_of_a_rollout_are_those_of_ppos_clipped_objective(monkeypatch):
    monkeypatch.setattr(rl, 'clip_ratio', 0.2)
    old = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5, 0.3, 0.3]))
    new = torch.log(torch.tensor([0.7, 0.7, 0.3, 0.3, 0.3, 0.31])).requires_grad_()
    w = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -3.0])
    ratio = (new - old).exp()
    torch.minimum(ratio * w, ratio.clamp(0.8, 1.2) * w).sum().backward()
    got = rl.clipped(w, ratio.detach())
    torch.testing.assert_close(got, new.grad)
    assert (got == 0).tolist() == [True, False, False, True, False, False]


def test_a_step_of_several_updates_takes_them_all_and_sees_the_policy_move(
    talks, settings, mixed_rewards, monkeypatch
):
    settings(updates=3, learning_rate=1e-2)
    run, seen = run_for(talks), []
    clip = rl.clipped
    monkeypatch.setattr(rl, 'clipped', lambda w, ratio: (seen.append(ratio), clip(w, ratio))[1])
    steps = [0]
    monkeypatch.setattr(
        run.optimizers[0], 'step', lambda f=run.optimizers[0].step: (f(), steps.append(1))
    )
    train.one_step(run, rl.start(run)[0], 0)
    assert len(steps) == 4 and len(seen) >= 2
    assert all((ratio - 1).abs().max() > 1e-3 for ratio in seen)


def pairs_folder(folder):
    """Pairs: the same question, another answer."""
    talk = conversations(12, 5)
    both = [c for i in range(0, 12, 2) for c in (talk[i], [talk[i][0], talk[i + 1][1]])]
    folder.mkdir()
    write_conversations(folder, LETTERS, 'pairs', train=both[:8], val=both[8:])
    return folder


def test_the_dpo_gradient_is_that_of_its_loss(settings, tmp_path, monkeypatch):
    """The loss as in the paper, through autograd, over all of the pairs of a step."""
    folder = pairs_folder(tmp_path / 'pairs')
    settings(stage='dpo', batch_size=4, gradient_accumulation_steps=2, dpo_beta=0.3)
    run, start = run_for(folder), tiny(1, **SHAPE)
    batches, evaluate = dpo.start(run)
    got, (_, count, _), _ = gradients_of(run, batches, monkeypatch)

    def log_p(model, ids, mask):
        logits = model(torch.from_numpy(ids[None, :-1]))[0][0].log_softmax(-1)
        target = torch.from_numpy(ids[1:, None])
        return (logits.gather(1, target)[:, 0] * torch.from_numpy(mask[1:].astype(float))).sum()

    texts = Conversations(folder, 'train', 65)
    losses, tokens = [], 0
    for pair in range(4):  # a step is 8 rows: every pair
        both = [texts.conversation(2 * pair + i) for i in (0, 1)]
        grown = [log_p(run.model, *text) - log_p(start, *text).detach() for text in both]
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (grown[0] - grown[1])))
        tokens += sum(mask.sum() for _, mask in both)
    torch.stack(losses).mean().backward()
    assert count == tokens
    for a, p in zip(got, run.model.parameters()):
        torch.testing.assert_close(a, p.grad.float(), atol=1e-5, rtol=1e-3)
    metrics, score = evaluate()
    assert metrics['val_loss'] == score > 0 and 0 <= metrics['pairs_right'] <= 1


def test_own_answers_give_the_gradient_of_the_reverse_kl(talks, settings, monkeypatch):
    """In expectation: over every token that a tiny model could write after a prompt."""
    settings(stage='distill', on_policy=True, teacher='x')
    run, guide = run_for(talks), tiny(1, **SHAPE)
    prompt = LETTERS.encode('who are you')
    x = torch.tensor([prompt])
    student = run.model(x)[0][0, -1].log_softmax(-1)
    expected = (student.exp() * (student - guide(x)[0][0, -1].log_softmax(-1).detach())).sum()
    expected.backward()
    by_hand = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    total = [torch.zeros_like(p) for p in run.model.parameters()]
    batches, _ = distill.start_on_policy(run)
    for token, share in enumerate(student.detach().exp().tolist()):
        answer = Request(prompt, ids=[token], logprobs=[0.0])
        monkeypatch.setattr(rl, 'rollouts', lambda *_, answer=answer: ([answer], None))
        for x, y, w in batches(0):
            run.model(x, y, w)[1].backward()
        for sum_, p in zip(total, run.model.parameters()):
            sum_ += share * p.grad
        run.model.zero_grad()
    for a, b in zip(total, by_hand):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('top', [LETTERS.vocab_size, 5])
def test_soft_targets_give_the_gradient_of_the_kl(talks, settings, monkeypatch, top):
    settings(stage='distill', on_policy=False, teacher='x', teacher_top=top)
    run, guide = run_for(talks), tiny(1, **SHAPE)
    given = list(read_rows(run)[0](0))
    got, _, _ = gradients_of(run, distill.start_on_data(run)[0], monkeypatch)
    total, count = 0.0, 0
    for x, y, _ in given:
        p = guide(x)[0].softmax(-1).detach()
        least = p.topk(top).values[..., -1:]
        p = p.where(p >= least, 0)
        p = p / p.sum(-1, keepdim=True)
        kl = (p * (p.clamp(min=1e-30).log() - run.model(x)[0].log_softmax(-1))).sum(-1)
        total, count = total + kl[y >= 0].sum(), count + (y >= 0).sum()
    (total / count).backward()
    for a, p in zip(got, run.model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-3)


def test_a_mixture_gives_each_its_share_and_each_row_once(talks, dataset, tmp_path):
    other = tmp_path / 'numbers'
    other.mkdir()
    write_tokens(other, LETTERS, 'numbers', train=[5] * 1200, val=[6] * 300)
    mixed = Mixture({talks: 3, other: 1}, 'train', 65, packed=True)
    x, y = mixed.rows(np.arange(200), 1)
    plain = (x == 5).all(1)
    assert plain.sum() == 50 and (y[plain] == 5).all()
    own = Mixture({talks: 1}, 'train', 65, packed=True).rows(np.arange(150), 1)
    assert sorted(x[~plain].tolist()) == sorted(own[0].tolist())
    assert sorted(mixed.rows(np.arange(77), 1)[0].tolist()) == sorted(x[:77].tolist())


def test_a_mixture_is_validated_by_its_shares(talks, settings, tmp_path):
    other = tmp_path / 'numbers'
    other.mkdir()
    write_tokens(other, LETTERS, 'numbers', train=[5] * 1200, val=[6] * 300)

    def losses(parts):
        run = run_for(talks)
        run.data = parts
        return read_rows(run)[1]()[0]

    both = losses({talks: 3.0, other: 1.0})
    alone = [losses({part: 1.0})['val_loss'] for part in (talks, other)]
    assert both['val_loss'] == pytest.approx(0.75 * alone[0] + 0.25 * alone[1])
    assert both['val_loss_numbers'] == pytest.approx(alone[1]) != pytest.approx(alone[0])


@pytest.mark.parametrize(
    'name, words',
    [
        ('a:0.8:', 'a mixture is written'),
        ('a:x', 'a mixture is written'),
        ('a:0,b:1', 'a number above 0'),
        ('a:-1,b:1', 'a number above 0'),
        ('a:0.5,b:nan', 'a number above 0'),
        ('', 'without a name'),
        ('a:0.5,a:0.5', 'a is there twice'),
        ('a:0.5,', 'without a name'),
    ],
)
def test_a_mixture_that_is_none_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        mixture_of(name)


def test_a_task_is_one_data_set(tmp_path):
    run = run_for(pairs_folder(tmp_path / 'pairs'))
    run.config['block_size'] = 64
    assert len(dpo.read_pairs(run, 'train').spans) == 8
    run.data = {**run.data, tmp_path / 'b': 1.0}
    with pytest.raises(ValueError, match='takes one data set'):
        dpo.read_pairs(run, 'train')


def test_conversations_that_are_no_pairs_are_refused_by_dpo(tmp_path):
    write_conversations(tmp_path, LETTERS, 'no pairs', train=conversations(8, 5))
    run = run_for(tmp_path)
    run.config['block_size'] = 64
    with pytest.raises(ValueError, match='pair 0 in train do not begin alike'):
        dpo.read_pairs(run, 'train')


def test_data_without_masks_are_in_play_and_it_is_said(talks, dataset, tmp_path):
    arguments = common(talks, tmp_path / 'out', None, stage='sft', dataset=dataset, ngrams=1)
    assert 'it has no masks, so all of it is in play' in inside('train.py', *arguments)


def test_a_mask_with_nothing_in_play_is_refused(tmp_path):
    folder = pairs_folder(tmp_path / 'pairs')
    mask = folder / 'train.mask.bin'
    mask.write_bytes(bytes(mask.stat().st_size))
    with pytest.raises(ValueError, match='nothing is in play by its mask'):
        Conversations(folder, 'train', 65)


def test_data_sets_of_other_tokenizers_do_not_mix(talks, dataset, tmp_path):
    text = inside('train.py', *TINY, f'--dataset={talks}:1,{dataset}:1', '--max_iters=1',
                  f'--out_dir={tmp_path}/out', ok=False)  # fmt: skip
    assert 'do not have the same tokenizer' in text


def test_explain_prints_what_is_in_play_with_its_weight_and_loss(talks, taught, tmp_path):
    how = dict(stage='sft', explain=True, batch_size=2)
    text = inside('train.py', *common(talks, tmp_path / 'out', taught, **how))
    assert not (tmp_path / 'out').exists()  # it only looks
    model, _, _ = load_model(taught)
    x, y = Mixture({talks: 1}, 'train', 65, packed=True).rows(np.arange(2), 1337)
    logits = model.eval()(torch.from_numpy(x))[0].log_softmax(-1)
    lines = [line for line in text.splitlines() if line.startswith(("'", '"'))]
    assert len(lines) == x.size
    for line, token, target, logp in zip(lines, x.flatten(), y.flatten(), logits.flatten(0, 1)):
        shown = repr(LETTERS.decode([token]))
        assert line.startswith(shown)
        rest = line[len(shown) :].strip()
        if target < 0:
            assert rest == ''
        else:
            *word, weight, loss = rest.rsplit(None, 2)
            assert word == [repr(LETTERS.decode([target]))] and float(weight) == 1
            assert float(loss) == pytest.approx(-logp[target].item(), abs=2e-3)


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(init_from='scratch'), 'needs a run that has learned'),
        (dict(dropout=0.1), 'must be 0 in stage rl'),
        (dict(stage='distill'), 'needs a run that has learned'),
        (dict(stage='distill', teacher='{out}'), 'is the run that --teacher reads'),
        (
            dict(stage='distill', on_policy=False, teacher='{taught}', teacher_top=999),
            'there are 62 tokens',
        ),
        (dict(dataset='{dataset}'), 'do not have the same tokenizer'),
        (dict(init_from='resume'), 'nothing is saved there yet: drop'),
        (dict(num_samples=1), 'ask for 2 or more'),

    ],
)
def test_what_a_stage_cannot_do_is_said(talks, dataset, taught, tmp_path, changes, words):
    places = dict(out=tmp_path / 'out', taught=taught, dataset=dataset)
    changes = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
    source = changes.pop('init_from', taught)
    text = inside('train.py', *common(talks, tmp_path / 'out', source, **changes), ok=False)
    assert re.search(words, text)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'stage, setting', [('rl', 'temperature=0.7'), ('sft', 'num_prompts=3'), ('dpo', 'teacher=x')]
)
def test_a_setting_of_another_room_is_refused(talks, taught, tmp_path, stage, setting):
    text = inside(
        'train.py', *common(talks, tmp_path / 'out', taught, stage=stage), f'--{setting}', ok=False
    )
    assert f'{setting.split("=")[0]}: no such setting' in text


def test_a_run_does_not_go_on_with_another_reference(talks, taught, tmp_path):
    how = dict(max_iters=2, eval_interval=1)
    mine = tmp_path / 'taught'
    shutil.copytree(taught, mine)
    inside('train.py', *common(talks, tmp_path / 'out', mine, **how))
    other = read_checkpoint(mine / 'best.pt')
    other['model']['lm_head.weight'][0, 0] += 1e-3
    torch.save(other, mine / 'best.pt')
    how['max_iters'] = 3
    text = inside('train.py', *common(talks, tmp_path / 'out', 'resume', **how), ok=False)
    assert 'is not the model that this run began with' in text


def test_what_a_model_answers_becomes_a_data_set(
    talks, taught, tmp_path, odd_answers_are_right
):
    """Right answers alone, with the masks of what it wrote; pairs of a right and a wrong one."""
    common = [f'--out_dir={taught}', f'--task={talks}', '--num_examples=20', '--num_samples=4']
    common += ['--max_new_tokens=6', '--device=cpu', '--dtype=float32']
    inside('extras/write_answers.py', *common, f'--folder={tmp_path}/right')
    inside('extras/write_answers.py', *common, f'--folder={tmp_path}/pairs', '--pairs=True')
    right, pairs = (Conversations(tmp_path / name, 'train', 65) for name in ('right', 'pairs'))

    def answers(texts):
        return [
            LETTERS.transcript(ids[np.argmax(mask) :].tolist())
            for ids, mask in map(texts.conversation, range(len(texts.spans)))
        ]

    assert {len(answer) % 2 for answer in answers(right)} == {1}
    assert [len(answer) % 2 for answer in answers(pairs)] == [1, 0] * (len(pairs.spans) // 2)
    inside('train.py', *common_dpo(tmp_path / 'pairs', tmp_path / 'out', taught))


def common_dpo(folder, out, taught):
    return common(folder, out, taught, stage='dpo', max_iters=2)


def test_a_task_is_graded_along_the_chain_of_runs(talks, taught, tmp_path):
    inside('train.py', *common(talks, tmp_path / 'out', taught, max_iters=30, eval_interval=30,
                               num_samples=16, warmup_iters=0, decay_lr=False))  # fmt: skip
    how = [f'--out_dir={tmp_path}/out', f'--task={talks}', '--num_examples=30', '--device=cpu']
    text = inside('extras/evaluate.py', *how, '--max_new_tokens=5', '--dtype=float32')
    assert re.search(rf'^{taught} +\d+\.\d%', text, re.M)
    assert re.search(rf'^{tmp_path}/out +100.0%', text, re.M)
    drawn = tmp_path / 'out' / 'stages.png'
    assert drawn.stat().st_size > 5000
    drawn.unlink()
    inside('extras/evaluate.py', *how, '--max_new_tokens=5', '--votes=2')
    inside('extras/evaluate.py', *how, '--max_new_tokens=5', '--tools=False')
    assert not drawn.exists()
    text = inside(
        'extras/evaluate.py', *how[1:], f'--out_dir={tmp_path}/out/ckpt.pt', '--max_new_tokens=5'
    )
    assert re.search(rf'^{tmp_path}/out/ckpt.pt +100.0%', text, re.M) and drawn.exists()


def test_a_run_that_knows_no_chat_tokens_is_not_graded(talks, taught, tmp_path, monkeypatch):
    real = evaluate.open_model

    def open_model(source, *how):
        model, tokenizer, checkpoint = real(source, *how)
        if source == str(taught):
            model.config.vocab_size = tokenizer.special['<|end|>']
        return model, tokenizer, checkpoint

    inside('train.py', *common(talks, tmp_path / 'out', taught, max_iters=2, eval_interval=2))
    monkeypatch.setattr(evaluate, 'open_model', open_model)
    how = [f'--task={talks}', '--num_examples=4', '--device=cpu', '--max_new_tokens=3']
    text = inside('extras/evaluate.py', f'--out_dir={tmp_path}/out', *how)
    assert f'{tmp_path}/out ' in text and not re.search(rf'^{taught} ', text, re.M)
    text = inside('extras/evaluate.py', f'--out_dir={taught}', *how, ok=False)
    assert 'this model knows no chat tokens' in text


def test_answers_are_not_written_over_another_data_set(talks, taught):
    before = (talks / 'train.bin').read_bytes()
    text = inside('extras/write_answers.py', f'--out_dir={taught}', f'--task={talks}',
                  f'--folder={talks}', '--device=cpu', ok=False)  # fmt: skip
    assert 'holds another data set' in text and (talks / 'train.bin').read_bytes() == before


def test_answers_need_a_folder_to_be_written_to(taught, tmp_path):
    text = inside('extras/write_answers.py', f'--out_dir={taught}', cwd=tmp_path, ok=False)
    assert '--folder= says where' in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'old, new',
    [
        ('--chat=True', 'extras.chat'),
        ('--votes=8', 'extras.chat'),
        ('--serve=True', 'extras.serve'),
        ('--task=arithmetic', 'extras.evaluate'),
        ('--write=there', 'extras.write_answers'),
    ],
)
def test_who_types_an_old_setting_is_told_the_new_command(old, new):
    text = inside('sample.py', old, ok=False)
    assert f'no such setting; use python -m {new}' in text
    assert re.search(rf'python -m {new}', vars(importlib.import_module(new))['__doc__'])


def test_the_loop_does_not_contain_the_name_of_a_stage():
    import inspect

    code = ''.join(map(
        inspect.getsource,
        (train.loop, train.one_step, train.update, train.apply_gradient, train.Run, train.assess,
         train.log_step),
    ))
    assert not re.search(r'\b(rl|sft|dpo|pretrain|finetune|distill)\b', code)
