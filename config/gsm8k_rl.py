# Practise on GSM8K's questions, with a reward for the right number:
#   python train.py config/train_gpt2.py config/gsm8k_rl.py
stage = 'rl'
init_from = 'out-gsm8k-sft'
out_dir = 'out-gsm8k-rl'
dataset = 'gsm8k'
num_prompts = 32
num_samples = 16
max_new_tokens = 300
rollout_rows = 512
eval_examples = 400
learning_rate = 3e-5
muon_lr = 0.0005
min_lr = 0.0
weight_decay = 0.0                  # a question is seen a few times, its answers never twice
warmup_iters = 5
lr_schedule = 'linear'
warmdown = 0.5
max_iters = 400
eval_interval = 50
sample_tokens = 0
