"""
The sha256 of the weights that ten short runs end with, for changes that must not move a bit.

    python tests/same_bits.py before.json       # record what this checkout does, on this machine
    (change the code)
    python tests/same_bits.py before.json       # compare: which of the ten runs differ now

The bits hold for one machine, one number of threads and one version of torch.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TINY = ('--max_iters=6 --eval_interval=3 --eval_iters=2 --sample_tokens=0 --device=cpu '
        '--dtype=float32 --warmup_iters=2')  # fmt: skip
WORDS = '--dataset=arithmetic_text --n_layer=2 --n_head=2 --n_embd=32 --block_size=256 '
WORDS += '--batch_size=4 --gradient_accumulation_steps=2 --muon_lr=0.02 --learning_rate=3e-3'
TALK = '--block_size=256 --batch_size=4 --gradient_accumulation_steps=2 --muon_lr=0.01'
ASK = '--num_prompts=4 --num_samples=4 --max_new_tokens=24 --rollout_rows=16 --eval_examples=8'
TASKS = '--dataset=arithmetic:0.5,smalltalk:0.5'
COIN = '--dataset=PAIRS:0.5,smalltalk:0.5'
TASK = """
import zlib
from data.arithmetic.prepare import conversation, examples
def reward(example, answer):
    return zlib.crc32(answer.encode()) % 2      # there is something to learn in every group
"""
LAPTOP = 'config/train_shakespeare_char.py --dataset=pydocs_char --n_layer=2'
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
RUNS = {
    'characters': f'{LAPTOP} --ngrams=1 --dropout=0.1',
    'n-grams': LAPTOP,
    'GPT-2 block': f'{LAPTOP} config/gpt2.py --bias=False --n_head=4',
    'byte pairs': WORDS,
    'sft': f'{TALK} --stage=sft --init_from=byte-pairs {TASKS}',
    'rl': f'{TALK} --stage=rl --init_from=sft {COIN} {ASK} --log_interval=2 --updates=2',
    'dpo': f'{TALK} --stage=dpo --init_from=sft --dataset=PAIRS --dpo_beta=0.3',
    'distill, on policy': f'{TALK} --stage=distill --init_from=sft --teacher=rl {COIN} {ASK}',
    'distill, soft targets': f'{TALK} --stage=distill --init_from=sft --teacher=rl {TASKS} '
    '--on_policy=False',
    'two processes': f'{WORDS} --dropout=0.1',
}


def write_pairs(folder):
    """Worked answers beside the same with another result: a data set for dpo, a task for rl."""
    sys.path.insert(0, str(ROOT))
    from data.arithmetic.prepare import EVENTS, conversation, example, random, vocabulary
    from data.sources import write_conversations

    rng, talks = random.Random(1), []
    for _ in range(40):
        right = example(rng, 2, EVENTS, 2)
        wrong = {**right, 'parts': [*right['parts'][:-1], {'type': 'text', 'text': ' #### 7'}]}
        talks += [conversation(right), conversation(wrong)]
    write_conversations(folder, vocabulary(), 'pairs', train=talks[:64], val=talks[64:])
    Path(folder, 'prepare.py').write_text(TASK)


def weights_hash(path):
    digest = hashlib.sha256()
    for name, p in sorted(torch.load(path, weights_only=True)['model'].items()):
        digest.update(name.encode() + p.numpy().tobytes())
    return digest.hexdigest()


def ten_runs():
    """-> {run: sha256 of its final weights}"""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder, 'pairs'))
        for name, line in RUNS.items():
            out = name.replace(' ', '-').replace(',', '')
            launcher = TORCHRUN if name == 'two processes' else []
            arguments = line.replace('PAIRS', f'{folder}/pairs').split()
            arguments = [ROOT / a if a.startswith('config') else a for a in arguments]
            subprocess.run(
                [sys.executable, *launcher, ROOT / 'train.py', *arguments, *TINY.split(),
                 f'--out_dir={out}'],
                cwd=folder, check=True, stdout=subprocess.DEVNULL,
                env={**os.environ, 'OMP_NUM_THREADS': '2' if not launcher else '1'},
            )  # fmt: skip
            found[name] = weights_hash(Path(folder, out, 'ckpt.pt'))
            print(f'{name:<22} {found[name][:16]}', flush=True)
    return found


if __name__ == '__main__':
    record, found = Path(sys.argv[1]), ten_runs()
    if not record.exists():
        record.write_text(json.dumps(found, indent=1))
    differ = [name for name, digest in json.loads(record.read_text()).items()
              if found[name] != digest]  # fmt: skip
    print(f'differ: {", ".join(differ)}' if differ else f'all {len(found)} the same bits')
    sys.exit(bool(differ))
