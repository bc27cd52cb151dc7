# A student of a quarter of the size learns its teacher's probabilities over the answers that the
# teacher wrote:
#   python train.py config/arithmetic_base.py --n_head=1 --n_embd=64 --ngram_rows=4096 \
#       --out_dir=out-arithmetic-small
#   python -m extras.write_answers --out_dir=out-arithmetic-rl --folder=data/arithmetic_answers \
#       --num_samples=1 --num_examples=8000 --rows=128 --max_new_tokens=120
#   python train.py config/arithmetic_distill.py
stage = 'distill'
on_policy = False
teacher = 'out-arithmetic-rl'
init_from = 'out-arithmetic-small'      # as the base, 64 wide
out_dir = 'out-arithmetic-distill'
dataset = 'arithmetic_answers:0.9,smalltalk:0.1'
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 3e-3
muon_lr = 0.02
min_lr = 0.0
warmup_iters = 10
lr_schedule = 'linear'
warmdown = 0.6
max_iters = 2000
eval_interval = 500
log_interval = 20
sample_tokens = 0
