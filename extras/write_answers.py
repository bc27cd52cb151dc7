r"""
A run's own answers to training questions, as a data set to learn from.

    python -m extras.write_answers --out_dir=out-arithmetic-rl --task=arithmetic \
        --folder=data/arithmetic_answers --num_samples=1 --num_examples=8000 --max_new_tokens=120

Writes its correct answers (rejection sampling, for stage sft or distill) or, with --pairs=True, a
correct and a wrong answer to each question (for stage dpo).
"""
import itertools
from pathlib import Path

import numpy as np

from configurator import configure
from data.files import DATA, program, script_of
from data.sources import write_texts
from data.tasks import answer_questions, in_play, task_of
from sample import Sampling, open_model

out_dir = 'out'         # the run that answers
task = 'arithmetic'     # data/<task>, which has examples, conversation and reward
folder = ''             # where the data set goes: data/NAME
pairs = False           # a correct and a wrong answer to each question, instead of correct ones
num_examples = 500      # questions; at least 1
num_samples = 10        # answers to each; at least 1
max_new_tokens = 500    # in an answer; at least 1
rows = 16               # answers that are decoded side by side; at least 1
tools = True            # let the model call the calculator
seed = 1337             # of the questions and answers; at least 0
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: the fastest here


def choose(requests, rewards, end):
    """-> of the answers to a question those that are learned from, as (ids, in play)"""
    graded = list(zip(requests, rewards, strict=True))
    correct = [request for request, reward in graded if reward > 0.5 and request.ids[-1] == end]
    wrong = [request for request, reward in graded if reward <= 0.5]
    if pairs:
        correct = [correct[0], wrong[0]] if correct and wrong else []
    return [(request.prompt + request.ids, in_play(request)) for request in correct]


def write_answers(model, tokenizer, questions, sampling):
    """Answer training questions of a task and write the data set."""
    examples = list(itertools.islice(questions.examples('train', f'write {seed}'), num_examples))
    seeds = np.random.SeedSequence(seed).generate_state(len(examples)).tolist()
    requests, rewards = answer_questions(model, tokenizer, questions, examples, seeds, rows,
                                         num_samples, max_new_tokens, sampling, tools)
    texts = []
    for i in range(0, len(requests), num_samples):
        group = slice(i, i + num_samples)
        texts.append(choose(requests[group], rewards[group], tokenizer.special['<|end|>']))
    held_out = max(1, len(texts) // 10)
    splits = {'train': sum(texts[held_out:], []), 'val': sum(texts[:held_out], [])}
    if not all(splits.values()):
        raise ValueError(f'{num_examples} questions gave too little to learn from: ask more')
    write_texts(folder, tokenizer, f'answers of {out_dir} to questions of {task}', **splits)
    print(f'{sum(map(bool, texts))} of {len(texts)} questions gave something to learn, in {folder}')


def main():
    config, _ = configure(globals(), others=lambda values: [Sampling()])
    if not folder:
        raise ValueError('--folder= says where the data set goes, such as data/my_answers')
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f'--folder={folder}: is a file')
    script = script_of(Path(folder))
    if script and not hasattr(script, 'COMMAND'):
        raise ValueError(f'--folder={folder} holds another data set: choose a new folder')
    questions = task_of(DATA / task)
    model, tokenizer, _ = open_model(out_dir, device, dtype)
    write_answers(model, tokenizer, questions, Sampling.of(config))


if __name__ == '__main__':
    program(main)
