# Teach the model of config/smoltalk_sft.py to solve word problems with its calculator:
#   python train.py config/train_gpt2.py config/gsm8k_sft.py
stage = 'sft'
init_from = 'out-smoltalk-sft'
out_dir = 'out-gsm8k-sft'
dataset = 'gsm8k'
gradient_accumulation_steps = 2     # 32,768 tokens a step: an epoch is about 40
learning_rate = 3e-4
muon_lr = 0.002
weight_decay = 0.1                  # several epochs over little data
warmup_iters = 10
lr_schedule = 'linear'
warmdown = 1.0
max_iters = 160
eval_interval = 40
eval_iters = 0
sample_tokens = 0
