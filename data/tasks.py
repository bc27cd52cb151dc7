"""
Tasks: questions, a conversation for each, and a reward for an answer.

A task is a data set (its prepare() writes train.bin, val.bin and meta.json, for RL too) whose
prepare.py has three more functions:
    examples(split, seed)       yields examples, dicts of any form
    conversation(example)       -> messages for Tokenizer.render; the last one is a worked answer
    reward(example, answer)     -> a number: how good an answer is, the text as people see it
"""
import collections
import math
import random
from types import SimpleNamespace

from data.files import script_of
from data.tools import calculator
from sample import Request, Sampling, decode


def task_of(folder):
    """-> the prepare.py of a data set; ValueError without examples, conversation and reward"""
    task = script_of(folder)
    if not all(hasattr(task, name) for name in ('examples', 'conversation', 'reward')):
        raise ValueError(f'{folder}: not a task; its prepare.py would need examples, conversation '
                         'and reward')
    return task


def tasks_of(parts):
    """
    -> a task that is a mixture of those in {folder: share}: each example comes from one of them,
    drawn by the shares, until one that is drawn has no more. It is (folder, that task's example).
    """
    tasks = {str(folder): task_of(folder) for folder in parts}

    def examples(split, seed=0):
        rng = random.Random(f'mixture {split} {seed}')
        sources = {folder: task.examples(split, seed) for folder, task in tasks.items()}
        while True:
            folder = rng.choices(list(tasks), list(parts.values()))[0]
            example = next(sources[folder], None)
            if example is None:
                return
            yield folder, example

    return SimpleNamespace(
        examples=examples, conversation=lambda drawn: tasks[drawn[0]].conversation(drawn[1]),
        reward=lambda drawn, answer: tasks[drawn[0]].reward(drawn[1], answer))


def in_play(request):
    """-> for each id of a request, the prompt's too: whether the model itself drew it"""
    return [False] * len(request.prompt) + [p is not None for p in request.logprobs]


def has_chat_tokens(model, tokenizer):
    """Whether a model has the tokens that begin and end a message."""
    known = max(tokenizer.special.values(), default=math.inf) < model.config.vocab_size
    return known and '<|end|>' in tokenizer.special


def answer_questions(model, tokenizer, task, examples, seeds, rows, samples=1, max_new_tokens=200,
                     sampling=Sampling(), tools=True):  # noqa: B008
    """
    Let a model answer each of a task's examples, `samples` times, with the calculator or without.
    Example i's first answer draws with seeds[i], its second with seeds[i] + 1, ...
    -> requests, rewards: lists with the answers to an example side by side. ValueError names an
    example whose reward fails.
    """
    if not has_chat_tokens(model, tokenizer):
        raise ValueError('this model knows no chat tokens: it can answer no questions')
    end = tokenizer.special['<|end|>'], tokenizer.special['<|endoftext|>']
    tool, requests, rewards = calculator(tokenizer) if tools else None, [], []
    for example, seed in zip(examples, seeds, strict=True):
        prompt = tokenizer.render(task.conversation(example)[:-1], reply=True)[0]
        prompt = prompt[-(model.config.block_size - 1):]    # of one that is too long, the end
        room = model.config.block_size - len(prompt)
        requests += [Request(prompt, min(max_new_tokens, room), sampling, seed + i, end, tool)
                     for i in range(samples)]
    for _ in decode(model, requests, rows):
        pass
    for number, request in enumerate(requests):
        example = examples[number // samples]
        try:
            rewards.append(float(task.reward(example, tokenizer.transcript(request.ids))))
        except Exception as error:
            why = f'{type(error).__name__}: {error}'
            raise ValueError(f'reward fails with {why}, of {example}') from None
        if not math.isfinite(rewards[-1]):
            raise ValueError(f'reward gives {rewards[-1]}, of {example}')
    return requests, rewards


def final_answer(text):
    """What follows the last ####, as in GSM8K; without one, the last line that is not empty."""
    lines = text.split('####')[-1].strip().splitlines() or ['']
    return lines[0 if '####' in text else -1].strip()


def majority_vote(texts):
    """The first text with the most frequent final answer (arXiv:2203.11171)
    -> its number, that final answer, how many texts have it"""
    finals = [final_answer(text) for text in texts]
    winner, count = collections.Counter(finals).most_common(1)[0]
    return finals.index(winner), winner, count
