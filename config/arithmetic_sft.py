# Learn to answer, from 2,000 worked answers:  python train.py config/arithmetic_sft.py
stage = 'sft'
init_from = 'out-arithmetic-base'
out_dir = 'out-arithmetic-sft'
dataset = 'arithmetic:0.85,smalltalk:0.15'
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 2e-3
muon_lr = 0.02
weight_decay = 0.0      # with dropout = 0.1 it learned less in the same steps: see the README
min_lr = 0.0
warmup_iters = 10
warmdown = 0.8
max_iters = 450         # three times over the worked answers: RL needs a model with doubts
eval_interval = 150
eval_iters = 0
log_interval = 20
sample_tokens = 0
