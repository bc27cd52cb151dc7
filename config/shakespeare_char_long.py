# Below nanoGPT's result on a GPU (1.4697), on two CPU cores:
#   python train.py config/train_shakespeare_char.py config/shakespeare_char_long.py
out_dir = 'out-shakespeare-char-long'
n_layer = 8             # with 6 layers some seeds end above that
n_head = 3
n_embd = 192            # at 256 it was no better half-way
block_size = 256
batch_size = 8
learning_rate = 2e-3
max_iters = 1000        # two epochs; 1,400 steps were no better (with 6 layers)
eval_interval = 250
