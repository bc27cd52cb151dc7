# A layer on config/depth.py: two thirds of its tokens, 8 for each weight instead of 12, as in
# nanochat's speedrun. The batch and the rates stay.
max_iters = max(1, max_iters * 8 // 12)         # noqa: F821
ngrams = 2      # pairs of tokens have a table too: they paid at depth 4 (config/README.md)
