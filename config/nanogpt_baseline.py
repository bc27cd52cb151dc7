# nanoGPT's own architecture, optimizer, schedule and CPU recipe for tiny Shakespeare: what to beat.
from model import GPT2 as _gpt2

out_dir = 'out-nanogpt-baseline'
dataset = 'shakespeare_char'
globals().update(_gpt2)
bias = False            # as nanoGPT trains it
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
eval_iters = 0          # over the whole validation set, once, at the end
log_interval = 100
dtype = 'float32'       # as nanoGPT on a CPU
