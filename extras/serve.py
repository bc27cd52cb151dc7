"""
The chat page and the OpenAI-shaped API behind `sample.py --serve=True`.

The standard library's server: nothing to install, and a thread for each of a few dozen clients is
cheap beside a model. All of them leave their requests at one Desk, which feeds the decoding loop.
"""
import collections
import contextlib
import itertools
import json
import queue
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from data.tokenizer import Voice
from data.tools import calculator, calls_in
from sample import Request, fit, is_taught

PAGE = Path(__file__).with_name('chat.html')
MOST_BYTES = 2 ** 20        # of a request's body
MOST_SECONDS = 30           # for a client to send what it announced, or to take what it asked for
MOST_CLIENTS = 256          # connected at a time

# What each field must be; None is always allowed and means the default.
FIELDS = {
    'model': (str, None), 'prompt': ((str, list), '\n'), 'messages': (list, None),
    'max_tokens': (int, None), 'max_completion_tokens': (int, None), 'temperature': (float, 1.0),
    'top_p': (float, 1.0), 'top_k': (int, 0), 'n': (int, 1), 'seed': (int, None),
    'stop': ((str, list), None), 'stream': (bool, False), 'stream_options': (dict, None),
    'echo': (bool, False), 'logprobs': ((int, bool), None)}
LIMITS = {'max_tokens': (0, 100_000), 'max_completion_tokens': (1, 100_000), 'temperature': (0, 2),
          'top_p': (1e-6, 1), 'top_k': (0, 10 ** 6), 'n': (1, 16), 'seed': (0, 2 ** 63 - 1),
          'logprobs': (0, 20)}


class Refusal(Exception):
    """An error that a client is told of, with its HTTP status."""

    def __init__(self, message, status=400, param=None):
        super().__init__(message)
        kind = {403: 'permission_error', 429: 'rate_limit_error'}.get(
            status, 'invalid_request_error' if status < 500 else 'server_error')
        self.status = status
        self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': None}}


def read(body, chat):
    """The bytes of a request -> its fields, every one there and of its type. Raises Refusal."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal('the body is not JSON') from None
    if not isinstance(asked, dict):
        raise Refusal('the body is not a JSON object')
    fields = {name: default for name, (_, default) in FIELDS.items()}
    for name, value in asked.items():
        if value is None or name not in FIELDS:     # clients send more than a small server knows
            continue
        kinds = FIELDS[name][0] if isinstance(FIELDS[name][0], tuple) else (FIELDS[name][0],)
        number = isinstance(value, int) and not isinstance(value, bool)
        if type(value) not in kinds and not (number and float in kinds):
            names = ' or '.join(kind.__name__ for kind in kinds)
            raise Refusal(f'{name} must be of type {names}', param=name)
        low, high = LIMITS.get(name, (None, None))
        if low is not None and not isinstance(value, bool) and not low <= value <= high:
            raise Refusal(f'{name} must be from {low} to {high}', param=name)
        fields[name] = value
    if isinstance(fields['logprobs'], bool):    # as in a chat; completions say how many others
        fields['logprobs'] = 0 if fields['logprobs'] else None
    fields['stop'] = strings(fields['stop'], 'stop')
    if chat:
        fields['messages'] = read_messages(fields['messages'])
    else:
        fields['prompt'] = read_prompts(fields['prompt'])
    return fields


def strings(value, name, most=4):
    """A text, a list of texts or None -> list of texts"""
    value = [] if value is None else [value] if isinstance(value, str) else value
    if len(value) > most or not all(isinstance(text, str) and text for text in value):
        raise Refusal(f'{name} must be a text or a list of at most {most} texts', param=name)
    return value


def read_prompts(prompt):
    """-> list of prompts, each a text or a list of ids"""
    if isinstance(prompt, str) or (prompt and all(type(i) is int for i in prompt)):
        prompt = [prompt]
    for one in prompt:
        ids = isinstance(one, list) and one and all(type(i) is int and i >= 0 for i in one)
        if not (ids or isinstance(one, str)):
            raise Refusal('prompt must be a text, token ids, or a list of these', param='prompt')
    if not 0 < len(prompt) <= 64:
        raise Refusal('prompt must hold 1 to 64 prompts', param='prompt')
    return prompt


def read_messages(messages):
    """-> [{'role', 'content': text}], OpenAI's lists of text parts joined"""
    plain = []
    for message in messages or []:
        if not isinstance(message, dict):
            raise Refusal('messages must hold objects', param='messages')
        role, content = message.get('role'), message.get('content')
        if isinstance(content, list):
            texts = [part.get('text') for part in content if isinstance(part, dict)]
            if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
                raise Refusal('only parts of text are understood', param='messages')
            content = ''.join(texts)
        role = 'system' if role == 'developer' else role
        if role not in ('system', 'user', 'assistant') or not isinstance(content, str):
            raise Refusal('a message is {"role": system, user or assistant, "content": text}',
                          param='messages')
        plain.append({'role': role, 'content': content})
    if not plain:
        raise Refusal('messages must hold at least one message', param='messages')
    return plain


