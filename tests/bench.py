"""
The README's measurements of decoding. It reports what it measured, and passes no judgement.

    python tests/bench.py cache          # with the KV cache against without
    python tests/bench.py transformers   # GPT-2 124M's shape beside transformers.generate
    python tests/bench.py large          # GPT-2 774M's shape, one row, int8 beside bf16
    python tests/bench.py batch          # 64 samples at once against 64 one by one
    python tests/bench.py mixed          # 256 requests of mixed lengths, in 32 rows
    python tests/bench.py quantized out-shakespeare-char    # a run's loss in 8 and 4 bits
    python tests/bench.py steps          # the laptop run's steps beside nanoGPT's recipe's
    python tests/bench.py rl out-arithmetic-sft         # where a step of RL spends its time
    python tests/bench.py demonstrations 200 500    # accuracy of out-sft-200, out-rl-200, ...
    python tests/bench.py bytes_per_token data/bpe english.txt code.txt   # beside GPT-2's
    python tests/bench.py speculative    # GPT-2 124M's shape, the text looked up, against plain
    python tests/bench.py server         # 16 clients of the web server against the bare loop
"""

import concurrent.futures
import copy
import http.client
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from configurator import auto_device, configure, read_settings  # noqa: E402
from data import tasks  # noqa: E402
from data.files import DATA, read_text, tokenizer_of  # noqa: E402
from data.models import load_model  # noqa: E402
from data.rows import microbatches, pad  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from data.tokens import Tokens  # noqa: E402
from extras.gpt2 import load_gpt2  # noqa: E402
from extras.machine import bandwidth_share  # noqa: E402
from extras.quantize import quantize_model  # noqa: E402
from extras.row_linear import use_row_linears  # noqa: E402
from extras.speculative import speculate  # noqa: E402
from model import GPT, GPT2, GPTConfig  # noqa: E402
from sample import Request, Sampling, decode, generate, seed  # noqa: E402

GREEDY = Sampling(temperature=0.0)

CHAR = dict(n_layer=4, n_head=2, n_embd=128, block_size=256, vocab_size=72)
LONG = dict(n_layer=6, n_head=3, n_embd=192, block_size=256, vocab_size=72, ngrams=4)
NANOGPT = dict(GPT2, n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False)
GPT2_124M = dict(GPT2, n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)
DEVICE = auto_device()


