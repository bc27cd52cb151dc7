"""The web server: the real openai client, streams, faults, load, hostile pages."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, TEXT, serving, tiny

from data.detokenizer import Detokenizer
from data.tokenizer import Tokenizer
from sample import Request, Sampling, decode, generate

pytest.importorskip('uvicorn', reason='optional packages: pip install starlette uvicorn')
from extras import serve  # noqa: E402
from extras.serve import Endpoint, Refusal, Server, read  # noqa: E402

LETTERS = Tokenizer.of_text(TEXT + 'abcdefghijklmnopqrstuvwxyz0123456789+-*/=?')
ENDS = LETTERS.end, LETTERS.special['<|end|>']
TAUGHT = {'lineage': [{'stage': 'sft'}]}


@pytest.fixture(scope='module')
def model():
    return tiny(vocab_size=LETTERS.vocab_size, block_size=64)


def start(model, checkpoint=TAUGHT, limit=64, rows=4, slow=0.0, endless=False):
    def work(source):
        for request in decode(model, source, rows):
            time.sleep(slow)
            yield request

    known = Endpoint(model, LETTERS, checkpoint, 'tiny')
    if endless:  # no token ends an answer
        make = known.request
        known.request = lambda *how: dataclasses.replace(make(*how), end=())
    return serving(Server(known, work, '127.0.0.1', 0, limit))


@pytest.fixture(scope='module')
def server(model):
    with start(model) as server:
        yield server


@pytest.fixture
def client(server):
    openai = pytest.importorskip('openai')
    return openai.OpenAI(
        base_url=f'http://127.0.0.1:{server.server_port}/v1', api_key='none', max_retries=0
    )


def post(server, path='/v1/completions', body=None, headers=None, raw=None):
    """-> status, what came back"""
    connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=60)
    data = json.dumps(body or {}).encode() if raw is None else raw
    connection.request('POST', path, data, {'Content-Type': 'application/json', **(headers or {})})
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, json.loads(text) if text.startswith('{') else text


def ask_by_hand(connection, server, body):
    """Send a completion's body without waiting for the answer; return once it is being written."""
    connection.sendall(
        b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
        b'Content-Type: application/json\r\n'
        b'Content-Length: %d\r\n\r\n%s' % (len(body), body)
    )
    deadline = time.monotonic() + 20
    while not server.queue.live:
        assert time.monotonic() < deadline


def heard(ids):
    return Detokenizer(LETTERS).push(ids, last=True)


def alone(model, prompt, count, **how):
    request = Request(LETTERS.encode(prompt), count, **how)
    for _ in decode(model, [request], 1):
        pass
    return request


def test_the_openai_client_completes_what_the_loop_writes(client, model):
    assert [m.id for m in client.models.list()] == ['tiny']
    done = client.completions.create(model='tiny', prompt='to be', max_tokens=9, seed=5, n=2)
    for i, choice in enumerate(done.choices):
        request = alone(model, 'to be', 9, seed=5 + i, end=ENDS)
        assert choice.text == heard(request.ids) and choice.index == i
        assert choice.finish_reason == ('stop' if request.reason == 'end' else 'length')
    assert done.usage.prompt_tokens == 5 and done.usage.total_tokens <= 5 + 18
    how = dict(model='tiny', temperature=0, max_tokens=4)
    greedy = client.completions.create(prompt=['to', 'be'], **how)
    assert len(greedy.choices) == 2


def test_a_stream_is_the_whole_in_pieces(client):
    messages = [{'role': 'user', 'content': 'is it?'}]
    how = dict(model='tiny', messages=messages, seed=3, max_tokens=20)
    whole = client.chat.completions.create(**how)
    chunks = list(
        client.chat.completions.create(**how, stream=True, stream_options={'include_usage': True})
    )
    text = ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    parts = list(client.completions.create(model='tiny', prompt='to', seed=3, stream=True, n=2))
    assert {c.choices[0].index for c in parts} == {0, 1}