class Reply:
    """What goes back for one request: whole, or chunk by chunk."""

    def __init__(self, model, chat, stream):
        self.chat, self.stream = chat, stream
        kind = 'chat.completion' if chat else 'text_completion'
        self.head = {'id': ('chatcmpl-' if chat else 'cmpl-') + uuid.uuid4().hex,
                     'object': kind + '.chunk' if chat and stream else kind,
                     'created': int(time.time()), 'model': model}

    def choice(self, index, text, reason=None, logprobs=None):
        """text: all of it, or for a stream what is new; reason: stop, length or None (goes on)"""
        choice = {'index': index, 'finish_reason': reason, 'logprobs': logprobs}
        if not self.chat:
            return {**choice, 'text': text}
        if not self.stream:
            return {**choice, 'message': {'role': 'assistant', 'content': text}}
        return {**choice, 'delta': {'content': text} if text else {}}

    def body(self, choices, read=None, written=0):
        """read, written: numbers of tokens, given once, at the end"""
        usage = {} if read is None else {'usage': {
            'prompt_tokens': read, 'completion_tokens': written, 'total_tokens': read + written}}
        return {**self.head, 'choices': choices, **usage}


def event(body):
    """-> the bytes of a server-sent event"""
    return b'data: ' + json.dumps(body).encode() + b'\n\n'


class Served:
    """A model as a server sees it: texts and conversations become prompts and Requests."""

    def __init__(self, model, tokenizer, checkpoint, name, tools=True):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.taught, self.window = is_taught(checkpoint), model.config.block_size
        self.tool = calculator(tokenizer) if tools and self.taught else None
        self.ends = tuple(i for i in (tokenizer.end, tokenizer.special.get('<|end|>'))
                          if i is not None)

    def encode(self, prompt):
        """A text or a list of ids -> ids, at least one. ValueError for what it never saw."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if ids and max(ids) >= self.model.config.vocab_size:
            raise ValueError(f'this model has no token {max(ids)}')
        return ids or [self.tokenizer.end or 0]

    def conversation(self, messages):
        """-> ids. Half of the window is for the answer; what does not fit the other is left out."""
        for message in messages:    # what people saw of a call may have signs that it never saw
            if message['role'] == 'assistant':
                message['content'] = self.tokenizer.known(message['content'])
        if not self.taught:
            text = '\n'.join(message['content'] for message in messages)
            return self.encode(text)[-self.window // 2:]
        system = messages[0]['role'] == 'system'
        turns = [self.tokenizer.render([{**message, 'content': calls_in(message['content'])}
                                        if message['role'] == 'assistant' else message])[0][1:]
                 for message in messages]
        room = self.window - self.window // 2
        return fit(self.tokenizer, turns if system else [[], *turns], room)[0]

    def request(self, prompt, most, fields, seed, chat):
        return Request(prompt, most, fields['temperature'], fields['top_k'], fields['top_p'], seed,
                       self.ends, self.tool if chat else None)

    @torch.inference_mode()
    def scores(self, ids):
        """-> for each id the log-probabilities of all tokens in its place; None where unknown"""
        device = self.model.transformer.wte.weight.device
        seen, rows = torch.tensor([ids[-self.window - 1:-1]], device=device), []
        if seen.numel():
            rows = list(self.model(seen)[0][0].float().log_softmax(1).cpu())
        return [None] * (len(ids) - len(rows)) + rows       # the first token has no score

    def logprobs(self, prompt, written, echo, top, chat):
        """Of each token under the model itself (temperature 1), in OpenAI's two shapes."""
        ids, first = prompt + written, 0 if echo else len(prompt)
        word, top = self.tokenizer.decode, min(top, self.model.config.vocab_size)
        tokens, values, best = [], [], []
        for i, row in list(zip(ids, self.scores(ids), strict=True))[first:]:
            likeliest = [] if row is None else row.topk(top)[1].tolist()
            tokens.append(word([i]))
            values.append(None if row is None else row[i].item())
            best.append({word([j]): row[j].item() for j in likeliest})
        if not chat:
            offsets = list(itertools.accumulate(map(len, tokens), initial=0))[:-1]
            return {'tokens': tokens, 'token_logprobs': values, 'text_offset': offsets,
                    'top_logprobs': best}

        def shaped(token, value):
            return {'token': token, 'logprob': value, 'bytes': list(token.encode())}

        return {'content': [
            {**shaped(token, value), 'top_logprobs': [shaped(*pair) for pair in others.items()]}
            for token, value, others in zip(tokens, values, best, strict=True)]}


