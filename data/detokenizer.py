"""Ids to text for people, while they come."""
import codecs


class Detokenizer:
    """Ids to text for people, as they come: whole characters, a tool call as [48/2 = 24]."""

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.text, self.given, self.seen = '', 0, 0     # characters given out, ids seen
        self.calling, self.stopped = False, False

    def push(self, ids, last=False):
        """All ids so far -> the text that is new; what may become a stop text is held back."""
        names = {i: name for name, i in self.tokenizer.special.items()}
        for token in ids[self.seen:]:
            if token in names:
                marks = {'<|call|>': '[', '<|result|>': ' = ' if self.calling else ']'}
                self.text += marks.get(names[token], '')
                self.calling = names[token] == '<|call|>'
            else:
                self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
        self.seen = len(ids)
        if last:
            self.text += self.decoder.decode(b'', True)
        found = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if found:
            self.text, self.stopped = self.text[:min(found)], True
        held = 0 if last or self.stopped else max(map(len, self.stop), default=1) - 1
        end = max(self.given, len(self.text) - held)
        piece, self.given = self.text[self.given:end], end
        return piece
