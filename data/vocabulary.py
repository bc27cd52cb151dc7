"""
What a tokenizer is: a plain dict, small enough to travel in a checkpoint.

    {'kind': 'char', 'chars': '\\n !,...', 'special': ['<|endoftext|>', ...]}
    {'kind': 'gpt2'}
    {'kind': 'bpe', 'pattern': "[^\\r\\n...", 'tokens': [' t', 'he', ...]}
    {'kind': 'words', 'words': [' has', 'Anna', ...]}
    {'kind': 'open', 'pattern': ..., 'ids': {'a': 64, ...}, 'special': {'<|im_end|>': 151645, ...},
     'template': 'chatml', 'begin': '', 'end': '<|endoftext|>', 'nfc': True, 'shown': []}

A token of bpe and of open is a text of characters 0 to 255, its bytes; 0 to 255 of bpe are bytes.
All kinds but the first are encoded by tiktoken.
"""
import functools

SPECIAL = ['<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|call|>', '<|result|>',
           '<|end|>']
SPECS = {'char': {'chars': str, 'special': list}, 'gpt2': {}, 'words': {'words': list},
         'bpe': {'pattern': str, 'tokens': list},
         'open': {'pattern': str, 'ids': dict, 'special': dict, 'template': str, 'begin': str,
                  'end': str}}
# What a token of bpe may be part of. As in GPT-4's cl100k, but for marks, which belong to words (in
# Hindi and pointed Arabic a word would end at each one); digits, which stand alone, so that equal
# places look equal to arithmetic; and English contractions, which need no rule.
PATTERN = '|'.join([
    r'[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+',  # a word, with the space or sign before it
    r'\p{N}',                            # a digit
    r' ?[^\s\p{L}\p{N}]+[\r\n]*',        # signs, with the space before and the line ends behind
    r'\s*[\r\n]+',                       # line ends, with the spaces before
    r'\s+(?!\S)',                        # spaces, but the one before a word
    r'\s+'])
WORDS = r' ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s'    # the same in the small world
# Those of published models: GPT-2's, SmolLM2's (digits alone), Llama 3's, Qwen's.
_WORDS, _SIGNS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|", r" ?[^\s\p{L}\p{N}]+"
_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PATTERNS = {
    'own': PATTERN, 'words': WORDS,
    'gpt2': _WORDS + r' ?\p{N}+|' + _SIGNS + r'|\s+(?!\S)|\s+',
    'digits': _WORDS + r'\p{N}|' + _SIGNS + r'|\s+(?=\p{N})|\s+(?!\S)|\s+',
    'llama3': _CASED + r'\p{N}{1,3}|' + _SIGNS + r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+',
    'qwen': _CASED + r'\p{N}|' + _SIGNS + r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'}
# How a conversation is written: what begins it, a message, what ends one and what is behind that.
TEMPLATES = {
    'chatml': ('', '<|im_start|>{role}\n', '<|im_end|>', '\n'),
    'llama3': ('<|begin_of_text|>', '<|start_header_id|>{role}<|end_header_id|>\n\n', '<|eot_id|>',
               ''),
    'own': ('<|endoftext|>', '<|{role}|>', '<|end|>', '')}


def check_spec(spec):
    """Raises ValueError unless spec describes a tokenizer, as above."""
    parts = SPECS.get(str(spec.get('kind'))) if isinstance(spec, dict) else None
    if parts is None:
        raise ValueError(f'a tokenizer of an unknown kind: not {", ".join(SPECS)}')
    for name, kind in parts.items():
        value = spec.get(name)
        if type(value) is not kind or not all(type(text) is str for text in value):
            raise ValueError(f'a {spec["kind"]} tokenizer whose {name} are damaged')
    if spec['kind'] == 'bpe':
        tokens = spec['tokens']
        if len(set(tokens)) < len(tokens) or any(len(t) < 2 or max(t) > '\xff' for t in tokens):
            raise ValueError('a bpe tokenizer whose tokens are damaged')
        if spec['pattern'] != PATTERN:      # which tiktoken runs: another one might take for ever
            raise ValueError('a bpe tokenizer with a pattern that this program does not know')
    if spec['kind'] == 'open':
        ids = [*spec['ids'].values(), *spec['special'].values()]
        _, _, end, _ = TEMPLATES.get(spec['template'] or 'own', [None] * 4)
        names = {name for name in (spec['begin'], spec['end'], spec['template'] and end) if name}
        if (spec['pattern'] not in PATTERNS or end is None or not names <= spec['special'].keys()
                or not all(type(i) is int and 0 <= i < 2 ** 24 for i in ids)
                or len(set(ids)) < len(ids) or not spec['ids']
                or any(max(text, default='\u0100') > '\xff' for text in spec['ids'])):
            raise ValueError('an open tokenizer whose parts are damaged')


def same_ids(*specs):
    """Whether two specs mean the same by each id that both know: one of characters may have fewer,
    as nanoGPT's, which have no special tokens."""
    if any(spec['kind'] != 'char' for spec in specs):
        return specs[0] == specs[1]
    return all(a == b for a, b in zip(*([*spec['chars'], *spec['special']] for spec in specs)))


@functools.cache
def gpt2_encoding():
    """GPT-2's byte pairs, with the chat tokens in ids 50257 and up, where its table is padding."""
    import tiktoken
    try:
        base = tiktoken.get_encoding('gpt2')
    except Exception as error:      # tiktoken's download may fail in requests, urllib3 or ssl
        raise ConnectionError(
            f"GPT-2's vocabulary is not cached and cannot be downloaded ({type(error).__name__}); "
            'set TIKTOKEN_CACHE_DIR to a cache from a machine that has it') from error
    chat = {name: base.n_vocab + i for i, name in enumerate(SPECIAL[1:])}
    return tiktoken.Encoding(
        'gpt2-chat', pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks,
        special_tokens={**base._special_tokens, **chat})


@functools.cache
def byte_encoding(pattern, tokens):
    """The bytes, these tokens (bytes too), then the special ones: what no token is, is spelled."""
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)}
    for token in tokens:    # one that is there twice would leave a gap, where special tokens begin
        ranks.setdefault(token, len(ranks))
    return tiktoken.Encoding('bytes', pat_str=pattern, mergeable_ranks=ranks, special_tokens={
        name: len(ranks) + i for i, name in enumerate(SPECIAL)})


def size_of(spec):
    """-> the number of ids of a published vocabulary, which may have gaps"""
    return max([*spec['ids'].values(), *spec['special'].values()]) + 1


def encoding_of(spec):
    """-> tiktoken's encoding of a tokenizer that is not of characters"""
    if spec['kind'] == 'gpt2':
        return gpt2_encoding()
    if spec['kind'] == 'open':
        import tiktoken
        ranks, size = {text.encode('latin-1'): i for text, i in spec['ids'].items()}, size_of(spec)
        for i in range(256):    # a byte that has no token: encode() leaves it out, as others do
            ranks.setdefault(bytes([i]), size + i)
        return tiktoken.Encoding('open', pat_str=PATTERNS[spec['pattern']], mergeable_ranks=ranks,
                                 special_tokens=spec['special'])
    if spec['kind'] == 'words':
        return byte_encoding(WORDS, tuple(word.encode() for word in spec['words']))
    return byte_encoding(spec['pattern'], tuple(t.encode('latin-1') for t in spec['tokens']))