class Desk:
    """Where the threads of a server leave their requests for the one decoding loop."""

    def __init__(self, decode, limit):
        self.decode, self.limit = decode, limit     # an iterator of Requests -> those at work
        self.waiting, self.live, self.changed = collections.deque(), [], threading.Condition()
        self.scoring = threading.Lock()     # one text at a time: it takes memory
        self.open = True

    def put(self, requests):
        with self.changed:
            for request in [request for request in self.waiting if request.cancelled]:
                self.waiting.remove(request)
            if len(self.waiting) + len(requests) > self.limit:
                raise Refusal('too many requests are waiting; try again soon', 429)
            self.waiting.extend(requests)
            self.changed.notify()

    def close(self):
        with self.changed:
            self.open = False
            for request in [*self.live, *self.waiting]:
                request.cancelled = True
            self.changed.notify()

    def source(self):
        while self.open:
            with self.changed:
                request = self.waiting.popleft() if self.waiting else None
                if request and not request.cancelled:
                    self.live.append(request)
            if request is None or not request.cancelled:
                yield request

    def run(self):
        """The decoding thread's life. An error in it ends the requests it had, not the server."""
        while self.open:
            try:
                for request in self.decode(self.source()):
                    if not self.open:
                        break
                    if request is None:
                        with self.changed:
                            self.changed.wait_for(lambda: self.waiting or not self.open, 1)
                        continue
                    if request.reason:
                        self.live.remove(request)
                    request.news.put(request)
            except Exception as error:
                print(f'decoding failed: {type(error).__name__}: {error}', file=sys.stderr)
                with self.changed:
                    lost, self.live = [*self.live, *self.waiting], []
                    self.waiting.clear()
                for request in lost:
                    request.reason = 'error'
                    request.news.put(request)
                time.sleep(0.1)     # if it fails at once and always, let it not spin


