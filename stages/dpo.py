"""
Direct preference optimization (arXiv:2305.18290) on pairs of conversations: the chosen one, then
the rejected one.

    python train.py config/arithmetic_dpo.py

Its loss is -log sigmoid(m), where the margin m = beta * (log p / p_reference of the chosen one -
log p / p_reference of the rejected one). The gradient of this loss is beta * sigmoid(-m) times the
gradient of log p(rejected) - log p(chosen), so the weights of the loss -sum w * log p / N are

    w = +beta * sigmoid(-m) for the chosen one's tokens, -beta * sigmoid(-m) for the rejected one's

with m taken without gradient. DPO's loss is a mean over pairs, where N counts tokens: w is
therefore multiplied by the tokens in play of the whole step and divided by its pairs.
"""
import numpy as np
import torch
from torch.nn import functional as F

from data.files import say
from data.models import load_reference
from data.rows import Conversations, pad

dpo_beta = 0.1               # strength of the preference margin; at least 0


def stage():
    return dict(start=start, reference=True)


def start(run):
    """-> batches(step), evaluate()"""
    train, val = (read_pairs(run, split) for split in ('train', 'val'))
    rows, batch_pairs = run.config['batch_size'], max(1, run.config['batch_size'] // 2)
    count = max(1, rows * run.config['gradient_accumulation_steps'] // 2)   # pairs in a step
    if count % run.world:
        raise ValueError(f'{count} pairs in a step do not divide among {run.world} processes')
    reference = load_reference(run, run.lineage[-1]['init_from'])
    known = {split: log_probs(run, reference, split, range(len(split.spans) // 2), batch_pairs)
             for split in (train, val)}

    def margins(split, pairs):
        gained = log_probs(run, run.model, split, pairs, batch_pairs) - known[split][pairs]
        return dpo_beta * (gained[:, 0] - gained[:, 1])

    def batches(step):
        pairs = draw_pairs(step, count, len(known[train]), run.config['seed'])
        in_play = sum(mask.sum() for _, mask, _ in texts(train, pairs))
        mine = pairs[run.rank::run.world]
        for i in range(0, len(mine), batch_pairs):
            x, y, _ = pad(texts(train, mine[i:i + batch_pairs]))
            m = margins(train, mine[i:i + batch_pairs])
            w = dpo_beta * torch.sigmoid(-m) * in_play / count  # a mean over pairs, not tokens
            run.note(reward_gap=m.mean(), pairs_right=(m > 0).float().mean())
            yield x, y, torch.stack((w, -w), 1).view(-1, 1).expand(y.shape)

    def evaluate():
        m = margins(val, list(range(len(known[val]))))
        loss = -F.logsigmoid(m).mean().item()
        return {'val_loss': loss, 'reward_gap': m.mean().item(),
                'pairs_right': (m > 0).float().mean().item()}, loss

    return batches, evaluate


def read_pairs(run, split):
    """-> one split's conversations; numbers 2i and 2i + 1 are pair i"""
    if len(run.data) > 1:
        raise ValueError(f'--stage=dpo takes one data set, not the mixture '
                         f'{run.config["dataset"]}')
    (folder,), length = run.data, run.config['block_size'] + 1
    found = Conversations(folder, split, length, run.model.config.vocab_size)
    if found.truncated:
        say(f'{found.truncated} conversations are longer than --block_size={length - 1}: truncated')
    if len(found.spans) % 2:
        raise ValueError(f'--dataset={run.config["dataset"]}: pairs come in twos, and the number '
                         f'of conversations in {split} is odd')
    for pair in range(len(found.spans) // 2):
        prompts = [ids[:mask.argmax()].tolist() for ids, mask, _ in texts(found, [pair])]
        if prompts[0] != prompts[1]:
            raise ValueError(f'--dataset={run.config["dataset"]}: the two conversations of pair '
                             f'{pair} in {split} do not begin alike: these are no pairs')
    return found


def draw_pairs(step, count, total, seed):
    """-> the numbers of the pairs of a step: each once an epoch, in an order of its own"""
    epochs, places = np.divmod(np.arange(step * count, (step + 1) * count), total)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(total)
              for epoch in set(epochs.tolist())}
    return [int(orders[epoch][place]) for epoch, place in zip(epochs, places, strict=True)]


def texts(split, pairs):
    """-> (ids, in play, weight) of both conversations of each pair"""
    return [(*split.conversation(2 * pair + i), 1.0) for pair in pairs for i in (0, 1)]


def log_probs(run, model, split, pairs, batch_pairs):
    """-> log p of both conversations of each pair: (pairs, 2)"""
    found = []
    for i in range(0, len(pairs), batch_pairs):
        x, y, _ = pad(texts(split, pairs[i:i + batch_pairs]))
        found.append(run.log_probs(model, x, y).sum(1).view(-1, 2))
    return torch.cat(found)