def test_stop_texts_end_an_answer(client, model):
    for seed in range(20):
        how = dict(model='tiny', prompt='to', max_tokens=30, seed=seed)
        text = client.completions.create(**how).choices[0].text
        if len(text) > 12:
            break
    stop = text[5:7]
    for stream in False, True:
        done = client.completions.create(**how, stop=stop, stream=stream)
        pieces = list(done) if stream else [done]
        assert ''.join(c.choices[0].text for c in pieces) == text[: text.index(stop)]
        assert pieces[-1].choices[0].finish_reason == 'stop'


def test_a_harness_can_score_a_text(client, model):
    """echo, logprobs, max_tokens=0: as evaluation harnesses do."""
    done = client.completions.create(
        model='tiny', prompt='to be or', max_tokens=0, echo=True, logprobs=3
    )
    ids = LETTERS.encode('to be or')
    expected = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(1)
    scores = done.choices[0].logprobs
    assert scores.tokens == list('to be or') and scores.text_offset == list(range(8))
    assert scores.token_logprobs[0] is None
    for i, row in enumerate(expected):
        assert scores.token_logprobs[i + 1] == pytest.approx(row[ids[i + 1]].item(), abs=1e-4)
        best = {LETTERS.decode([j]): p for p, j in zip(*map(torch.Tensor.tolist, row.topk(3)))}
        assert scores.top_logprobs[i + 1] == pytest.approx(best, abs=1e-4)
    both = client.completions.create(
        model='tiny', prompt='to be or', max_tokens=5, echo=True, logprobs=0, seed=2
    )
    assert both.choices[0].text.startswith('to be or')
    assert both.choices[0].logprobs.token_logprobs[1:8] == pytest.approx(
        scores.token_logprobs[1:], abs=1e-4
    )
    said = client.chat.completions.create(
        model='tiny', messages=[{'role': 'user', 'content': 'be'}], logprobs=True, max_tokens=4,
        top_logprobs=2,
    )  # fmt: skip
    assert 1 <= len(said.choices[0].logprobs.content) <= 4
    assert all(len(token.top_logprobs) == 2 for token in said.choices[0].logprobs.content)


def test_scores_of_parts_of_a_character_keep_their_bytes():
    words = Tokenizer.of_words('to be')
    known = Endpoint(tiny(vocab_size=words.vocab_size), words, {'lineage': []}, 'x')
    ids = words.encode('\u00e9 to')  # two tokens for a letter of two bytes
    content = known.logprobs(words.begin, ids, False, 5, chat=True)['content']
    assert [bytes(token['bytes']) for token in content] == [b'\xc3', b'\xa9', b' to']
    assert all(len(token['top_logprobs']) == 5 for token in content)


def test_a_model_that_was_never_taught_completes_the_text(model):
    with start(model, {'lineage': [{'stage': 'pretrain'}]}) as server:
        body = {'messages': [{'role': 'user', 'content': 'to be'}], 'temperature': 0}
        body['max_tokens'] = 6
        _, reply = post(server, '/v1/chat/completions', body)
        expected = generate(model, [LETTERS.encode('to be')], 6, Sampling(0), end=ENDS)[0]
        assert reply['choices'][0]['message']['content'] == heard(expected)


