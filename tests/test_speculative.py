"""Speculative decoding: greedily the very same text; else the model's own distribution."""

import itertools

import pytest
import torch
from conftest import FAMILIES, inside, tiny

from extras.speculative import look_up, speculate
from sample import Request, Sampling, generate

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 5, 6, 7, 5, 6]]
KINDS = [name for name in FAMILIES if name != 'windows']


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('lookahead', [1, 5])
@pytest.mark.parametrize('how', ['itself', 'another', 'text'])
def test_greedily_it_is_the_text_of_plain_decoding(name, lookahead, how):
    model = tiny(**FAMILIES[name])
    draft = {'itself': model, 'another': tiny(seed=1, n_layer=1), 'text': None}[how]
    greedy = Sampling(temperature=0.0)
    requests = [Request(prompt, 14 - i, greedy) for i, prompt in enumerate(PROMPTS)]
    counts = {}
    for _ in speculate(model, requests, draft, lookahead, counts):
        pass
    for i, request in enumerate(requests):
        assert request.ids == generate(model, [PROMPTS[i]], 14 - i, greedy)[0]
        assert request.reason == 'length' and len(request.logprobs) == len(request.ids)
    assert 0 <= counts['accepted'] <= counts['proposed']
    if how == 'itself':     # it proposes what it would write
        assert counts['accepted'] == counts['proposed'] > 0


@pytest.mark.parametrize('draft', ['small', 'text'])
@pytest.mark.parametrize('sampling', [Sampling(), Sampling(0.7, top_k=3), Sampling(1.5, top_p=0.8)])
def test_drawn_tokens_have_the_distribution_of_the_model(draft, sampling):
    """A chi-squared test of all texts of three tokens, against their exact probabilities."""
    from sample import probabilities

    model = tiny(vocab_size=4, block_size=12, vocab_multiple=1)
    small = tiny(seed=3, n_layer=1, vocab_size=4, block_size=12, vocab_multiple=1)
    prompt, count = [1, 2, 1, 2], 2500
    expected = {}
    for text in itertools.product(range(4), repeat=3):
        logits = model(torch.tensor([prompt + list(text)]))[0][0].detach()
        p = 1.0
        for i, token in enumerate(text):
            how = vars(sampling).values()
            p *= float(probabilities(logits[len(prompt) - 1 + i][None], *how)[0, token])
        expected[text] = count * p
    requests = [Request(prompt, 3, sampling, seed) for seed in range(count)]
    counts = {}
    for _ in speculate(model, requests, small if draft == 'small' else None, 2, counts):
        pass
    assert 0 < counts['accepted'] < counts['proposed']
    seen = dict.fromkeys(expected, 0)
    for request in requests:
        seen[tuple(request.ids)] += 1
    assert all(expected[text] > 0 for text in seen if seen[text])
    likely = [text for text in expected if expected[text] >= 5]
    chi = sum((seen[text] - expected[text]) ** 2 / expected[text] for text in likely)
    freedom = max(1, len(likely) - 1)
    assert chi < freedom + 4 * (2 * freedom) ** 0.5      # about one run in ten thousand beyond


def test_it_ends_at_the_end_token_and_depends_on_its_seed_alone():
    model = tiny()
    alone = [Request([3], 15, Sampling(), 7)]
    list(speculate(model, alone))
    end = alone[0].ids[4]
    many = [Request([9, 9], 9, Sampling(), 1), Request([3], 15, Sampling(), 7, (end,))]
    list(speculate(model, many))
    cut = alone[0].ids.index(end) + 1
    assert many[1].ids == alone[0].ids[:cut] and many[1].reason == 'end'
    assert len(many[0].ids) == 9


def test_a_draft_may_have_another_table():
    for rows in 40, 60:     # of 50
        draft, prompt = tiny(seed=1, vocab_size=rows), [5, 6, 7]
        requests = [Request(prompt, 12, Sampling(temperature=0.0)), Request(prompt, 12, Sampling())]
        list(speculate(tiny(), requests, draft))
        assert requests[0].ids == generate(tiny(), [prompt], 12, Sampling(temperature=0.0))[0]
        assert len(requests[1].ids) == 12


def test_what_is_looked_up():
    assert look_up([1, 2, 3, 4, 1, 2], 2) == [3, 4]
    assert look_up([5, 1, 2, 3, 1, 2, 9, 1, 2], 3) == [9, 1, 2]     # the last time
    assert look_up([1, 2, 3], 2) == look_up([1], 2) == look_up([1, 1], 0) == []


def test_it_is_a_program_and_what_cannot_be_is_one_line(trained, tmp_path):
    common = [f'--out_dir={trained}', '--device=cpu', '--dtype=float32']
    text = inside('extras/speculative.py', *common, '--max_new_tokens=8', '--start=To be')
    assert 'proposals accepted' in text and 'To be' in text
    same = inside('extras/speculative.py', *common, f'--draft={trained}', '--max_new_tokens=8',
                  '--num_samples=2', '--temperature=0')  # fmt: skip
    assert same.count('---------------') == 2
    assert 'do not fit' in inside('extras/speculative.py', *common, '--max_new_tokens=99', ok=False)
    with pytest.raises(ValueError, match='sliding windows'):
        list(speculate(tiny(**FAMILIES['windows']), [Request([1], 3)]))
