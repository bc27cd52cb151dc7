# A layer on config/depth.py: two thirds of its tokens, 8 for each weight instead of 12, as in
# nanochat's speedrun. The batch and the rates stay.
max_iters = max(1, max_iters * 8 // 12)         # noqa: F821
warmup_iters = min(100, max_iters // 20)
eval_interval = max(1, max_iters // 10)
log_interval = max(1, min(10, max_iters // 20))
