# Evaluate OpenAI's GPT-2 large: as config/eval_gpt2.py, with another model.
init_from = 'gpt2-large'
eval_only = True
eval_iters = 500        # batches
batch_size = 8
