# One number sets a whole run, the number of layers:
#   python train.py --depth=12 config/depth.py
#   torchrun --standalone --nproc_per_node=8 train.py --depth=24 --dataset=fineweb config/depth.py
# It reads depth, dataset and block_size as they stand before it; what is set after it wins.
# The formulas are nanochat's (github.com/karpathy/nanochat, scripts/base_train.py, 2026); the rates
# at depth 12 are those of config/train_gpt2.py.
import math

from data.files import missing as _missing
from data.files import mixture_of as _mixture_of
from data.files import read_meta as _read_meta

_folder = next(iter(_mixture_of(dataset)))      # noqa: F821
if _missing(_folder) and not dry_run:           # noqa: F821
    raise ValueError(f'{_missing(_folder)}, or set --dry_run=True before this file')
_vocab_size = _read_meta(_folder)['vocab_size']


def _width(depth):
    """64 a layer, in heads of 128"""
    return 128 * -(-depth // 2)


def _tokens(depth):
    """12 for each weight of the layers' matrices and the head (config/speedrun.py: 8)"""
    return 12 * (12 * depth * _width(depth) ** 2 + _vocab_size * _width(depth))


depth = depth or 12                             # noqa: F821
out_dir = f'out-d{depth}'
n_layer = max(1, depth)                         # (others are refused when all is read)
n_embd = _width(n_layer)
n_head = n_embd // 128
_longer = _tokens(n_layer) / _tokens(12)
# The best batch grows with the tokens of a run, to the power of 0.383 (arXiv:2505.13738).
_rows = max(1, round(2 ** round(19 + 0.383 * math.log2(_longer)) / block_size))     # noqa: F821
batch_size = min(16, _rows)                     # of a microbatch: raise it to what fits into memory
gradient_accumulation_steps = round(_rows / batch_size)
_batch = batch_size * gradient_accumulation_steps * block_size      # noqa: F821  tokens
max_iters = max(1, round(_tokens(n_layer) / _batch))
# Rates follow the root of the batch (arXiv:2205.10287), AdamW's also that of the width; with this
# decay weights forget over the same share of any run (arXiv:2405.13698).
_noise = math.sqrt(_batch / 2 ** 19)
muon_lr = 0.02 * _noise
learning_rate = 3e-3 * _noise * math.sqrt(768 / n_embd)
weight_decay = 0.1 * _noise / _longer
min_lr = 0.0
lr_schedule = 'linear'
warmdown = 0.5
warmup_iters = min(100, max_iters // 20)
eval_interval = max(1, max_iters // 10)
eval_iters = 100
log_interval = max(1, min(10, max_iters // 20))
