# A layer: GPT-2's architecture and nanoGPT's optimizer, instead of the modern default.
#   python train.py config/train_gpt2.py config/gpt2.py
norm = 'layer'
position = 'learned'
qk_norm = False
activation = 'gelu'
tied = True
zero_init = False
x0 = False
n_head = 12
ngrams = 1
vocab_multiple = 64     # 50257 would be slow: a matrix product likes round sizes
muon_lr = 0.0           # AdamW for all
learning_rate = 6e-4
min_lr = 6e-5
warmdown = 0.0          # cosine
