"""
A conversation in the terminal.

    python -m extras.chat --out_dir=out-arithmetic-rl
    python -m extras.chat --out_dir=out-arithmetic-rl --votes=8     # what most of 8 answers say

/clear forgets the conversation, /system TEXT begins anew with a system message, Ctrl-C stops an
answer, Ctrl-D ends the chat.
"""
import contextlib
import itertools

from configurator import configure
from data.detokenizer import Detokenizer
from data.files import program
from data.models import is_taught
from data.tasks import majority_vote
from data.tools import calculator
from sample import Request, Sampling, decode, open_model

out_dir = 'out'         # the run to talk with; gpt2 or another source of sample.py's --init_from
max_new_tokens = 500    # in an answer; at least 1
votes = 1               # decode this many answers, show one with the majority's result; at least 1
tools = True            # let the model call the calculator
seed = 1337             # answer i depends on seed + i * votes alone; at least 0
quantize = ''           # int8 or int4: weights of 8 or 4 bits (extras/quantize.py)
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: the fastest here


def chat(model, tokenizer, taught, sampling):
    """taught: whether the model knows conversations; if not, it continues the text typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys in input()
    if not taught:
        print('This model was never taught to chat: it continues your text instead.')
    turns, end, seeds = [[]], tokenizer.special.get('<|end|>'), itertools.count(seed, votes)
    room = max(2, model.config.block_size - min(max_new_tokens, model.config.block_size // 2))
    tool = calculator(tokenizer) if tools and taught else None
    while True:
        try:
            line = input('\n> ')
            if line == '/clear':
                turns = [turns[0]]
            elif line.split()[:1] == ['/system'] and taught:
                message = {'role': 'system', 'content': line[7:].strip()}
                turns = [tokenizer.render_turn(message)[0] if message['content'] else []]
            elif line and taught:
                question = tokenizer.render_turn({'role': 'user', 'content': line})[0]
                prompt, left_out = tokenizer.fit([*turns, question], room)
                if left_out:
                    print(f'(the first {left_out} messages are dropped from the context)')
                ids = answer(model, tokenizer, Request(
                    prompt, max_new_tokens, sampling, next(seeds), (end, tokenizer.end), tool))
                if ids:
                    ids += [end] * (ids[-1:] != [end]) + tokenizer.encode(tokenizer.template[3])
                    turns += [question, tokenizer.opening('assistant') + ids]
            elif line:
                ids = tokenizer.prefix + tokenizer.encode(line)
                answer(model, tokenizer, Request(ids, max_new_tokens, sampling, next(seeds),
                                                 (tokenizer.end,)))
        except ValueError as error:     # a character that the model never saw
            print(error)
        except KeyboardInterrupt:
            print('\n(Ctrl-D ends the chat)')
        except EOFError:
            print()
            break


def answer(model, tokenizer, request):
    """Print an answer as it is written, or what most of --votes say; Ctrl-C stops it. -> its ids"""
    detokenizer = Detokenizer(tokenizer)
    requests = [Request(request.prompt, request.max_new_tokens, request.sampling, request.seed + i,
                        request.end, request.tool) for i in range(votes)]
    try:
        for request in decode(model, requests, votes):
            if votes == 1:
                print(detokenizer.push(request.ids, last=bool(request.reason)), end='', flush=True)
        if votes > 1:
            requests = [print_vote(requests, tokenizer)]
    except KeyboardInterrupt:
        print(' (stopped)', end='')
    print()
    return [] if len(requests) > 1 else requests[0].ids     # of several, none was chosen


def print_vote(requests, tokenizer):
    """Print one of the answers that most agree with. -> its request"""
    texts = [tokenizer.transcript(request.ids) for request in requests]
    chosen, winner, count = majority_vote(texts)
    print(f'{texts[chosen]}\n({count} of {len(texts)} answers say: {winner})', end='')
    return requests[chosen]


def main():
    config, _ = configure(globals(), others=lambda values: [Sampling(temperature=0.8, top_k=200)])
    model, tokenizer, checkpoint = open_model(out_dir, device, dtype, quantize)
    chat(model, tokenizer, is_taught(checkpoint), Sampling.of(config))


if __name__ == '__main__':
    program(main)
