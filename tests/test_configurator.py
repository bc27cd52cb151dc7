"""Settings: layers, exact types with sensible coercion, and refusals in one line."""

import pytest

from configurator import coerce, configure

SCRIPT = '''
"""A script."""
import math
batch_size = 12      # rows # in a batch; from 1 to 100
learning_rate = 6e-4
shift = -1
compile: bool = None # None: where it pays
out_dir = 'out'      # where '#' goes
decay = True
CONSTANT = {}

def main():
    inner = 1
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    names = {'__file__': str(path)}
    exec(compile(SCRIPT, str(path), 'exec'), names)
    return names


def test_the_last_layer_wins_and_is_named(script, tmp_path):
    layer = tmp_path / 'layer.py'
    layer.write_text(
        'import time\n_note = "not a setting"\nbatch_size = 3\nout_dir = "run-" + str(2)\n'
    )
    _, origin = configure(script, [str(layer), '--batch_size=5', '--decay=False'])
    assert (script['batch_size'], script['out_dir'], script['decay']) == (5, 'run-2', False)
    assert origin == {'batch_size': 'command line', 'out_dir': str(layer), 'decay': 'command line'}


@pytest.mark.parametrize(
    'text, kind, value',
    [
        ('1', float, 1.0),
        ('1e3', int, 1000),
        ('-1', int, -1),
        ('-2.5', float, -2.5),
        ('true', bool, True),
        ('1', bool, True),
        ('0', bool, False),
        ('False', bool, False),
        ('a=b', str, 'a=b'),
        ('12', str, '12'),
        ('', str, ''),
        (3, float, 3.0),
        (2.0, int, 2),
        (True, bool, True),
        ('9007199254740993', int, 9007199254740993),
    ],
)
def test_values_become_the_type_of_the_default(text, kind, value):
    assert coerce(text, kind) == value and type(coerce(text, kind)) is kind


@pytest.mark.parametrize(
    'text, kind',
    [
        ('0.5', int),
        ('x', int),
        ('x', float),
        ('nan', float),
        ('inf', int),
        ('inf', float),
        ('-1e999', float),
        ('maybe', bool),
        ('2', bool),
        (True, int),
        (True, float),
        (1, str),
        (None, int),
        ([], float),
        ('', int),
    ],
)
def test_a_value_of_another_type_is_refused(text, kind):
    with pytest.raises((ValueError, TypeError, OverflowError)):
        coerce(text, kind)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--batch_sise=3'], 'did you mean batch_size?'),
        (['--batch=3'], 'did you mean batch_size?'),
        (['--lr=3'], 'did you mean learning_rate?'),
        (['--learning_rate=inf'], 'is not of type float'),
        (['--batch_size=many'], "batch_size='many' is not of type int"),
        (['--batch_size=0'], 'must be from 1 to 100'),
        (['--batch_size=101'], 'must be from 1 to 100'),
        (['--CONSTANT=1'], 'no such setting'),
        (['--inner=1'], 'no such setting'),
        (['--batch_size'], 'expected --key=value'),
        (['-x=1'], '--key=value'),
        (['missing.py'], 'missing.py: no such config file'),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(script, arguments, words):
    with pytest.raises(ValueError) as refusal:
        configure(script, arguments)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


@pytest.mark.parametrize(
    'source, words',
    [
        ('1 / 0', 'ZeroDivisionError'),
        ('batch_size =', 'SyntaxError'),
        ('batch_sizes = 3', 'did you mean batch_size?'),
        ('batch_size = "3x"', 'not of type int'),
        ('compile = 7', 'not of type bool'),
    ],
)
def test_a_config_file_that_fails_is_named(script, tmp_path, source, words):
    (tmp_path / 'bad.py').write_text(source)
    with pytest.raises(ValueError, match='bad.py') as refusal:
        configure(script, [str(tmp_path / 'bad.py')])
    assert words in str(refusal.value)


def test_a_value_may_hold_an_equals_sign_and_a_minus(script):
    configure(script, ['--out_dir=a=b', '--shift=-7', '--learning_rate=1', '--compile=True'])
    assert (script['out_dir'], script['shift'], script['learning_rate'], script['compile']) == (
        'a=b',
        -7,
        1.0,
        True,
    )


def test_help_is_made_from_the_comments(script, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(script, ['--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert '--batch_size=12' in text and 'rows # in a batch' in text and "where '#' goes" in text
    assert 'inner' not in text and 'CONSTANT' not in text