def build(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return use_row_linears(GPT(GPTConfig(**shape)).to(DEVICE, dtype).eval())


def begin(train, layers):
    """-> a Run with these settings, as main() makes it."""
    return train.make_run(*configure(vars(train), layers, train.other_settings))[0]


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
    return f'{bandwidth_share(model, seconds):.0%} of the memory bandwidth'


def cache():
    for name, shape, count, every in (
        ('characters, 4 layers of 128', CHAR, 255, 1),
        ('characters, 6 layers of 192', LONG, 255, 1),
        ("nanoGPT's 6 layers of 384", NANOGPT, 255, 5),
        ('GPT-2 124M', GPT2_124M, 900, 25),
    ):
        model = build(shape)
        cached = timed(lambda m=model, n=count: generate(m, [[0]], n, GREEDY))
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
            ours = use_row_linears(load_gpt2(folder).to(DEVICE, dtype).eval())
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
        fast = timed(lambda model=ours: generate(model, prompt.tolist(), 64, GREEDY))
        print(
            f'GPT-2 124M, {dtype}, one row: {64 / fast:.1f} tokens/s, '
            f'transformers {hf.__version__} {64 / slow:.1f}: '
            f'{slow / fast:.2f} x; {share(ours, fast / 64)}'
        )
        for kind in 'int8', 'int4':
            narrow = quantize_model(copy.deepcopy(ours), kind)
            small = timed(lambda model=narrow: generate(model, prompt.tolist(), 64, GREEDY))
            print(
                f'the same in {kind}: {64 / small:.1f} tokens/s, {fast / small:.2f} x; '
                f'{share(narrow, small / 64)}'
            )


def large():
    """Where reading the weights is nearly all of the work."""
    shape = dict(GPT2, n_layer=36, n_head=20, n_embd=1280, block_size=1024, vocab_size=50257)
    for dtype in torch.bfloat16, torch.float32:
        with torch.device('meta'):
            model = GPT(GPTConfig(**shape))
        model = model.to(dtype).to_empty(device=DEVICE).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
        if dtype == torch.float32:
            quantize_model(model)
        one = timed(lambda model=model: generate(model, [[1]], 32, GREEDY)) / 32
        kind = 'bf16' if dtype == torch.bfloat16 else 'int8'
        print(f'GPT-2 774M, one row, {kind}: {1 / one:.1f} tokens/s, {share(model, one)}')


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


def mixed():
    """256 requests for 10 to 200 tokens: refilled rows, batches of 32, one by one."""
    model, rng = build(CHAR), np.random.default_rng(0)
    asked = rng.integers(10, 201, 256).tolist()
    prompts = [rng.integers(0, 65, rng.integers(1, 40)).tolist() for _ in asked]

    def seconds(size, rows, wait=False):
        """Of all requests, in groups that wait for each other; wait: with all rows to the end."""
        took = 0.0
        for first in range(0, 256, size):
            longest = max(asked[first : first + size])
            group = [
                Request(prompts[i], longest if wait else asked[i], seed=i)
                for i in range(first, min(first + size, 256))
            ]
            began = time.perf_counter()
            for _ in decode(model, group, rows):
                pass
            took += time.perf_counter() - began
        return took

    seconds(256, 32)
    loop, batches = seconds(256, 32), seconds(32, 32, wait=True)
    shrinking, alone = seconds(32, 32), seconds(1, 1)
    print(
        f'256 requests, {sum(asked)} tokens: {sum(asked) / loop:.0f} tokens/s in 32 rows; '
        f'{batches / loop:.2f} x batches whose rows all go on until the longest has ended '
        f'({sum(asked) / batches:.0f}), {shrinking / loop:.2f} x batches that shrink as rows end '
        f'({sum(asked) / shrinking:.0f}), {alone / loop:.1f} x one by one '
        f'({sum(asked) / alone:.0f})'
    )


def quantized(folder):
    """Validation loss of a run, with its weights and with 8 and 4 bits for them; fp32 else."""
    model, _, checkpoint = load_model(folder)
    config = checkpoint['config']
    val = Tokens(DATA / config['dataset'], 'val', config['block_size'] + 1)
    starts, repeats = val.cover(config['block_size'])
    starts = starts[repeats == 0]

    @torch.inference_mode()
    def loss():
        total = 0.0
        for part in np.array_split(starts, -(-len(starts) // 64)):
            window = torch.from_numpy(val.windows(part, config['block_size'] + 1))
            total += model(window[:, :-1], window[:, 1:])[1].item()
        return total / len(starts) / config['block_size']

    model.eval()
    before, plain = loss(), model
    for kind in 'int8', 'int4':
        model = quantize_model(copy.deepcopy(plain), kind)
        after = loss()
        print(f'{folder}: {before:.5f}, with {kind} weights {after:.5f}: {after / before - 1:+.4%}')


def rl(folder):
    """Ten steps of RL from a run: seconds in rollouts, in scoring answers, and in learning."""
    import train
    from stages import rl

    spent = {'rollouts': 0.0, 'scoring': 0.0}

    def stopwatch(name, action):
        def timed(*args, **how):
            began = time.perf_counter()
            result = action(*args, **how)
            spent[name] += time.perf_counter() - began
            return result

        return timed

    with tempfile.TemporaryDirectory() as out:
        layers = ['config/arithmetic_rl.py', f'--init_from={folder}', f'--out_dir={out}/out']
        run = begin(train, [*layers, '--log_interval=1000000'])
    task = tasks.tasks_of(run.data)
    task.reward = stopwatch('scoring', task.reward)
    rl.tasks_of = lambda parts: task
    rl.answer_questions = stopwatch('rollouts', rl.answer_questions)
    batches, _ = rl.start(run)
    for step in range(11):
        if step == 1:  # the first one warms up
            began, run.notes, run.tokens = time.perf_counter(), {}, 0
            spent.update(rollouts=0.0, scoring=0.0)
        train.one_step(run, batches, step)
    whole, answers = time.perf_counter() - began, rl.num_prompts * rl.num_samples
    tokens = 10 * answers * np.mean(run.notes['answer_length'])
    rollouts, dead = spent['rollouts'] - spent['scoring'], np.mean(run.notes['dead_groups'])
    learning, learned = whole - spent['rollouts'], run.tokens
    print(
        f'a step of {answers} answers: {whole / 10:.2f} s; rollouts {rollouts / whole:.0%} '
        f'({tokens / rollouts:,.0f} tokens/s), scoring {spent["scoring"] / whole:.1%}, learning '
        f'{learning / whole:.0%} ({learned / learning:,.0f} tokens/s with the questions)'
    )
    requests, _ = rl.rollouts(run, task, 11)
    began = time.perf_counter()
    everything = [rl.example_of(request, 0.1) for request in requests]
    train.update(run, microbatches(run, everything), 11)
    print(
        f'{dead:.0%} of the groups are dead; learning takes {learning / 10:.2f} s without them, '
        f'{time.perf_counter() - began:.2f} s with them'
    )
    requests, _ = rl.rollouts(run, task, 12)  # of the model as it is now
    ratios = torch.cat([ratio(run, rl.example_of(r, 1), r.logprobs) for r in requests])
    far = (ratios - 1).abs() > rl.clip_ratio
    print(
        f'p of a sampled token in learning / in decoding, {str(run.dtype)[6:]}: mean '
        f'{ratios.mean():.4f}, deviation {ratios.std():.4f}, {far.float().mean():.2%} of '
        f'{len(ratios):,} beyond 1 +- {rl.clip_ratio}'
    )


def ratio(run, example, logprobs):
    """-> how much likelier learning finds each token that the model sampled than decoding did"""
    x, y, _ = pad([example])
    sampled = torch.tensor([p for p in logprobs if p is not None])
    return (run.log_probs(run.model, x, y)[y >= 0] - sampled).exp()


def demonstrations(*counts):
    r"""
    A picture of how many of 500 test questions out-sft-N and out-rl-N answer rightly, over N, the
    worked answers that SFT had. For each N:
    python data/arithmetic/prepare.py --demonstrations=N --out_dir=data/arithmetic_N
    python train.py config/arithmetic_sft.py --dataset=arithmetic_N:0.85,smalltalk:0.15 \
        --out_dir=out-sft-N
    python train.py config/arithmetic_rl.py --init_from=out-sft-N --out_dir=out-rl-N
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    task = tasks.task_of(DATA / 'arithmetic')
    asked = list(itertools.islice(task.examples('test', seed), 500))
    figure, axis = pyplot.subplots(figsize=(6, 3.5))
    for stage in 'sft', 'rl':
        right = []
        for count in counts:
            model, tokenizer, _ = load_model(f'out-{stage}-{count}')
            use_row_linears(model.eval())
            _, rewards = tasks.answer_questions(
                model, tokenizer, task, asked, range(500), 128, 1, 120, GREEDY
            )
            right.append(np.mean(rewards))
            print(f'{stage} after {count} demonstrations: {right[-1]:.1%}', flush=True)
        axis.plot(list(map(int, counts)), right, 'o-', label=stage)
    axis.set(xlabel='worked answers to learn from', ylabel='share of right answers', ylim=(0, 1))
    axis.set_xscale('log')
    axis.set_xticks(list(map(int, counts)), counts)
    axis.minorticks_off()
    axis.legend()
    figure.savefig(DATA.parent / 'assets/demonstrations.png', dpi=100, bbox_inches='tight')


def bytes_per_token(folder, *paths):
    """Bytes of text a token stands for: more is shorter."""
    known = {}
    for name in ('gpt2', 'cl100k_base'):
        try:
            known[name] = tiktoken.get_encoding(name).encode_ordinary
        except Exception as error:
            print(f'{name}: not cached, and not to be downloaded here ({type(error).__name__})')
    known[folder] = tokenizer_of(folder).encode
    for path in paths:
        text = read_text(path)
        size = len(text.encode())
        print(f'{path} ({size:,} bytes): ' + ', '.join(
            f'{name} {size / len(encode(text)):.2f}' for name, encode in known.items()))


def speculative():
    """Random weights, whose greedy text repeats itself: nearly all proposals are accepted."""
    model, prompt = build(GPT2_124M), list(range(20))
    plain = timed(lambda: generate(model, [prompt], 200, GREEDY))
    for lookahead in 4, 8:
        counts = {}

        def speculated(lookahead=lookahead, counts=counts):
            requests = [Request(prompt, 200, GREEDY)]
            for _ in speculate(model, requests, None, lookahead, counts):
                pass

        seconds = timed(speculated)
        print(
            f'124M, {lookahead} looked up: {200 / seconds:.1f} tokens/s against {200 / plain:.1f}, '
            f'{plain / seconds:.2f} x; {counts["accepted"]} of {counts["proposed"]} accepted'
        )


def server():
    """GPT-2 124M's shape, 16 clients at once, 64 tokens each, streamed."""
    model, rows = build(GPT2_124M), 16
    tokenizer = Tokenizer.of_text(''.join(map(chr, range(32, 126))))
    prompts = [[i + 1] * 16 for i in range(rows)]
    from conftest import serving

    from extras.serve import Endpoint, Server

    known = Endpoint(model, tokenizer, {'lineage': []}, 'bench')
    server = Server(known, lambda source: decode(model, source, rows), '127.0.0.1', 0, 64)
    with serving(server) as web:

        def ask(prompt):
            connection = http.client.HTTPConnection('127.0.0.1', web.server_port)
            body = {'prompt': prompt, 'max_tokens': 64, 'temperature': 0, 'stream': True}
            began = time.perf_counter()
            headers = {'Content-Type': 'application/json'}
            connection.request('POST', '/v1/completions', json.dumps(body), headers)
            reply = connection.getresponse()
            reply.readline()
            first = time.perf_counter() - began
            reply.read()
            return first

        bare, through_web, firsts = [], [], []
        with concurrent.futures.ThreadPoolExecutor(rows) as pool:
            for _ in range(4):  # in turn, so that what else the machine does slows both alike
                began = time.perf_counter()
                generate(model, prompts, 64, GREEDY)
                between = time.perf_counter()
                firsts += pool.map(ask, prompts)
                bare.append(between - began)
                through_web.append(time.perf_counter() - between)
    bare, through_web = min(bare), min(through_web)
    print(
        f'GPT-2 124M, 16 clients: {1024 / through_web:.1f} tokens/s, the bare loop '
        f'{1024 / bare:.1f}: {bare / through_web:.0%}; first token after '
        f'{sorted(firsts)[len(firsts) // 2]:.2f} s (median), {max(firsts):.2f} s (worst)'
    )


def steps():
    """Steps of two configs in turn, so that whatever else the machine does slows both alike."""
    import train

    defaults = {name: vars(train)[name] for name in read_settings(vars(train))}
    runs, seconds = {}, {}
    for name in 'nanogpt_baseline', 'train_shakespeare_char':
        vars(train).update(defaults)
        with tempfile.TemporaryDirectory() as folder:
            run = begin(train, [f'config/{name}.py', f'--out_dir={folder}/out'])
            batches, _ = run.stage.start(run)
        runs[name] = run, batches, {key: vars(train)[key] for key in defaults}
        seconds[name] = []
    for turn in range(11):
        for name, (run, batches, settings) in runs.items():
            vars(train).update(settings)
            began = time.perf_counter()
            for step in range(10 * turn, 10 * turn + 10):
                train.one_step(run, batches, step)
            seconds[name].append((time.perf_counter() - began) / 10)
    whole = []
    for name, (_, _, settings) in runs.items():
        one = sorted(seconds[name][1:])
        whole.append(sum(one) / len(one) * settings['max_iters'])
        print(
            f'{name}: {1e3 * one[5]:.0f} ms a step (median of 10 x 10; {1e3 * one[0]:.0f} to '
            f'{1e3 * one[-1]:.0f}), {settings["max_iters"]} steps are {whole[-1]:.0f} s'
        )
    print(f'the second takes {whole[1] / whole[0]:.0%} of the time of the first')


if __name__ == '__main__':
    chosen = sys.argv[1:] or ['cache', 'transformers', 'batch', 'mixed', 'server', 'steps']
    print(f'torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads')
    if chosen[0] in ('quantized', 'rl', 'demonstrations', 'bytes_per_token'):
        globals()[chosen[0]](*chosen[1:])
    else:
        for name in chosen:
            globals()[name]()
