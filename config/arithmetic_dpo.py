# Prefer right answers to wrong ones of the model's own:
#   python -m extras.write_answers --out_dir=out-arithmetic-sft --folder=data/arithmetic_pairs \
#       --pairs=True --num_samples=8 --num_examples=2000 --rows=128 --max_new_tokens=120
#   python train.py config/arithmetic_dpo.py
stage = 'dpo'
init_from = 'out-arithmetic-sft'
out_dir = 'out-arithmetic-dpo'
dataset = 'arithmetic_pairs'
block_size = 256
batch_size = 32         # 16 pairs
gradient_accumulation_steps = 1
learning_rate = 3e-5
muon_lr = 0.001
weight_decay = 0.0
min_lr = 0.0
warmup_iters = 5
lr_schedule = 'linear'
warmdown = 0.5
max_iters = 60
eval_interval = 20
log_interval = 5
sample_tokens = 0
