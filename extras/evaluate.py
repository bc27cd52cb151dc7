"""
The exam: how many of a task's test questions a run and the runs it was made from answer correctly.

    python -m extras.evaluate --out_dir=out-arithmetic-rl --task=arithmetic --max_new_tokens=120

Prints a row for each run and, without --votes, draws stages.png in the last one's folder: losses,
rewards and these accuracies on one page.
"""
import itertools

import numpy as np

from configurator import configure, read_settings
from data.files import DATA, extra, program
from data.models import folder_of, load_model
from data.tasks import answer_questions, has_chat_tokens, majority_vote, task_of
from sample import Sampling, open_model

out_dir = 'out'         # the run, or one of its checkpoints
task = 'arithmetic'     # data/<task>, which has examples, conversation and reward
num_examples = 500      # test questions; at least 1
max_new_tokens = 500    # in an answer; at least 1
rows = 16               # answers that are decoded side by side; at least 1
votes = 1               # what most of this many answers say counts; 1: greedy; at least 1
tools = True            # let the model call the calculator
seed = 1337             # of the questions and votes; at least 0
quantize = ''           # int8 or int4: weights of 8 or 4 bits (extras/quantize.py)
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: the fastest here


def evaluate(model, tokenizer, questions, sampling):
    """-> accuracy by kind of question. questions: a task"""
    columns = {'all': []}
    variants = {'': {}, **getattr(questions, 'VARIANTS', {})}
    for variant, world in variants.items():
        examples = list(itertools.islice(questions.examples('test', seed, **world), num_examples))
        seeds = np.random.SeedSequence(seed).generate_state(len(examples)).tolist()
        requests, rewards = answer_questions(model, tokenizer, questions, examples, seeds, rows,
                                             votes, max_new_tokens, sampling, tools)
        for i, example in enumerate(examples):
            group = slice(i * votes, (i + 1) * votes)
            texts = [tokenizer.transcript(request.ids) for request in requests[group]]
            reward = rewards[group][majority_vote(texts)[0]]
            for kind in {variant} if variant else {'all', example.get('kind', 'all')}:
                columns.setdefault(kind, []).append(reward)
    return {kind: float(np.mean(values)) for kind, values in columns.items()}


def main():
    config, origin = configure(globals(), others=lambda values: [Sampling(temperature=0.8)])
    sampling = Sampling(temperature=0.0) if votes == 1 else Sampling.of(config)
    if votes == 1 and read_settings(Sampling).keys() & origin.keys():
        raise ValueError('one answer is greedy: settings of sampling need --votes=')
    questions, table = task_of(DATA / task), {}
    lineage = load_model(out_dir)[2].get('lineage', [])
    runs = [entry.get('init_from', '') for entry in lineage]
    runs = [run for run in runs if (folder_of(run) / 'log.jsonl').exists()] + [out_dir]
    width = max(map(len, [*runs, f'{num_examples} questions']))
    for run in runs:
        model, tokenizer, _ = open_model(run, device, dtype, quantize)
        if run != out_dir and not has_chat_tokens(model, tokenizer):
            continue    # GPT-2's tokens, before a stage gave it those of a chat
        table[run] = evaluate(model, tokenizer, questions, sampling)
        if len(table) == 1:
            names = (name.rjust(6) for name in table[run])
            print(f'{num_examples} questions'.ljust(width), *names, sep='  ')
        cells = (f'{value:.1%}'.rjust(max(6, len(name))) for name, value in table[run].items())
        print(run.ljust(width), *cells, sep='  ', flush=True)
    if tools and votes == 1 and (plot := extra('plot')):    # a picture of the runs as they are
        target = folder_of(out_dir) / 'stages.png'
        plot.draw([folder_of(run) for run in table], target, f'the stages on data/{task}',
                  [row['all'] for row in table.values()])
        print(f'drawn: {target}')


if __name__ == '__main__':
    program(main)
