# Learn to be right, from questions whose answers can be checked:
#   python train.py config/arithmetic_rl.py
stage = 'rl'
init_from = 'out-arithmetic-sft'
out_dir = 'out-arithmetic-rl'
dataset = 'arithmetic'
block_size = 256
batch_size = 32         # answers in a microbatch
gradient_accumulation_steps = 1
num_prompts = 32
num_samples = 8
max_new_tokens = 120
rollout_rows = 256
eval_examples = 400
learning_rate = 3e-5    # on the tables
muon_lr = 0.002         # at 0.004 accuracy rose for 50 steps and then fell
weight_decay = 0.0      # nothing is read twice, so there is nothing to unlearn
min_lr = 0.0
warmup_iters = 5
warmdown = 0.4
max_iters = 300
eval_interval = 50
log_interval = 10
sample_tokens = 0