class Handler(BaseHTTPRequestHandler):
    """One client's connection. model, desk and local are its Server's."""
    protocol_version = 'HTTP/1.1'
    timeout = MOST_SECONDS

    def do_GET(self):
        self.guarded(self.get)

    def do_POST(self):
        self.guarded(self.post)

    def guarded(self, action):
        """Answer; whatever goes wrong becomes an error of OpenAI's shape, or a freed row."""
        self.started = False
        try:
            self.check_origin()
            action()
        except Refusal as refusal:
            self.send(refusal.status, refusal.body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            print(f'{self.path}: {type(error).__name__}: {error}', file=sys.stderr)
            self.send(500, Refusal('the server failed', 500).body)

    def check_origin(self):
        """Another host's page must not drive a model here (nor rebind its name to this machine)."""
        host = self.headers.get('Host', '')
        name = host.rsplit(':', 1)[0] if not host.endswith(']') else host
        if self.local and name not in ('127.0.0.1', 'localhost', '[::1]'):
            raise Refusal(f'this server answers to localhost, not to {host!r}', 403)
        origin = self.headers.get('Origin')
        if origin is not None and origin.split('://')[-1] != host:
            raise Refusal(f'a page from {origin!r} may not use this server', 403)

    def send(self, status, body, kind='application/json'):
        data = json.dumps(body).encode() if kind == 'application/json' else body
        try:
            if self.started:    # a stream is under way: it is too late for a status
                self.wfile.write(event(body))
                return
            self.send_response(status)
            self.send_header('Content-Type', kind)
            self.send_header('Content-Length', str(len(data)))
            self.send_header('X-Content-Type-Options', 'nosniff')
            if status != 200:       # what it sent may not have been read
                self.close_connection = True
                self.send_header('Connection', 'close')
            self.end_headers()
            self.wfile.write(data)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def get(self):
        path = self.path.split('?')[0]
        if path == '/':
            self.send(200, PAGE.read_bytes(), 'text/html; charset=utf-8')
        elif path == '/v1/models':
            self.send(200, {'object': 'list', 'data': [{
                'id': self.model.name, 'object': 'model', 'created': 0, 'owned_by': 'oneloop',
                'chat': self.model.taught, 'window': self.model.window}]})
        else:
            raise Refusal(f'there is no {path}', 404)

    def post(self):
        paths = {'/v1/completions': False, '/v1/chat/completions': True}
        if self.path not in paths:
            raise Refusal(f'there is no {self.path}', 404)
        kind = self.headers.get('Content-Type', '').split(';')[0].strip()
        if kind != 'application/json':      # a form of another page could send anything else
            raise Refusal('the Content-Type must be application/json', 415)
        size = self.headers.get('Content-Length', '')
        if not (size.isascii() and size.isdigit()):
            raise Refusal('a Content-Length is needed', 411)
        size = int(size) if len(size) < 10 else 10 ** 9
        body = self.take(min(size, 4 * MOST_BYTES))     # one that is answered unread sees no answer
        if size > MOST_BYTES:
            raise Refusal(f'the body is larger than {MOST_BYTES} bytes', 413)
        self.answer(read(body, paths[self.path]), paths[self.path])

    def take(self, size):
        """-> so many bytes of the body. ConnectionError if they do not come in time."""
        pieces, left, deadline = [], size, time.monotonic() + self.timeout
        while left:
            pieces.append(self.rfile.read1(left))
            left -= len(pieces[-1])
            if not pieces[-1] or time.monotonic() > deadline:
                raise ConnectionError('it left, or is too slow, before it had sent its body')
        return b''.join(pieces)

    def answer(self, fields, chat):
        model, news = self.model, queue.SimpleQueue()
        try:
            prompts = ([model.conversation(fields['messages'])] if chat
                       else [model.encode(prompt) for prompt in fields['prompt']])
        except ValueError as error:     # a character or an id that the model never saw
            raise Refusal(str(error)) from None
        for ids in prompts:
            if len(ids) > model.window:
                raise Refusal(f'the prompt has {len(ids)} tokens; this model sees {model.window}',
                              param='messages' if chat else 'prompt')
        if fields['stream'] and (fields['echo'] or fields['logprobs'] is not None):
            raise Refusal('echo and logprobs are not given in a stream')
        most = fields['max_completion_tokens'] or fields['max_tokens']
        if most is None:
            most = max(1, model.window - len(prompts[0])) if chat and model.taught else (
                model.window // 2 if chat else 16)
        if len(prompts) * fields['n'] > self.desk.limit:
            raise Refusal(f'more than {self.desk.limit} answers at once')
        first = fields['seed'] if fields['seed'] is not None else time.time_ns() % 2 ** 32
        requests = [model.request(prompt, most, fields, first + i, chat)
                    for prompt in prompts for i in range(fields['n'])]
        for request in requests:
            request.news, request.voice = news, Voice(model.tokenizer, fields['stop'])
            request.final = []
            if most == 0:       # to score a prompt
                request.reason = 'length'
        self.desk.put([request for request in requests if not request.reason])
        try:
            (self.stream if fields['stream'] else self.whole)(requests, news, fields, chat)
        finally:
            for request in requests:
                request.cancelled = True

    def heard(self, requests, news):
        """Yields (request, new text), until all have ended. A client that leaves is an error."""
        left = {request for request in requests if not request.reason}
        while left:
            try:
                request = news.get(timeout=0.5)
            except queue.Empty:
                request = None
            self.check_presence()
            if request not in left:
                continue
            if request.reason == 'error':
                raise Refusal('decoding failed', 500)
            ended = bool(request.reason)
            piece = request.voice.hear(list(request.ids), last=ended)
            if ended or request.voice.stopped:
                request.cancelled = True
                request.final = list(request.ids)[:request.voice.seen]  # the loop may be ahead
                left.remove(request)
            yield request, piece

    def check_presence(self):
        """Raise ConnectionError once the client has gone, so that its row is freed."""
        try:
            self.connection.setblocking(False)
            if self.connection.recv(4096) == b'':
                raise ConnectionError('it left')
            self.close_connection = True    # it talks while it is answered: what it says is lost
        except BlockingIOError:
            pass
        finally:
            self.connection.settimeout(self.timeout)

    def finish_of(self, request):
        if request.voice.stopped or request.reason == 'end':
            return 'stop'
        return 'length' if request.reason == 'length' else None

    def whole(self, requests, news, fields, chat):
        for _ in self.heard(requests, news):
            pass
        reply, choices = Reply(self.model.name, chat, stream=False), []
        for i, request in enumerate(requests):
            text = request.voice.text
            if fields['echo']:
                text = self.model.tokenizer.decode(request.prompt) + text
            logprobs = None
            if fields['logprobs'] is not None:
                top = fields['logprobs']
                with self.desk.scoring:
                    logprobs = self.model.logprobs(request.prompt, request.final, fields['echo'],
                                                   top, chat)
            choices.append(reply.choice(i, text, self.finish_of(request), logprobs))
        read = sum(len(request.prompt) for request in requests[::fields['n']])
        self.send(200, reply.body(choices, read, sum(len(request.final) for request in requests)))

    def stream(self, requests, news, fields, chat):
        reply = Reply(self.model.name, chat, stream=True)
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Cache-Control', 'no-store')
        self.send_header('Connection', 'close')
        self.end_headers()
        self.started = self.close_connection = True
        for request, piece in self.heard(requests, news):
            reason = self.finish_of(request)
            if piece or reason:
                choice = reply.choice(requests.index(request), piece, reason)
                self.wfile.write(event(reply.body([choice])))
        if (fields['stream_options'] or {}).get('include_usage'):
            written = sum(len(request.final) for request in requests)
            read = sum(len(request.prompt) for request in requests[::fields['n']])
            self.wfile.write(event(reply.body([], read, written)))
        self.wfile.write(b'data: [DONE]\n\n')

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """
    Serves as soon as it is made; leave it as a context to stop. model: a Served. decode: an
    iterator of Requests -> those at work, in a thread of its own.
    """
    daemon_threads = True
    request_queue_size = 128    # clients that may knock at the same moment

    def __init__(self, model, decode, host, port, limit):
        self.desk = Desk(decode, limit)
        known = {'model': model, 'desk': self.desk, 'local': host in ('127.0.0.1', 'localhost')}
        super().__init__((host, port), type('', (Handler,), known))
        self.threads = []
        for work in self.desk.run, self.serve_forever:
            self.threads.append(threading.Thread(target=work))
            self.threads[-1].start()

    def __exit__(self, *_):
        self.desk.close()
        self.shutdown()
        for thread in self.threads:
            thread.join()
        self.server_close()

    def verify_request(self, request, client_address):
        return threading.active_count() < MOST_CLIENTS

    def handle_error(self, request, client_address):
        pass    # a connection that broke: the others do not care


def serve(model, decode, host, port, limit):
    """Serve until Ctrl-C."""
    with Server(model, decode, host, port, limit) as server:
        print(f'http://{host}:{server.server_port}/ (Ctrl-C ends)', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
