# Evaluate OpenAI's GPT-2 (124M) on a data set; its larger sisters have configs of their own.
init_from = 'gpt2'
eval_only = True
eval_iters = 500        # batches
batch_size = 8
