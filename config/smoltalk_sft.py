# Teach the model of config/train_gpt2.py to chat, on GPUs:
#   python data/smoltalk/prepare.py
#   python train.py config/train_gpt2.py config/smoltalk_sft.py
stage = 'sft'
init_from = 'out-gpt2'
out_dir = 'out-smoltalk-sft'
dataset = 'smoltalk'
gradient_accumulation_steps = 8     # 131,072 tokens a step
learning_rate = 3e-4                # a tenth of pretraining's: it knows the language already
muon_lr = 0.002
weight_decay = 0.0                  # an epoch or two: there is nothing to forget
warmup_iters = 20
lr_schedule = 'linear'
warmdown = 1.0
max_iters = 3000                    # about an epoch
eval_interval = 250
sample_tokens = 0
