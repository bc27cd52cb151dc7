"""
The tokenizer of a published model: its tokenizer.json becomes a plain dict of data/vocabulary.py,
and tiktoken goes on with it. Byte-level BPE (Llama 3, Qwen, SmolLM2, GPT-2) is read; SentencePiece
(Llama 2, Mistral's first ones) is not.
"""
import json
import re
from pathlib import Path

from data.vocabulary import PATTERNS, TEMPLATES


def byte_characters():
    """-> {character: byte}: GPT-2's way to write bytes as characters that can be seen"""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)}


def pattern_of(pre_tokenizer):
    """-> the name in PATTERNS of how a tokenizer.json splits text before it merges bytes"""
    steps = (pre_tokenizer or {}).get('pretokenizers', [pre_tokenizer or {}])
    kinds = [step.get('type') for step in steps]
    if any(step.get('add_prefix_space') or step.get('invert') for step in steps):
        raise ValueError('add_prefix_space and invert are not known')
    if kinds == ['ByteLevel'] and steps[0].get('use_regex', True):
        return 'gpt2'
    if kinds == ['Digits', 'ByteLevel'] and steps[0]['individual_digits']:
        return 'digits'
    if (kinds == ['Split', 'ByteLevel'] and steps[0].get('behavior') == 'Isolated'
            and not steps[1].get('use_regex', True)):
        for name, pattern in PATTERNS.items():
            if steps[0]['pattern'].get('Regex') == pattern:
                return name
    raise ValueError(f'it splits text in a way that is not known ({", ".join(map(str, kinds))})')


def template_of(chat, special):
    """A chat template in Jinja ('': none) -> the name in TEMPLATES of one with the same tokens.
    What else a template may say, such as a system prompt by default, is left out."""
    for name, parts in TEMPLATES.items():
        needed = set(re.findall(r'<\|\w+\|>', parts[1] + parts[2]))
        kin = {token for token in special if token.startswith('<|im_') and token in chat}
        if parts[2] in chat and needed <= special.keys() | {'<|{role}|>'} and (
                name != 'chatml' or kin <= needed):
            return name
    return ''


def spec_of(theirs, settings, chat):
    """A tokenizer.json and its tokenizer_config.json as dicts, a chat template ('': none)
    -> the spec of a Tokenizer. ValueError"""
    model, normalizer = theirs['model'], theirs.get('normalizer')
    if model.get('type') != 'BPE' or model.get('byte_fallback'):
        raise ValueError('no byte-level BPE: SentencePiece and others are not read')
    if normalizer and normalizer.get('type') != 'NFC':
        raise ValueError(f'a normalizer that is not known: {normalizer.get("type")}')
    pattern, characters = pattern_of(theirs['pre_tokenizer']), byte_characters()
    vocab = model['vocab']
    special = {token['content']: token['id'] for token in theirs['added_tokens']}
    merges = [pair if isinstance(pair, list) else pair.split(' ') for pair in model['merges']]
    ranks = [vocab[''.join(pair)] for pair in merges]
    if ranks != sorted(ranks):
        raise ValueError('its merges are not in the order of its ids, as tiktoken wants them')
    ids = {''.join(chr(characters[c]) for c in text): i for text, i in vocab.items()
           if text not in special}

    def name_of(key):
        token = settings.get(key) or ''
        return token['content'] if isinstance(token, dict) else token

    begin = name_of('bos_token')
    begins = begin and repr(begin) in str(theirs.get('post_processor'))
    return {'kind': 'open', 'pattern': pattern, 'ids': ids, 'special': special,
            'template': template_of(chat, special), 'begin': begin if begins else '',
            'end': name_of('eos_token'), 'nfc': bool(normalizer),
            'shown': [token['content'] for token in theirs['added_tokens']
                      if not token.get('special')]}


def read_spec(folder):
    """A model's folder -> the spec of its Tokenizer. ValueError says what is wrong with it"""
    folder, found = Path(folder), {}
    for name in 'tokenizer.json', 'tokenizer_config.json':
        if (folder / name).exists():
            try:
                found[name] = json.loads((folder / name).read_text(encoding='utf-8'))
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{folder / name}: damaged ({error})') from None
    if 'tokenizer.json' not in found:
        raise ValueError(f'{folder}: no tokenizer.json there')
    settings = found.get('tokenizer_config.json', {})
    try:
        chat, path = str(settings.get('chat_template') or ''), folder / 'chat_template.jinja'
        if path.exists():
            chat = path.read_text(encoding='utf-8')
        return spec_of(found['tokenizer.json'], settings, chat)
    except ValueError as error:
        raise ValueError(f'{folder}/tokenizer.json: {error}') from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{folder}/tokenizer.json: damaged ({type(error).__name__}: {error})'
                         ) from None
