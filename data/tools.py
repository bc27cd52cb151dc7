"""
The calculator that a model may call while it writes: <|call|>48/2<|result|>24<|result|>, where the
model writes up to the first <|result|> and the rest is appended for it.

What a model writes is parsed, never evaluated: a few kinds of nodes, numbers of bounded size.
"""
import ast
import operator
import re
import warnings
from decimal import Context, Decimal, localcontext
from fractions import Fraction

LENGTH, DIGITS = 200, 30    # of an expression, in characters; of a number


def power(base, exponent):
    if exponent.denominator != 1 or abs(exponent) * len(str(base)) > 10 * DIGITS:
        raise ValueError('this power is too large, or not whole')
    return base ** exponent.numerator


OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: power,
    ast.UAdd: operator.pos, ast.USub: operator.neg}


def value(node):
    """-> the exact Fraction that an expression's node stands for, or ValueError"""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            result = Fraction(str(number))      # 0.1 is a tenth, not the float next to it
        case ast.BinOp(left, op, right) if type(op) in OPERATIONS:
            result = Fraction(OPERATIONS[type(op)](value(left), value(right)))
        case ast.UnaryOp(op, operand) if type(op) in OPERATIONS:
            result = OPERATIONS[type(op)](value(operand))
        case ast.Call(ast.Attribute(ast.Constant(str() as text), 'count'),
                      [ast.Constant(str() as part)], []) if part:
            result = Fraction(text.count(part))
        case _:
            raise ValueError('only numbers, + - * / // % ** and "text".count("t")')
    if max(abs(result.numerator), result.denominator) >= 10 ** DIGITS:
        raise ValueError(f'a number of more than {DIGITS} digits')
    return result


def calculate(expression):
    """'48/2' -> '24', '"berry".count("r")' -> '2', all else -> 'error: ...'; never takes long."""
    if len(expression) > LENGTH:
        return f'error: longer than {LENGTH} characters'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')     # of odd escapes in strings
            result = value(ast.parse(expression.strip(), mode='eval').body)
    except ZeroDivisionError:
        return 'error: division by zero'
    except ValueError as error:
        return f'error: {error}'
    except (SyntaxError, MemoryError, RecursionError):
        return 'error: not an expression'
    with localcontext(Context(prec=5 * DIGITS)):
        decimal = Decimal(result.numerator) / result.denominator
        if 10 ** 100 * result.numerator % result.denominator:
            # Its digits never end: ten after the point, or if it is below 1, ten in all.
            decimal = round(decimal, max(10, 9 - decimal.adjusted()))
        return f'{decimal.normalize():f}'


def calls_in(text):
    """What people saw of an answer -> its parts for Tokenizer.render, the calls as calls again."""
    parts, told = [], 0
    for found in re.finditer(r'\[([^][]+)\]', text):
        call, _, result = found[1].rpartition(' = ')
        if call and calculate(call) == result:
            parts += [{'type': 'text', 'text': text[told:found.start()]},
                      {'type': 'call', 'text': call}, {'type': 'result', 'text': result}]
            told = found.end()
    return [*parts, {'type': 'text', 'text': text[told:]}]


def calculator(tokenizer):
    """-> the tool of a Request: what to append to the ids written so far, mostly nothing. None if
    there are no tokens to call it with, as in published models."""
    call, result = (tokenizer.special.get(name) for name in ('<|call|>', '<|result|>'))
    if call is None:
        return None

    def tool(ids):
        if ids[-1] != result:
            return []
        marks = [i for i, token in enumerate(ids[:-1]) if token in (call, result)]
        if not marks or ids[marks[-1]] != call:
            answer = 'error: no call'
        else:
            answer = calculate(tokenizer.decode(ids[marks[-1] + 1:-1]))
        return [*tokenizer.encode(tokenizer.drop_unknown(answer)), result]
    return tool
