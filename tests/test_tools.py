"""The calculator against Python's own arithmetic, and against whatever a model may write."""

import random
import re
import time
from fractions import Fraction

import pytest
from conftest import TEXT

from data.detokenizer import Detokenizer
from data.tokenizer import Tokenizer
from data.tools import calculate, calculator, calls_in


@pytest.mark.parametrize(
    'expression, result',
    [
        ('48/2', '24'),
        (' 48+24 ', '72'),
        ('0.1+0.2', '0.3'),
        ('2**10', '1024'),
        ('2**-1', '0.5'),
        ('7//2*2+7%2', '7'),
        ('-3--3', '0'),
        ('(1+2)*3', '9'),
        ('1/3', '0.3333333333'),
        ('1_000*2', '2000'),
        ('(7//2)/(5//2)', '1.5'),
        ('(7//2)**-1*3', '1'),
        ('12345678901/2', '6172839450.5'),
        ('10**28/3', '3' * 28 + '.3333333333'),
        ('10**12/7', '142857142857.1428571429'),
        ('2/3', '0.6666666667'),
        ('1/300', '0.003333333333'),
        ('1/2**20', '0.00000095367431640625'),
        ('1/8**3', '0.001953125'),
        ('-7//2', '-4'),
        ('"strawberry".count("r")', '3'),
        ("'ab ab'.count('ab')+1", '3'),
        ('"日本日本".count("日本")', '2'),
        ('9' * 30, '9' * 30),
        ('(' * 99 + '1' + ')' * 99, '1'),
        ('-' * 198 + '1', '1'),
    ],
)
def test_what_it_can_compute(expression, result):
    assert calculate(expression) == result


def test_it_agrees_with_exact_arithmetic():
    rng = random.Random(0)
    for _ in range(300):
        numbers = [rng.randint(1, 99) for _ in range(4)]
        text = str(numbers[0]) + ''.join(rng.choice('+-*/') + str(n) for n in numbers[1:])
        parts = re.findall(r'\d+|\D', text)
        exact = eval(''.join(f'Fraction({t})' if t.isdigit() else t for t in parts))
        got = Fraction(calculate(text))
        assert abs(got - exact) <= abs(exact) * Fraction(1, 10**9), text


def test_a_quotient_is_exact_if_its_digits_end_and_else_rounded_at_the_tenth():
    rng = random.Random(1)
    pairs = [(p, q) for p in range(1, 60) for q in range(1, 60)]
    pairs += [(rng.randrange(10 ** rng.randint(1, 29)), rng.randrange(1, 10 ** rng.randint(1, 29)))
              for _ in range(3000)]  # fmt: skip
    for p, q in pairs:
        exact, text = Fraction(p, q), calculate(f'{p}/{q}')
        ends = exact.denominator
        for prime in 2, 5:
            while ends % prime == 0:
                ends //= prime
        if ends == 1:
            assert Fraction(text) == exact
        else:
            digits = text.partition('.')[2] if exact > 1 else text.lstrip('0.')
            unit = Fraction(1, 10 ** len(text.partition('.')[2]))
            assert len(digits) <= 10 and abs(Fraction(text) - exact) <= max(
                unit / 2, Fraction(1, 2 * 10**10) * min(exact, 1)), text  # fmt: skip


def test_calls_are_found_in_linear_time_in_a_long_text():
    for text in '[1+1 = 2]', '[' + 'a = ' * 25_000, '[' * 100_000, '[a = b]' * 15_000:
        began = time.perf_counter()
        parts = calls_in(text)
        assert ''.join(part['text'] for part in parts if part['type'] == 'text') in (text, '')
        assert time.perf_counter() - began < 2  # it took 11 s; no benchmark: a bound of safety


