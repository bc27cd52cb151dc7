"""
Text to tokens and back: a token for each character, GPT-2's byte pairs, those that
extras/train_tokenizer.py learned, those of a published model, or the words of a small world (all
but the first by tiktoken).

A tokenizer is a plain dict, small enough to travel in a checkpoint:
    {'kind': 'char', 'chars': '\\n !,...', 'special': ['<|endoftext|>', ...]}
    {'kind': 'gpt2'}
    {'kind': 'bpe', 'pattern': "[^\\r\\n...", 'tokens': [' t', 'he', ...]}
    {'kind': 'words', 'words': [' has', 'Anna', ...]}
    {'kind': 'open', 'pattern': ..., 'ids': {'a': 64, ...}, 'special': {'<|im_end|>': 151645, ...},
     'template': 'chatml', 'begin': '', 'end': '<|endoftext|>', 'nfc': True}
A token of bpe and of open is a text of characters 0 to 255, its bytes; 0 to 255 of bpe are bytes.
Special tokens come only from the program, or from encode(..., special=[names]): in ordinary text
their names are letters.
"""
import functools
import re
import unicodedata

from data.detokenizer import Detokenizer

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


class Tokenizer:

    def __init__(self, spec):
        check_spec(spec)
        self.spec = spec
        if spec['kind'] != 'char':
            self.bpe = encoding_of(spec)
            is_open = spec['kind'] == 'open'
            self.vocab_size = size_of(spec) if is_open else self.bpe.n_vocab
            self.special = {
                name: i for name, i in spec['special'].items() if name not in spec.get('shown', ())
            } if is_open else {name: self.bpe.encode_single_token(name) for name in SPECIAL}
        else:
            self.bpe = None
            self.chars = {c: i for i, c in enumerate(spec['chars'])}
            self.special = {name: len(self.chars) + i for i, name in enumerate(spec['special'])}
            self.vocab_size = len(self.chars) + len(self.special)
            self.names = list(spec['chars']) + spec['special']
        self.template = TEMPLATES[spec.get('template') or 'own']
        if spec['kind'] == 'open':      # what the program calls <|endoftext|> and <|end|>
            own = {'<|endoftext|>': spec['end'], '<|end|>': spec['template'] and self.template[2]}
            self.special = {name: spec['special'][theirs] for name, theirs in own.items()
                            if theirs} | self.special

    @classmethod
    def of_text(cls, text):
        """The character tokenizer of a text: its characters in order, then the special tokens."""
        return cls({'kind': 'char', 'chars': ''.join(sorted(set(text))), 'special': SPECIAL})

    @classmethod
    def of_words(cls, text):
        """A token for each word (and ####) of a text, with its leading space; capitalized words get
        one without it too, to begin a text."""
        words = set(re.findall('[A-Za-z]{2,}|#+', text))
        return cls({'kind': 'words', 'words': sorted(
            {' ' + word for word in words} | {word for word in words if word[0].isupper()})})

    @property
    def dtype(self):
        """The dtype of its token files."""
        return 'uint16' if self.vocab_size <= 2 ** 16 else 'uint32'

    @property
    def begin(self):
        """The ids that begin a document: of an empty prompt."""
        return self.prefix or [self.special.get('<|endoftext|>', 0)]

    @property
    def prefix(self):
        """The ids that a published model wants before any text."""
        begin = self.spec.get('begin')
        return [self.spec['special'][begin]] if begin else []

    @property
    def end(self):
        """The id that ends a document; None where there is none, as in nanoGPT's characters."""
        return self.special.get('<|endoftext|>')

    @property
    def ends(self):
        """The ids that end what is written, as a tuple."""
        return () if self.end is None else (self.end,)

    def encode(self, text, special=()):
        """text -> ids. special: names of special tokens that become those tokens in it."""
        if self.spec.get('nfc'):
            text = unicodedata.normalize('NFC', text)
        if self.bpe:
            ids = self.bpe.encode(text, allowed_special=set(special), disallowed_special=())
            return ids if max(ids, default=0) < self.vocab_size else [
                i for i in ids if i < self.vocab_size]
        special = [name for name in special if name in self.special]
        parts = re.split('(' + '|'.join(map(re.escape, special)) + ')', text) if special else [text]
        ids = ([self.special[p]] if p in special else map(self._char, p) for p in parts)
        return [i for part in ids for i in part]

    def drop_unknown(self, text):
        """text without the characters that this vocabulary lacks."""
        return text if self.bpe else ''.join(c for c in text if c in self.chars)

    def render(self, messages, reply=False):
        """
        A conversation -> ids, in play: 1 for what the assistant had to write, its <|end|> too.

        messages: [{'role': system, user or assistant, 'content': text}, ...]; an assistant's
        content may be a list of parts: {'type': text, call or result, 'text': text}. reply=True
        opens the assistant's answer. No text becomes a special token. ValueError: what is wrong.
        """
        begin = self.encode(self.template[0], self.special)
        turns = [(begin, [0] * len(begin)), *map(self.render_turn, messages)]
        opening = self.opening('assistant') if reply else []
        return ([i for ids, _ in turns for i in ids] + opening,
                [i for _, in_play in turns for i in in_play] + [0] * len(opening))

    def opening(self, role):
        """-> the ids that begin a message"""
        return self.encode(self.template[1].format(role=role), self.special)

    def render_turn(self, message):
        """-> the ids of a message, and in play as in render()"""
        ids, in_play, special = [], [], self.special

        def add(new, mine):
            ids.extend(new)
            in_play.extend([int(mine)] * len(new))

        role, content = message['role'], message['content']
        if '<|end|>' not in special:
            raise ValueError('this vocabulary has no chat tokens')
        if role not in ('system', 'user', 'assistant'):
            raise ValueError(f'a message of role {role!r}: only system, user and assistant')
        mine = role == 'assistant'
        add(self.opening(role), False)
        if isinstance(content, str):
            content = [{'type': 'text', 'text': content}]
        for part in content:
            text = self.encode(part['text'])
            if part['type'] == 'text':
                add(text, mine)
            elif part['type'] == 'call' and mine and '<|call|>' in special:
                add([special['<|call|>'], *text, special['<|result|>']], True)
            elif part['type'] == 'result' and mine and '<|result|>' in special:
                add([*text, special['<|result|>']], False)
            else:
                raise ValueError(f'a part of type {part["type"]!r} in a message of role {role}')
        add([special['<|end|>']], mine)
        add(self.encode(self.template[3]), False)
        return ids, in_play

    def fit(self, turns, room):
        """
        turns: lists of ids, the first one the system's or empty -> prompt of at most room ids,
        number of turns left out. The oldest go first, a question with its answer; of the last one
        alone, if it is too long, the end is kept.
        """
        begin, reply = self.encode(self.template[0], self.special), self.opening('assistant')
        head, rest = [*begin, *turns[0]][:room // 2], turns[1:]
        room, kept = room - len(head) - len(reply), len(rest)
        while kept > 2 and sum(map(len, rest[-kept:])) > room:
            kept -= 2
        tail = sum(rest[-kept:], [])[-max(room, 1):]
        return [*head, *tail, *reply], len(rest) - kept

    def _char(self, c):
        if c not in self.chars:
            near = sorted(self.chars, key=lambda known: abs(ord(known) - ord(c)))[:5]
            raise ValueError(f'the character {c!r} (U+{ord(c):04X}) is none of {len(self.chars)} '
                             f'that this model has seen; the nearest are {"".join(near)!r}')
        return self.chars[c]

    def token_bytes(self, token):
        """One id -> its bytes, maybe part of a character; those of U+FFFD beyond the vocabulary."""
        if not 0 <= token < self.vocab_size:
            return '\ufffd'.encode()
        if self.bpe is None:
            return self.names[token].encode()
        try:
            return self.bpe.decode_single_token_bytes(token)
        except KeyError:    # a published vocabulary may have gaps
            return '\ufffd'.encode()

    def decode(self, ids):
        return b''.join(map(self.token_bytes, ids)).decode('utf-8', errors='replace')

    def transcript(self, ids):
        """ids -> the text that people see of an answer"""
        return Detokenizer(self).push(ids, last=True)

    def byte_lengths(self):
        """-> list: how many bytes of text each token stands for, 0 for a special token."""
        special = set(self.special.values())
        return [0 if i in special else len(self.token_bytes(i)) for i in range(self.vocab_size)]
