"""Tokens and token files: round trips, hostile files, downloads that fail, web pages."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, TEXT, inside, run

from data import files, sources, web
from data.files import missing, mixture_of, read_meta, read_text
from data.sources import download, write_tokens
from data.tokenizer import Tokenizer
from data.tokens import Tokens
from data.vocabulary import PATTERN, SPECIAL, same_ids

BPE = {'kind': 'bpe', 'pattern': PATTERN, 'tokens': ['th', 'the']}
MIXED = 'naïve 🙂 سلام 你好 é'


def tokenizer_of(kind, text, bpe):
    return bpe if kind == 'gpt2' else getattr(Tokenizer, kind)(text)


@pytest.mark.parametrize('kind', ['of_text', 'of_words', 'gpt2'])
def test_decode_undoes_encode(kind, bpe):
    tokenizer = tokenizer_of(kind, MIXED, bpe)
    ids = tokenizer.encode(MIXED)
    assert tokenizer.decode(ids) == MIXED
    assert sum(tokenizer.byte_lengths()[i] for i in ids) == len(MIXED.encode())


@pytest.mark.parametrize('kind', ['of_text', 'of_words', 'gpt2'])
def test_special_tokens_come_only_from_the_operator(kind, bpe):
    text = 'a<|endoftext|>b<|user|>'
    tokenizer = tokenizer_of(kind, text, bpe)
    special = set(tokenizer.special.values())
    assert not special & set(tokenizer.encode(text))
    assert len(special & set(tokenizer.encode(text, special=tokenizer.special))) == 2
    assert tokenizer.decode(tokenizer.encode(text, special=tokenizer.special)) == text
    assert set(tokenizer.special) == set(SPECIAL)


@pytest.fixture(scope='session')
def learned(tmp_path_factory):
    """-> the folder of a vocabulary of 400 tokens that was learned from a text file."""
    pytest.importorskip('rustbpe')
    folder = tmp_path_factory.mktemp('bpe')
    (folder / 'a.txt').write_text(TEXT + 'é 你好 12 34 1234 ' * 50, encoding='utf-8')
    done = inside('extras/train_tokenizer.py', f'--source={folder}/*.txt', f'--out_dir={folder}',
                  '--vocab_size=300')  # fmt: skip
    assert f'300 tokens in {folder}/meta.json' in done
    return folder


def test_a_learned_vocabulary_loses_no_byte_of_any_text(learned):
    tokenizer = files.tokenizer_of(learned)
    assert tokenizer.vocab_size == 300 and tokenizer.dtype == 'uint16'
    known = [bytes([i]) for i in range(256)]
    known += [token.encode('latin-1') for token in tokenizer.spec['tokens']]
    assert [tokenizer.token_bytes(i) for i in range(300 - len(SPECIAL))] == known
    assert tokenizer.byte_lengths() == [*map(len, known), *[0] * len(SPECIAL)]
    rng = np.random.default_rng(0)
    some = list('abcto be, \n\r\t 12345 <|end|>') + [chr(c) for c in rng.integers(32, 0xD800, 200)]
    for _ in range(500):
        text = ''.join(rng.choice(some, rng.integers(0, 60)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.special.values())
        assert sum(tokenizer.byte_lengths()[i] for i in ids) == len(text.encode())


def test_a_learned_vocabulary_is_that_of_the_bytes_and_keeps_digits_apart(learned):
    from extras.train_tokenizer import learn

    tokenizer = files.tokenizer_of(learned)
    texts = (learned / 'a.txt').read_text(encoding='utf-8').splitlines(True)
    assert learn(iter(texts), 300).spec == learn(iter(texts), 300).spec == tokenizer.spec
    assert learn(reversed(texts), 300).spec == tokenizer.spec
    assert [tokenizer.decode([i]) for i in tokenizer.encode('1234')] == list('1234')


def test_a_learned_vocabulary_is_that_of_byte_pairs_by_hand():
    """Of all neighbours the most frequent become a token, in words of their own."""
    pytest.importorskip('rustbpe')
    from extras.train_tokenizer import learn

    words = [[bytes([b]) for b in word.encode()] for word in ['abab'] * 5 + ['bab'] * 4 + ['ca']]
    merged = []
    for _ in range(3):
        pairs = [pair for word in words for pair in zip(word, word[1:])]
        best = max(sorted(set(pairs)), key=pairs.count)
        merged.append(b''.join(best))
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [merged[-1]]
    tokens = learn(iter(['abab\n'] * 5 + ['bab\n'] * 4 + ['ca']), 266).spec['tokens']
    assert [token.encode('latin-1') for token in tokens] == merged


def test_a_word_is_a_token_and_another_is_letters():
    tokenizer = Tokenizer.of_words('Anna has coins')
    assert tokenizer.spec['words'] == [' Anna', ' coins', ' has', 'Anna']
    said = [tokenizer.decode([i]) for i in tokenizer.encode('Anna has 12 pens, Anna')]
    assert said == ['Anna', ' has', ' ', '1', '2', ' ', 'p', 'e', 'n', 's', ',', ' Anna']


def test_a_word_listed_twice_is_no_way_to_a_special_token():
    tokenizer = Tokenizer({'kind': 'words', 'words': [' x', ' x', 'a', '<|end|>']})
    ids = tokenizer.encode('a x<|end|>')
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == 'a x<|end|>' and tokenizer.decode([97]) == 'a'


def test_an_unseen_character_is_named():
    with pytest.raises(ValueError, match=r"'€' \(U\+20AC\)"):
        Tokenizer.of_text('abc').encode('a€')
    with pytest.raises(ValueError, match="nearest are 'ÿþýüû'$"):   # of many, five
        Tokenizer.of_text(''.join(map(chr, range(32, 256)))).encode('€')


def test_an_id_beyond_the_vocabulary_decodes_to_a_replacement():
    assert Tokenizer.of_text('abc').decode([0, 999, -1]) == 'a\ufffd\ufffd'


def test_windows_are_the_tokens_and_span_no_two_files(tmp_path):
    for name, first, size in ('0', 0, 100), ('1', 1000, 50):
        np.arange(first, first + size, dtype=np.uint16).tofile(tmp_path / f'train_{name}.bin')
    tokens = Tokens(tmp_path, 'train')
    assert len(tokens) == 150
    windows = tokens.windows(np.array([0, 95, 100, 149]), 11)
    assert windows[:, 0].tolist() == [0, 89, 1000, 1039]
    assert (np.diff(windows) == 1).all()


@pytest.mark.parametrize('size', [9, 17, 33, 40])
def test_validation_covers_every_target_once(tmp_path, size):
    np.arange(size, dtype=np.uint16).tofile(tmp_path / 'val.bin')
    tokens = Tokens(tmp_path, 'val')
    starts, repeats = tokens.cover(8)
    windows = tokens.windows(starts, 9)
    seen = [y for row, repeat in zip(windows, repeats) for y in row[1:][repeat:]]
    assert sorted(seen) == list(range(1, size))


def test_reading_a_huge_file_keeps_memory_flat(tmp_path):
    """A sparse file of 20 GB, read all over: the process grows by far less than it has read."""
    with open(tmp_path / 'train.bin', 'wb') as file:
        file.truncate(20 * 10**9)
    code = (
        'import numpy as np, resource, sys; from data.tokens import Tokens;'
        't, rng = Tokens(sys.argv[1], "train"), np.random.default_rng(0);'
        'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;'
        't.windows(rng.integers(len(t) - 1025, size=64), 1025); before = peak();'
        '[t.windows(rng.integers(len(t) - 1025, size=64), 1025) for _ in range(30)];'
        'print(peak() - before)'
    )
    grown = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    kilobytes = int(grown.stdout) // (1024 if sys.platform == 'darwin' else 1)
    assert kilobytes < 3000  # 1,920 windows of 2 KB in pages of 4 KB or more would be 7,700


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', 'too few'),
        (b'\1\0' * 8 + b'\1', 'cut in the middle'),
        (b'\xff\xff' * 64, 'beyond the vocabulary'),
    ],
)
def test_a_damaged_token_file_is_named(tmp_path, content, words):
    (tmp_path / 'train.bin').write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Tokens(tmp_path, 'train', length=4).windows(np.array([0]), 4)


META = {
    'dtype': 'uint16',
    'vocab_size': 5,
    'tokenizer': {'kind': 'char', 'chars': 'abcde', 'special': []},
    'counts': {'train': 9},
    'sha256': {},
}


@pytest.mark.parametrize(
    'text, words',
    [
        (json.dumps({**META, **change}), words)
        for change, words in [
            ({'dtype': 'object'}, 'its dtype'),  # np.memmap would follow pointers from the file
            ({'dtype': 'float32'}, 'its dtype'),
            ({'dtype': ['uint16']}, 'its dtype'),
            ({'vocab_size': -1}, 'its vocab_size'),
            ({'vocab_size': '5'}, 'its vocab_size'),
            ({'vocab_size': True}, 'its vocab_size'),
            ({'tokenizer': None}, 'a tokenizer of an unknown kind'),
            ({'tokenizer': {'kind': []}}, 'a tokenizer of an unknown kind'),
            ({'tokenizer': {'kind': 'char', 'chars': 3, 'special': []}}, 'whose chars'),
            ({'tokenizer': {'kind': 'words', 'words': [1]}}, 'whose words'),
            ({'tokenizer': {**BPE, 'tokens': ['ab', 'ab']}}, 'whose tokens'),
            ({'tokenizer': {**BPE, 'tokens': ['a']}}, 'whose tokens'),
            ({'tokenizer': {**BPE, 'tokens': ['a\u0100']}}, 'whose tokens'),
            ({'tokenizer': {**BPE, 'pattern': '(a|a)*b'}}, 'a pattern that this program'),
            ({'counts': {'train': '9'}}, 'its counts'),
            ({'counts': []}, 'its counts'),
            ({'sha256': {'train': 3}}, 'its sha256'),
            ({'counts': 3, 'dtype': 0}, 'its dtype and counts'),
        ]
    ]
    + [(text, 'damaged') for text in ('', '[]', 'null', '3', '{}', '"x"', '[' * 100_000, '{"a":')],
    ids=lambda text: text[:60],
)
def test_every_part_of_meta_json_is_checked(tmp_path, text, words):
    (tmp_path / 'train.bin').write_bytes(bytes(18))
    (tmp_path / 'meta.json').write_text(json.dumps(META))
    assert len(Tokens(tmp_path, 'train')) == 9
    (tmp_path / 'meta.json').write_text(text)
    with pytest.raises(ValueError, match=f'meta.json: damaged.*{words}|meta.json: {words}'):
        Tokens(tmp_path, 'train')


def test_a_data_set_that_cannot_be_written_whole_is_left_as_it_was(tmp_path, monkeypatch):
    words = Tokenizer.of_words('to be')
    talk = [[{'role': 'user', 'content': 'to'}, {'role': 'assistant', 'content': 'be'}]]
    sources.write_conversations(tmp_path, words, 'x', {'more.json': b'1'}, train=talk, val=talk)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {
        'more.json', 'meta.json', 'train.bin', 'val.bin', 'train.mask.bin', 'val.mask.bin',
    }  # fmt: skip
    with pytest.raises(ValueError, match='no conversations for val'):
        sources.write_conversations(tmp_path, words, 'y', {'more.json': b'2'}, train=talk, val=[])
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(OSError, match='what was there before is intact'):
        sources.write_conversations(tmp_path, words, 'z', {'more.json': b'3'}, train=talk, val=talk)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    'script', ['1 / 0', 'def prepare(:', 'def prepare():\n    1 / 0', 'import sys; x = {}["a"]']
)
def test_a_prepare_py_of_ones_own_that_fails_is_named(tmp_path, script):
    (tmp_path / 'prepare.py').write_text(script)
    with pytest.raises(ValueError, match='prepare.py: (ZeroDivision|Syntax|Key)Error: '):
        files.find_data(str(tmp_path))


def test_verify_finds_a_byte_that_was_changed(tmp_path, dataset):
    shutil.copytree(dataset, tmp_path / 'copy')
    files.verify(tmp_path / 'copy')
    path = tmp_path / 'copy' / 'val.bin'
    path.write_bytes(path.read_bytes()[:-1] + b'\1')
    with pytest.raises(ValueError, match='val.bin: not what was written'):
        files.verify(tmp_path / 'copy')


def test_ids_that_two_tokenizers_of_characters_know_must_agree():
    ours = Tokenizer.of_text('abc').spec
    theirs = {'kind': 'char', 'chars': 'abc', 'special': []}
    assert same_ids(ours, theirs) and same_ids(theirs, ours) and same_ids(ours, ours)
    for other in [{**theirs, 'chars': 'abd'}, {**theirs, 'chars': 'abcd'}, {'kind': 'gpt2'}]:
        assert not same_ids(ours, other) and not same_ids(other, ours)


def test_a_file_cut_by_whole_tokens_is_named(tmp_path):
    (tmp_path / 'meta.json').write_text(json.dumps(META))
    (tmp_path / 'train.bin').write_bytes(bytes(16))
    with pytest.raises(ValueError, match='train has 8 tokens, 9 by its meta.json'):
        Tokens(tmp_path, 'train')


def test_uint32_tokens_without_a_meta_json_are_not_read_as_uint16(tmp_path):
    np.arange(1, 100, dtype=np.uint32).tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError, match='looks like uint32'):
        Tokens(tmp_path, 'train')


def test_a_nanogpt_folder_is_read_as_it_is(tmp_path):
    np.array([1, 2, 50256], dtype=np.uint16).tofile(tmp_path / 'train.bin')
    assert read_meta(tmp_path)['tokenizer'] == {'kind': 'gpt2'}
    with open(tmp_path / 'meta.pkl', 'wb') as file:
        pickle.dump({'vocab_size': 3, 'itos': dict(enumerate('abc')), 'stoi': {}}, file)
    assert Tokenizer(read_meta(tmp_path)['tokenizer']).encode('cab') == [2, 0, 1]


def test_a_pickle_that_carries_code_is_refused_unexecuted(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'exploded'),)

    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'itos': Bomb()}))
    with pytest.raises(ValueError, match='refused'):
        read_meta(tmp_path)
    assert not (tmp_path / 'exploded').exists()


def test_too_short_a_text_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match='too short'):
        write_tokens(tmp_path, Tokenizer.of_text('ab'), 'a note', train=[0, 1, 0], val=[])
    assert not list(tmp_path.iterdir())


class Reply:
    def __init__(self, content):
        self.content = content

    def raise_for_status(self):
        pass


def test_a_download_tries_the_second_source_and_checks_the_sum(tmp_path, monkeypatch):
    import hashlib

    import requests

    asked = []

    def get(url, timeout):
        asked.append((url, timeout))
        if url == 'http://first':
            raise requests.ConnectTimeout
        return Reply(b'good' if url == 'http://third' else b'bad')

    monkeypatch.setattr(requests, 'get', get)
    path = tmp_path / 'text'
    download(
        ['http://first', 'http://second', 'http://third'], path, hashlib.sha256(b'good').hexdigest()
    )
    assert path.read_bytes() == b'good' and [url for url, _ in asked] == [
        'http://first',
        'http://second',
        'http://third',
    ]
    assert all(0 < timeout < 120 for _, timeout in asked)
    with pytest.raises(ConnectionError, match='ConnectTimeout.*checksum differs'):
        download(
            ['http://first', 'http://second'],
            tmp_path / 'other',
            hashlib.sha256(b'good').hexdigest(),
        )
    assert [p.name for p in tmp_path.iterdir()] == ['text']


def test_shakespeare_is_prepared_from_a_local_file(tmp_path):
    from data.shakespeare_char.prepare import prepare

    (tmp_path / 'hamlet.txt').write_text(TEXT)
    prepare(str(tmp_path / 'hamlet.txt'), tmp_path)
    meta = read_meta(tmp_path)
    assert meta['counts'] == {
        'train': int(len(TEXT) * 0.9),
        'val': len(TEXT) - int(len(TEXT) * 0.9),
    }
    text = Tokenizer(meta['tokenizer']).decode(
        Tokens(tmp_path, 'val').windows(np.array([0]), 40)[0].tolist()
    )
    assert text == TEXT[int(len(TEXT) * 0.9) :][:40]


def test_pydocs_come_from_the_running_python_and_are_plain(tmp_path):
    from data.pydocs_char.prepare import prepare, read_texts

    texts = read_texts()
    assert len(texts) == len(set(texts)) > 1000
    assert any('Assignment statements are used to' in text for text in texts)
    assert not any(unicodedata.category(c) == 'Cc' and c != '\n' for text in texts for c in text)
    prepare(tmp_path)
    assert read_meta(tmp_path)['counts']['train'] > 500_000


def documents(folder, form, count=2500):
    rows = [
        {'text': f'this is the page {i} ' + 'words ' * (i % 7), 'url': 'x'} for i in range(count)
    ]
    if form == 'jsonl':
        (folder / 'pages.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / 'pages.parquet', row_group_size=500)
    return [row['text'] for row in rows]


@pytest.mark.parametrize('form', ['jsonl', 'parquet'])
def test_web_pages_become_shards_and_stopped_work_goes_on(tmp_path, form, bpe, monkeypatch):
    texts = documents(tmp_path, form)
    monkeypatch.setattr(web, 'GROUPS', 1)
    monkeypatch.setattr(
        web.multiprocessing, 'Pool', SerialPool
    )  # a child would not know the tiny vocabulary
    out, source = tmp_path / 'out', f'{tmp_path}/pages.{form}'
    out.mkdir()
    web.prepare_web(out, '', '', '', source, '', 50, 1, 1)
    first = out / 'train_0000_0000.bin'
    assert [p.name for p in sorted(out.glob('train*'))] == [first.name]
    stamp = first.stat().st_mtime_ns
    (out / 'train_0000_0001.tmp').write_bytes(b'half')  # what a kill may leave
    web.prepare_web(out, '', '', '', source, '', 50, 0, 1)
    assert first.stat().st_mtime_ns == stamp
    written = [
        bpe.decode([i for i in np.fromfile(path, np.uint16).tolist()])
        for path in sorted(out.glob('*_*.bin'))
    ]
    pages = [page for shard in written for page in shard.split('<|endoftext|>')[1:]]
    assert sorted(pages) == sorted(texts)
    held_out = sum(path.stat().st_size for path in out.glob('val*')) / sum(
        p.stat().st_size for p in out.glob('*.bin')
    )
    assert 0.01 < held_out < 0.04 and is_sha(read_meta(out)['sha256'])
    with pytest.raises(ValueError, match='begun from'):
        web.prepare_web(out, '', '', '', f'{tmp_path}/*', '', 50, 0, 1)


def test_pages_are_written_in_a_learned_vocabulary_and_go_on_with_no_other(
    tmp_path, learned, monkeypatch
):
    documents(tmp_path, 'jsonl', 50)
    monkeypatch.setattr(web.multiprocessing, 'Pool', SerialPool)
    arguments = tmp_path / 'out', '', '', '', f'{tmp_path}/pages.jsonl'
    web.prepare_web(*arguments, str(learned), 10, 0, 1)
    meta, tokenizer = read_meta(tmp_path / 'out'), files.tokenizer_of(learned)
    assert meta['tokenizer'] == tokenizer.spec and meta['vocab_size'] == 300
    ids = np.fromfile(tmp_path / 'out' / 'val_0000_0000.bin', meta['dtype']).tolist()
    assert tokenizer.decode(ids).startswith('<|endoftext|>this is the page 0 ')
    with pytest.raises(ValueError, match='begun from'):
        web.prepare_web(*arguments, '', 10, 0, 1)
    with pytest.raises(ValueError, match='--tokenizer=/nowhere: there is no /nowhere/meta.json'):
        web.prepare_web(*arguments, '/nowhere', 10, 0, 1)


def test_a_text_file_is_a_document_for_every_thousand_lines(tmp_path, learned, monkeypatch):
    monkeypatch.setattr(web, 'LINES', 2)
    (tmp_path / 'a.txt').write_bytes('one\ntwo\nthrée\n'.encode())
    groups = web.groups_of(f'{tmp_path}/a.txt')
    assert [web.texts_of(f'{tmp_path}/a.txt', g) for g in groups] == [['one\ntwo\n'], ['thrée\n']]
    (tmp_path / 'a.txt').write_bytes(b'one\ntwo\nthr\xe9e\n')
    with pytest.raises(ValueError, match='a.txt: not UTF-8 at byte 11'):
        web.texts_of(f'{tmp_path}/a.txt', groups[1])


def test_a_wrong_source_of_pages_names_its_line_and_leaves_nothing(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(web.multiprocessing, 'Pool', SerialPool)
    good = json.dumps({'text': 'one page'})
    for bad in '{"text":', '{"texts": ""}', '[]', '{"text": null}', '\udcff':
        lines = '\ufeff' + '\n'.join([good, bad, good])
        (tmp_path / 'pages.jsonl').write_bytes(lines.encode('utf-8', 'surrogateescape'))
        with pytest.raises(ValueError, match=r'pages.jsonl: line 2 after byte 0: '):
            web.prepare_web(tmp_path / 'out', '', '', '', f'{tmp_path}/*.jsonl', '', 2, 0, 1)
        assert not (tmp_path / 'out').exists()


def test_a_text_is_read_without_its_byte_order_mark_and_must_be_utf8(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfto be')
    assert read_text(tmp_path / 'a.txt') == 'to be'
    (tmp_path / 'a.txt').write_bytes(b'caf\xe9')
    with pytest.raises(ValueError, match='a.txt: not UTF-8 at byte 3'):
        read_text(tmp_path / 'a.txt')
    for none in tmp_path, '/dev/zero', tmp_path / 'b.txt':
        with pytest.raises(FileNotFoundError, match='No such file'):
            read_text(none)


def test_a_folder_that_exists_is_that_folder_whatever_its_name(tmp_path):
    for name in 'a:0.5,b:0.5', 'C:', 'a,b', 'x:y':
        (tmp_path / name).mkdir()
        assert mixture_of(f'{tmp_path}/{name}') == {tmp_path / name: 1.0}
    both = mixture_of(f'{tmp_path}/x:y:0.25,{tmp_path}/C::0.75')
    assert both == {tmp_path / 'x:y': 0.25, tmp_path / 'C:': 0.75}


def test_every_line_of_a_jsonl_file_is_in_one_group(tmp_path, monkeypatch):
    monkeypatch.setattr(web, 'LINES', 10)
    for count in 1, 9, 10, 11, 30:
        rows = [{'text': f'Zeile {i} ä'} for i in range(count)]
        lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
        (tmp_path / 'rows.jsonl').write_text(''.join(lines), encoding='utf-8')
        groups = web.groups_of(f'{tmp_path}/rows.jsonl')
        texts = [web.texts_of(f'{tmp_path}/rows.jsonl', group) for group in groups]
        assert all(texts) and sum(texts, []) == [row['text'] for row in rows]


def is_sha(sums):
    return sums and all(len(s) == 64 for s in sums.values())


class SerialPool:
    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    imap = staticmethod(map)


def test_a_source_that_is_absent_or_has_no_text_is_named(tmp_path):
    (tmp_path / 'bad.jsonl').write_text('{"body": "no text"}\n')
    for source, words in (
        (tmp_path / 'none*.parquet', 'no such file'),
        (tmp_path / 'bad.jsonl', "'text'"),
    ):
        assert words in run(
            'data/fineweb/prepare.py', f'--source={source}', f'--out_dir={tmp_path}/out', ok=False
        )


def test_preparing_by_hand_says_what_is_wrong():
    assert 'No such file' in run(
        'data/shakespeare_char/prepare.py', '--source=/nowhere.txt', ok=False
    )
    assert '--key=value' in run('data/shakespeare_char/prepare.py', '--source', ok=False)


def test_a_data_set_that_only_a_run_can_write_says_how(tmp_path):
    command = 'python -m extras.write_answers --folder=there'
    (tmp_path / 'prepare.py').write_text(f'COMMAND = {command!r}')
    assert missing(tmp_path).endswith(f'not prepared; run {command}')
    (tmp_path / 'train.bin').touch()
    assert missing(tmp_path) == ''
