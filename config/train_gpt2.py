# GPT-2's size (124M) on FineWeb-Edu, on one GPU or on 8 x N:
#   python train.py config/train_gpt2.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = 'out-gpt2'
dataset = 'fineweb'
wandb_project = 'fineweb'
wandb_run_name = 'gpt2-124M'
block_size = 1024
batch_size = 16                     # what 24 GB hold
gradient_accumulation_steps = 32    # 524,288 tokens a step, over all GPUs together
n_layer = 12
n_head = 6
n_embd = 768
max_iters = 5000                    # 2.6B tokens, about 20 for each parameter (arXiv:2203.15556)
learning_rate = 3e-3                # AdamW has only the token tables here, and they bear more
muon_lr = 0.02
min_lr = 0.0
warmup_iters = 100
lr_schedule = 'linear'
warmdown = 0.5
eval_interval = 250
eval_iters = 100
log_interval = 10
