# The shape of Grok-1 (github.com/xai-org/grok-1): 314B parameters, a quarter of them at work.
#   python train.py config/grok1.py --dry_run=True --gpus=1024xH100 --dollars_per_gpu_hour=3
# It answers in seconds what such a run takes of each GPU and in hours.
out_dir = 'out-grok1'
dataset = 'fineweb'         # for its 131,072 tokens: extras/train_tokenizer.py --vocab_size=131072
n_layer = 64
n_embd = 6144
n_head = 48
n_kv_head = 8
n_expert = 8
n_expert_active = 2
n_inner = 49152             # 32,768 with a gate beside it, in Grok-1: as many weights
activation = 'gelu'
block_size = 8192
batch_size = 1
gradient_accumulation_steps = 1024
max_iters = 100000
shard = True
learning_rate = 1e-4
muon_lr = 0.01
min_lr = 0.0
lr_schedule = 'linear'
warmup_iters = 1000
