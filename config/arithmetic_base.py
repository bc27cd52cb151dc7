# A small model that learns to write about who has how many: the ground of the stages that follow.
#   python train.py config/arithmetic_base.py
out_dir = 'out-arithmetic-base'
dataset = 'arithmetic_text'
n_layer = 4
n_head = 2              # wide ones: 4 of 32 copy less well after as much text
n_kv_head = 1           # one key for all heads: answers are written sooner
n_embd = 128
block_size = 256
batch_size = 4          # many small steps: half as many of 8 rows end at a far higher loss
gradient_accumulation_steps = 1
ngrams = 2
ngram_rows = 8192
learning_rate = 3e-3
muon_lr = 0.02
min_lr = 0.0
warmup_iters = 10
lr_schedule = 'linear'
warmdown = 0.6
max_iters = 1200        # 0.7 epochs: nothing is read twice
eval_interval = 400
eval_iters = 20
log_interval = 20