@pytest.mark.parametrize(
    'body, words',
    [
        ({'prompt': 'to', 'max_tokens': 'many'}, 'max_tokens must be of type int'),
        ({'prompt': 'to', 'max_tokens': True}, 'max_tokens must be of type int'),
        ({'prompt': 'to', 'max_tokens': -1}, 'from 0 to'),
        ({'prompt': 'to', 'temperature': 9}, 'temperature must be from 0 to 2'),
        ({'prompt': 'to', 'temperature': float('nan')}, 'temperature must be from'),
        ({'prompt': 'to', 'top_p': 0}, 'top_p must be'),
        ({'prompt': 'to', 'n': 17}, 'n must be from 1 to 16'),
        ({'prompt': 'to', 'stop': ['a'] * 5}, 'stop must be'),
        ({'prompt': 'to', 'stop': ['']}, 'stop must be'),
        ({'prompt': 'to', 'logprobs': 3, 'stream': True}, 'not given in a stream'),
        ({'prompt': 'to' * 60}, 'the prompt has 120 tokens; this model sees 64'),
        ({'prompt': '☃'}, "the character '☃'"),
        ({'prompt': [99999]}, 'no token 99999'),
        ({'prompt': [-1]}, 'prompt must be'),
        ({'prompt': []}, 'prompt must hold'),
        ({'prompt': {}}, 'prompt must be of type'),
        ({'prompt': [['x']]}, 'prompt must be'),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_in_openais_shape(server, body, words):
    status, reply = post(server, body=body)
    assert status == 400 and words in reply['error']['message']
    assert set(reply['error']) == {'message', 'type', 'param', 'code'}


@pytest.mark.parametrize(
    'messages',
    [None, [], 'hi', ['hi'], [{}], [{'role': 'user'}], [{'role': 'tool', 'content': 'x'}],
     [{'role': 'user', 'content': [{'type': 'image_url'}]}], [{'role': 'user', 'content': 3}]],
    ids=str,
)  # fmt: skip
def test_wrong_messages_are_refused(server, messages):
    status, reply = post(server, '/v1/chat/completions', {'messages': messages})
    assert status == 400 and reply['error']['type'] == 'invalid_request_error'


@pytest.mark.parametrize(
    'raw', [b'', b'{', b'[]', b'"x"', b'\xff\xfe', b'[' * 100000, b'{"a":1}' * 2]
)
def test_a_body_that_is_no_json_object_is_refused(server, raw):
    status, reply = post(server, raw=raw)
    assert status == 400 and 'JSON' in reply['error']['message']


def test_bodies_paths_types_and_lengths_are_bounded(server):
    assert post(server, raw=b' ' * (2**20 + 1))[0] == 413
    assert post(server, '/v1/none')[0] == 404
    assert post(server, body={'prompt': 'a'}, headers={'Content-Type': 'text/plain'})[0] == 415
    for length in 'x', '-1', '²':
        with socket.create_connection(('127.0.0.1', server.server_port), timeout=10) as s:
            s.sendall(
                'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
                'Content-Type: application/json\r\n'
                f'Content-Length: {length}\r\n\r\n'.encode('latin-1')
            )
            assert s.recv(100).startswith(b'HTTP/1.1 400')
    for extra in 'Content-Length: 2\r\nContent-Length: 3', 'Transfer-Encoding: gzip':
        with socket.create_connection(('127.0.0.1', server.server_port), timeout=10) as s:
            s.sendall(
                'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
                f'Content-Type: application/json\r\n{extra}\r\n\r\n{{}}'.encode()
            )
            assert re.match(rb'HTTP/1.1 (400|501)', s.recv(100))
    connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=10)
    connection.request('GET', '/etc/passwd')
    assert connection.getresponse().status == 404


def test_clients_that_say_nothing_do_not_keep_others_out(server):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(('127.0.0.1', server.server_port), 10))
        assert post(server, body={'prompt': 'to', 'max_tokens': 2})[0] == 200


def test_fields_that_are_ignored_are_named_and_two_lengths_are_refused(server):
    body = {'prompt': 'to', 'max_tokens': 2, 'model': 'x', 'frequency_penalty': 1, 'a\r\nb': 1}
    for more in {}, {'stream': True}:
        connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=10)
        connection.request('POST', '/v1/completions', json.dumps({**body, **more}),
                           {'Content-Type': 'application/json'})  # fmt: skip
        reply = connection.getresponse()
        assert reply.status == 200 and reply.getheader('X-Ignored-Fields') == 'frequency_penalty'
        connection.close()
    headers = {'Transfer-Encoding': 'chunked', 'Content-Length': '5'}
    status, reply = post(server, raw=b'0\r\n\r\n', headers=headers)
    assert status == 400 and 'not both' in reply['error']['message']


@pytest.mark.parametrize(
    'headers, status',
    [
        ({'Host': 'evil.example'}, 403),
        ({'Host': 'localhost.evil.example:80'}, 403),
        ({'Origin': 'http://evil.example'}, 403),
        ({'Origin': 'null'}, 403),
        ({'Host': 'localhost:8000', 'Origin': 'http://127.0.0.1:8000'}, 403),
        ({'Host': 'localhost:8000', 'Origin': 'http://localhost:8000'}, 200),
        ({'Host': '[::1]:8000'}, 200),
    ],
    ids=str,
)
def test_other_hosts_pages_cannot_drive_it(server, headers, status):
    assert post(server, body={'prompt': 'to', 'max_tokens': 1}, headers=headers)[0] == status


