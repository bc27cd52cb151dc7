"""config/speedrun.sh as a dry run: what each stage takes, and all of them."""

import os
import re
import subprocess

from conftest import ROOT


def dry_run(**environment):
    settings = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    result = subprocess.run(['bash', 'config/speedrun.sh'], cwd=ROOT, env=settings, text=True,
                            capture_output=True)  # fmt: skip
    return result.stdout, result.stderr, result.returncode


def test_a_dry_run_says_what_each_stage_takes_and_their_sum():
    gpus = '--gpus=8xH100 --dollars_per_gpu_hour=1000'
    text, errors, code = dry_run(DRY=gpus, DEPTH=24, CHAT='gsm8k', GPUS=8)
    assert code == 0, errors
    for stage in 'pretrain on fineweb', 'sft on smoltalk', 'sft on gsm8k', 'rl on gsm8k':
        assert stage in text
    *stages, total = re.findall(r'([\d.]+) hours', text)
    assert len(stages) == 4 and float(stages[0]) > 1
    assert abs(sum(map(float, stages)) - float(total)) < 0.01
    *stages, total = [int(n.replace(',', '')) for n in re.findall(r'(\d[\d,]*) dollars', text)]
    assert sum(stages) == total > 8000


def test_a_stage_that_fails_ends_it():
    text, errors, code = dry_run(DRY='--gpus=8xABC')
    assert code != 0 and '--gpus=8xABC' in errors and 'all stages' not in text
