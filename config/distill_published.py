# A small model learns what a published one finds likely, over text in that one's vocabulary:
#   python data/fineweb/prepare.py --source="pages/*.parquet" --tokenizer=FOLDER
#   python train.py config/distill_published.py --teacher=FOLDER
# FOLDER has config.json, model.safetensors and tokenizer.json (extras/open_weights.py).
stage = 'distill'
on_policy = False
dataset = 'fineweb'
out_dir = 'out-student'
block_size = 512
batch_size = 8
gradient_accumulation_steps = 4
n_layer = 6
n_head = 3
n_embd = 384
learning_rate = 3e-3
muon_lr = 0.02
min_lr = 0.0
warmup_iters = 50
lr_schedule = 'linear'
warmdown = 0.6
max_iters = 3000
eval_interval = 500
sample_tokens = 80