def test_fifty_clients_at_once_get_each_their_own_answer(server, model):
    def ask(i):
        body = {'prompt': 'to be'[: 1 + i % 5], 'max_tokens': 5 + i % 20, 'seed': i}
        return post(server, body=body)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(ask, range(50)))
    for i, (status, reply) in enumerate(replies):
        request = alone(
            model,
            'to be'[: 1 + i % 5],
            5 + i % 20,
            seed=i,
            end=ENDS,
        )
        assert status == 200 and reply['choices'][0]['text'] == heard(request.ids)


def test_a_long_prompt_is_encoded_beside_the_other_clients(server, monkeypatch):
    encode, begun, go_on = Endpoint.prompts, threading.Event(), threading.Event()

    def slow(*how):
        begun.set()
        assert go_on.wait(30)
        return encode(*how)

    monkeypatch.setattr(Endpoint, 'prompts', slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server, body={'prompt': 'to', 'max_tokens': 1})
        try:
            assert begun.wait(30)
            connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=5)
            connection.request('GET', '/v1/models')
            assert connection.getresponse().status == 200
        finally:
            go_on.set()
        assert waiting.result()[0] == 200


def test_a_temperature_next_to_zero_is_greedy(server):
    body = {'prompt': 'to be', 'max_tokens': 8}
    texts = [post(server, body={**body, 'temperature': t, 'top_p': p})[1]['choices'][0]['text']
             for t, p in ((0, 1), (1e-38, 1), (1e-45, 1), (1, 1e-6))]  # fmt: skip
    assert len(set(texts)) == 1


def test_a_talk_that_fills_the_window_goes_on(server):
    messages = [{'role': 'system', 'content': 'be'}]
    for _ in range(12):
        messages.append({'role': 'user', 'content': 'to be or not to be'})
        status, reply = post(server, '/v1/chat/completions', {'messages': messages})
        assert status == 200
        messages.append({'role': 'assistant', 'content': reply['choices'][0]['message']['content']})


def test_a_conversation_leaves_half_of_the_window_for_its_answer(model):
    known = Endpoint(model, LETTERS, TAUGHT, 'x')
    roles = ['user', 'assistant'] * 4 + ['user']
    said = [{'role': role, 'content': f'to be {i}'} for i, role in enumerate(roles)]
    for turns in range(1, 10, 2):
        ids = known.conversation(said[:turns])
        assert len(ids) <= known.window // 2 and ids[-1] == LETTERS.special['<|assistant|>']
        assert f'to be {turns - 1}' in LETTERS.decode(ids)
    assert 'to be 0' not in LETTERS.decode(ids)


def test_a_taught_model_has_its_calculator_in_a_chat_and_nowhere_else(model):
    fields = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0}
    call, result = (LETTERS.special[name] for name in ('<|call|>', '<|result|>'))
    known = Endpoint(model, LETTERS, TAUGHT, 'x')
    tool = known.request([0], 9, fields, 0, chat=True).tool
    forced = tool([call, *LETTERS.encode('6*7'), result])
    assert LETTERS.decode(forced).startswith('42')
    untaught = Endpoint(model, LETTERS, {'lineage': []}, 'x')
    assert known.request([0], 9, fields, 0, chat=False).tool is None
    without = Endpoint(model, LETTERS, TAUGHT, 'x', tools=False)
    assert without.request([0], 9, fields, 0, chat=True).tool is None
    assert untaught.request([0], 9, fields, 0, chat=True).tool is None


def test_requests_of_a_client_that_left_do_not_fill_the_queue(model):
    with start(model, limit=3, rows=1, slow=0.05, endless=True) as server:
        body = json.dumps({'prompt': 'to', 'max_tokens': 400, 'n': 3}).encode()
        with socket.create_connection(('127.0.0.1', server.server_port)) as s:
            ask_by_hand(s, server, body)
        time.sleep(1.2)
        assert post(server, body={'prompt': 'be', 'max_tokens': 2})[0] == 200


