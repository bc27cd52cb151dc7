# A layer: GPT-2's architecture and nanoGPT's optimizer, instead of the modern default.
#   python train.py config/train_gpt2.py config/gpt2.py
from model import GPT2 as _gpt2

globals().update(_gpt2)
n_head = 12
ngrams = 1
vocab_multiple = 64     # 50257 would be slow: a matrix product likes round sizes
muon_lr = 0.0           # AdamW for all
learning_rate = 6e-4
min_lr = 6e-5
lr_schedule = 'cosine'
