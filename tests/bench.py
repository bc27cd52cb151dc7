"""
The README's measurements of decoding. It reports what it measured, and passes no judgement.

    python tests/bench.py cache          # with the KV cache against without
    python tests/bench.py transformers   # GPT-2 124M's shape beside transformers.generate
    python tests/bench.py batch          # 64 samples at once against 64 one by one
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import GPT, GPT2, GPTConfig  # noqa: E402
from sample import auto_device, generate, lay_for_reading, read_bandwidth  # noqa: E402

CHAR = dict(n_layer=4, n_head=2, n_embd=128, block_size=256, vocab_size=72)
GPT2_124M = dict(GPT2, n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)
DEVICE = auto_device()


def build(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return lay_for_reading(GPT(GPTConfig(**shape)).to(DEVICE, dtype).eval())


def timed(action):
    """-> seconds of the quickest of three calls, the first of which also warms up."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@torch.inference_mode()
def uncached_seconds(model, count, every):
    """Seconds for count tokens with a pass over all the text for each; every so many is timed."""
    text = torch.zeros(1, count, dtype=torch.long, device=DEVICE)
    model(text[:, :8])
    began = time.perf_counter()
    for length in range(every, count + 1, every):
        model(text[:, :length])[0][:, -1].argmax().item()
    return (time.perf_counter() - began) * every


def share(model, seconds):
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
    return f'{weights / seconds / read_bandwidth(DEVICE):.0%} of the memory bandwidth'


def cache():
    for name, shape, count, every in (
        ('characters', CHAR, 255, 1),
        ('GPT-2 124M', GPT2_124M, 900, 25),
    ):
        model = build(shape)
        cached = timed(lambda m=model, n=count: generate(m, [[0]], n, temperature=0))
        plain = uncached_seconds(model, count, every)
        print(
            f'{name}, {count} tokens: {count / cached:.1f} tokens/s with the cache, '
            f'{count / plain:.1f} without (timed at every length divisible by {every}): '
            f'{plain / cached:.1f} x; {share(model, cached / count)}'
        )


def transformers():
    import transformers as hf

    prompt = torch.full((1, 16), 11, device=DEVICE)
    for dtype in torch.float32, torch.bfloat16:
        torch.manual_seed(0)
        theirs = hf.GPT2LMHeadModel(hf.GPT2Config()).eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = lay_for_reading(GPT.from_pretrained(folder).to(DEVICE, dtype).eval())
        theirs.to(DEVICE, dtype)
        how = dict(
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
            attention_mask=torch.ones_like(prompt),
        )
        with torch.inference_mode():
            slow = timed(lambda model=theirs, how=how: model.generate(prompt, **how))
        fast = timed(lambda model=ours: generate(model, prompt.tolist(), 64, temperature=0))
        print(
            f'GPT-2 124M, {dtype}, one row: {64 / fast:.1f} tokens/s, '
            f'transformers {hf.__version__} {64 / slow:.1f}: '
            f'{slow / fast:.2f} x; {share(ours, fast / 64)}'
        )


def batch():
    model = build(CHAR)
    together = timed(lambda: generate(model, [[0]] * 64, 200))
    began = time.perf_counter()
    for row in range(64):
        generate(model, [[0]], 200, seed=row)
    alone = time.perf_counter() - began
    print(
        f'64 samples of 200 tokens: {12800 / together:.0f} tokens/s together, '
        f'{12800 / alone:.0f} one by one: '
        f'{alone / together:.1f} x'
    )


if __name__ == '__main__':
    chosen = sys.argv[1:] or ['cache', 'transformers', 'batch']
    print(f'torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads')
    for name in chosen:
        {'cache': cache, 'transformers': transformers, 'batch': batch}[name]()
