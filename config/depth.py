# One number sets a whole run: python train.py --depth=12 --dataset=fineweb config/depth.py
# What stands behind it wins. Its form is nanochat's (github.com/karpathy/nanochat,
# scripts/base_train.py, 2026), the rates at depth 12 are those of config/train_gpt2.py.
import math

from data import files as _files

_folder = next(iter(_files.mixture_of(dataset)))    # noqa: F821
if _files.missing(_folder) and not dry_run:         # noqa: F821
    raise ValueError(f'{_files.missing(_folder)}, or set --dry_run=True before this file')
_vocab_size = _files.read_meta(_folder)['vocab_size']
depth = depth or 12                                 # noqa: F821
out_dir = f'out-d{depth}'
n_layer = max(1, depth)
n_embd = 128 * -(-n_layer // 2)                     # 64 a layer, in heads of 128
n_head = n_embd // 128
_weights = 12 * n_layer * n_embd ** 2 + _vocab_size * n_embd    # of the matrices and the head
_longer = _weights / (12 * 12 * 768 ** 2 + _vocab_size * 768)   # than at depth 12
# The best batch grows with the tokens of a run, to the power of 0.383 (arXiv:2505.13738); below
# depth 12 it falls twice as fast as arXiv:2401.02954's does with compute (config/README.md).
_power = 0.383 if _longer > 1 else 2 * 0.327
_rows = max(1, round(2 ** round(19 + _power * math.log2(_longer)) / block_size))    # noqa: F821
batch_size = min(16, _rows)                         # raise it to what fits into memory
gradient_accumulation_steps = round(_rows / batch_size)
_batch = batch_size * gradient_accumulation_steps * block_size      # noqa: F821  tokens
max_iters = max(1, round(12 * _weights / _batch))   # 12 tokens for each of these weights
# Larger batches bear larger rates, longer runs smaller ones: along the dial they cancel (measured).
# AdamW's follows the root of the width. With this decay weights forget over the same share of any
# run (arXiv:2405.13698).
muon_lr = 0.02
learning_rate = 3e-3 * math.sqrt(768 / n_embd)
weight_decay = 0.1 * _batch / 2 ** 19 / _longer
min_lr = 0.0
lr_schedule = 'linear'
warmup_iters = min(100, max_iters // 20)
eval_interval = max(1, max_iters // 10)
