# A toy in the place of the model of config/train_gpt2.py: the stages for GPUs, run on a laptop.
#   python train.py config/train_gpt2.py config/tiny.py
#   python train.py config/train_gpt2.py config/smoltalk_sft.py config/tiny.py \
#       --learning_rate=3e-3 --muon_lr=0.02
# It writes where the real ones would: a run that is there is moved aside.
block_size = 256
batch_size = 4
gradient_accumulation_steps = 1
n_layer = 2
n_head = 1
n_embd = 64             # 50,257 tokens to choose from are nearly all of its work
max_iters = 300
eval_interval = 100
eval_iters = 20
warmup_iters = 5
if stage == 'rl':   # noqa: F821  set by the layer before
    eval_examples = 100
    num_prompts = 8
    num_samples = 8
    max_new_tokens = 120
    rollout_rows = 64
