"""
Text to tokens and back: a token for each character, GPT-2's byte pairs, those that
extras/train_tokenizer.py learned, those of a published model, or the words of a small world. What
they are made from is in data/vocabulary.py.

Special tokens come only from the program, or from encode(..., special=[names]): in ordinary text
their names are letters.
"""
import re
import unicodedata

from data.detokenizer import Detokenizer
from data.vocabulary import SPECIAL, TEMPLATES, check_spec, encoding_of, size_of


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