@pytest.mark.parametrize(
    'expression',
    [
        '',
        ' ',
        '9**9**9',
        '10**30',
        '2**0.5',
        '(-8)**(1/3)',
        '1/0',
        '0**-1',
        '1%0',
        '9' * 31,
        '1e400',
        '1e-40',
        '1' + '0' * 500,
        '(' * 150 + '1' + ')' * 150,
        '-' * 199 + 'x',
        '1' + '+1' * 99 + '+',
        '*'.join(['99999'] * 30),
        '+'.join(f'1/{p}' for p in range(101, 131)),
        '__import__("os").system("id")',
        'open("/etc/passwd").read()',
        '().__class__.__bases__',
        '"a".__class__',
        '"a".count',
        '"a".count()',
        '"a".count("")',
        '"a".count("a", 1)',
        '"a".count(*"a")',
        '"a".count(sub="a")',
        '"a" * 10**9',
        '"{0.__class__}".format(1)',
        '"a".join("b")',
        '"a"+"b"',
        '[1]*9**9',
        '[x for x in (1,)]',
        'lambda: 1',
        '(lambda: 1)()',
        'x',
        'x:=1',
        '(x:=1)',
        'True',
        '1 if 1 else 2',
        '1 < 2',
        '1 and 2',
        '~1',
        '1 << 99999',
        '1j',
        'f"{1}"',
        'b"a".count(b"a")',
        '1;2',
        'import os',
        '1\n2',
        'a\x00b',
        '\ud800',
        '"\\d".counts("d")',
        '1,000',
        '{}',
        '...',
        'None',
        'await 1',
        'yield 1',
        'abs(-1)',
        'round(2.5)',
        '１+１x',
    ],
)
def test_anything_else_is_an_error_at_once(expression):
    began = time.perf_counter()
    text = calculate(expression)
    assert text.startswith('error: ') and len(text) < 100 and '\n' not in text
    assert time.perf_counter() - began < 0.5


def test_no_text_whatever_raises():
    rng = random.Random(1)
    alphabet = '0123456789.+-*/%()"\'ecount[]{}<>=,:;\\ \n\t_xé日\x00\ud800'
    for _ in range(5000):
        text = ''.join(rng.choice(alphabet) for _ in range(rng.randint(0, 40)))
        assert isinstance(calculate(text), str)


def test_a_call_is_answered_and_a_malformed_one_gets_an_error_to_read(bpe):
    for tokenizer in Tokenizer.of_text(TEXT + '0123456789+-*/()error: no call'), bpe:
        tool, special = calculator(tokenizer), tokenizer.special
        call, result = special['<|call|>'], special['<|result|>']

        def written(*parts, tokenizer=tokenizer):
            return [i for p in parts for i in (tokenizer.encode(p) if isinstance(p, str) else [p])]

        assert tool(written('To ', call, '6*7')) == []
        first = written('To ', call, '6*7', result)
        assert tool(first) == written('42', result)
        again = first + tool(first) + written(' and ', call, '1/0', result)
        assert tokenizer.decode(tool(again)[:-1]).startswith('error: di')
        for bad in written(result), first + tool(first) + [result]:
            assert tokenizer.decode(tool(bad)[:-1]).startswith('error: no call')
        nested = written(call, '1+', call, '2+2', result)
        assert tool(nested) == written('4', result)


def test_what_people_saw_of_an_answer_becomes_its_calls_again():
    tokenizer = Tokenizer.of_text('\n' + ''.join(map(chr, range(32, 127))))
    talk = [
        {'role': 'user', 'content': 'what is [1+1 = 2]?'},
        {
            'role': 'assistant',
            'content': [
                {'type': 'text', 'text': 'It is '},
                {'type': 'call', 'text': '48/2'},
                {'type': 'result', 'text': '24'},
                {'type': 'text', 'text': ', so [a = b] and [1+1 = 3]\n'},
                {'type': 'call', 'text': '"berry".count("r")'},
                {'type': 'result', 'text': '2'},
            ],
        },
    ]
    ids, in_play = tokenizer.render(talk)
    seen = Detokenizer(tokenizer).push(ids[in_play.index(1) :], last=True)
    again = [talk[0], {'role': 'assistant', 'content': calls_in(seen)}]
    assert tokenizer.render(again) == (ids, in_play)
    assert calls_in('plain') == [{'type': 'text', 'text': 'plain'}]