def test_a_loop_that_always_fails_says_so_and_does_not_spin(model, capsys):
    def fails(source):
        raise MemoryError('no room')
        yield

    broken = Server(Endpoint(model, LETTERS, TAUGHT, 'x'), fails, '127.0.0.1', 0, 9)
    with serving(broken) as server:
        assert post(server, body={'prompt': 'to'})[0] == 500
    assert capsys.readouterr().err.count('decoding failed') < 50


def test_a_queue_that_is_full_says_429_and_goes_on(model):
    with start(model, limit=3, rows=1, slow=0.05) as server:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            body = {'prompt': 'to', 'max_tokens': 10}
            statuses = [s for s, _ in pool.map(lambda _: post(server, body=body), range(12))]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 3
        assert post(server, body=body)[0] == 200


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_leaves_frees_its_row(model, stream):
    with start(model, rows=1, slow=0.05, endless=True) as server:
        body = json.dumps({'prompt': 'to', 'max_tokens': 5000, 'stream': stream}).encode()
        with socket.create_connection(('127.0.0.1', server.server_port)) as s:
            ask_by_hand(s, server, body)
        began = time.monotonic()
        assert post(server, body={'prompt': 'be', 'max_tokens': 2})[0] == 200
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    'sent',
    [b'', b'POST /v1/completions HT', b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n',
     b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
     b'Content-Length: 99\r\n\r\n{"prompt": '],
    ids=len,
)  # fmt: skip
def test_a_client_that_stalls_is_let_go(model, sent, monkeypatch):
    monkeypatch.setattr(serve, 'MOST_SECONDS', 0.3)
    with start(model) as server:
        with socket.create_connection(('127.0.0.1', server.server_port), timeout=10) as s:
            s.sendall(sent)
            answer = b''.join(iter(lambda: s.recv(1000), b''))  # until the server closes
            assert answer == b'' or answer.startswith(b'HTTP/1.1 408')
        assert post(server, body={'prompt': 'to'})[0] == 200


@pytest.mark.skipif(os.name != 'posix', reason='signals of Unix')
def test_ctrl_c_ends_the_server_cleanly_even_under_way(trained):
    command = [sys.executable, '-m', 'extras.serve', f'--out_dir={trained}']
    process = subprocess.Popen(
        [*command, '--port=0', '--device=cpu', '--dtype=float32'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    port = int(re.search(r':(\d+)/', process.stdout.readline())[1])
    body = json.dumps({'prompt': 'To', 'max_tokens': 100000, 'stream': True})
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    connection.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
    assert connection.getresponse().readline().startswith(b'data: ')
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0 and process.stderr.read() == ''


def test_an_error_while_decoding_ends_those_requests_and_not_the_server(model, monkeypatch):
    with start(model) as server:
        forward = model.forward
        monkeypatch.setattr(model, 'forward', lambda *a, **k: 1 / 0)
        status, reply = post(server, body={'prompt': 'to'})
        assert status == 500 and reply['error']['message'] == 'decoding failed'
        monkeypatch.setattr(model, 'forward', forward)
        assert post(server, body={'prompt': 'to'})[0] == 200


def test_the_page_asks_no_other_host(server):
    connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=10)
    connection.request('GET', '/')
    reply = connection.getresponse()
    page = reply.read().decode()
    assert reply.status == 200 and reply.getheader('Content-Type').startswith('text/html')
    assert 'http://' not in page and 'https://' not in page and "default-src 'none'" in page


def test_no_body_whatever_makes_read_fail_otherwise():
    import random

    rng, names = random.Random(0), ['prompt', 'messages', 'stop', 'n', 'logprobs', 'temperature']
    values = [None, '', 'x', 0, -1, 1e999, True, [], [[]], [None], {}, [{}], {'a': 1}, 10**30]
    for _ in range(3000):
        body = {rng.choice(names): rng.choice(values) for _ in range(3)}
        try:
            read(json.dumps(body).encode(), chat=rng.random() < 0.5)
        except Refusal:
            pass


def test_a_port_in_use_is_one_clear_line(trained, server, monkeypatch):
    from conftest import inside

    text = inside(
        'extras/serve.py',
        f'--out_dir={trained}',
        f'--port={server.server_port}',
        '--device=cpu',
        '--dtype=float32',
        ok=False,
    )
    assert 'try --port=0' in text
