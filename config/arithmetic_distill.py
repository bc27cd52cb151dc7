# A student of a quarter of the size learns from the whole distributions of its teacher:
#   python train.py config/arithmetic_distill.py
#   python train.py config/arithmetic_distill.py --stage=sft --out_dir=out-alone     # no teacher
stage = 'distill'
on_policy = False
teacher = 'out-arithmetic-rl'
out_dir = 'out-arithmetic-distill'
dataset = 'arithmetic_text:0.3,arithmetic:0.7'      # the teacher's first and second data set
n_layer = 4
n_head = 1
n_embd = 64
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1
ngrams = 2
ngram_rows = 4096
learning_rate = 3e-3
muon_lr = 0.02
min_lr = 0.0
warmup_iters = 10
warmdown = 0.6
max_iters = 2000
eval_interval = 500
log_interval = 20
sample_tokens = 0
