# Learn to be right, from questions whose answers can be checked:
#   python train.py config/arithmetic_rl.py
stage = 'rl'
init_from = 'out-arithmetic-sft'
out_dir = 'out-arithmetic-rl'
dataset = 'arithmetic:0.9,smalltalk:0.1'   # without the second it forgets how to talk
block_size = 256
batch_size = 32         # answers in a microbatch
gradient_accumulation_steps = 1
num_prompts = 64        # many questions and few answers: there are many verbs to meet
num_samples = 4
max_new_tokens = 96
rollout_rows = 256
eval_examples = 400
learning_rate = 5e-4    # on the tables
muon_lr = 0.003
weight_decay = 0.0      # nothing is read twice, so there is nothing to unlearn
min_lr = 0.0
warmup_iters = 20       # momentum is a mean of twenty steps: the first ones are mostly noise
lr_schedule = 'linear'
warmdown = 0.4
max_iters = 300
eval_interval = 50
log_interval = 10
sample_tokens = 0
