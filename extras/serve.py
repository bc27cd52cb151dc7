"""
A chat page (chat.html) and an API like OpenAI's, for many clients at once.

    pip install starlette uvicorn
    python -m extras.serve --out_dir=out-arithmetic-rl

Starlette and uvicorn speak HTTP. A Completion turns a client's call into requests, which wait in
the RequestQueue for the one decoding loop, in a thread of its own, and makes the reply.
"""
import asyncio
import contextlib
import itertools
import json
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.responses import FileResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise SystemExit(f'{error}: pip install starlette uvicorn') from None

from configurator import configure, range_of, read_settings
from data.detokenizer import Detokenizer
from data.files import program
from data.models import is_taught
from data.tools import calculator, calls_in
from sample import Request, Sampling, decode, open_model

out_dir = 'out'         # the run to serve; gpt2 or another source of sample.py's --init_from
host = '127.0.0.1'      # 0.0.0.0 lets other machines in
port = 8000             # 0: any that is free; from 0 to 65535
rows = 16               # requests that decode at a time; at least 1
queue_limit = 64        # requests that may wait for a row; more are answered with 429; at least 1
tools = True            # let the model call the calculator, in chats
quantize = ''           # int8 or int4: weights of 8 or 4 bits (extras/quantize.py)
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: the fastest here

PAGE = Path(__file__).with_name('chat.html')
MOST_BYTES = 2 ** 20        # of a request's body
MOST_SECONDS = 30           # for a client to send a request
MOST_CLIENTS = 256          # connected at a time
MOST_TOKENS = 100_000       # in an answer
# What each field must be, its default (null means it too) and, if it is a number, its range.
FIELDS = {
    'prompt': ((str, list), '\n'), 'messages': ((list,), ()), 'stop': ((str, list), ()),
    'stream': ((bool,), False), 'stream_options': ((dict,), {}), 'echo': ((bool,), False),
    'max_tokens': ((int,), None, 0, MOST_TOKENS), 'n': ((int,), 1, 1, 16),
    'max_completion_tokens': ((int,), None, 1, MOST_TOKENS),
    'seed': ((int,), None, 0, 2 ** 63 - 1), 'logprobs': ((int, bool), None, 0, 20),
    'top_logprobs': ((int,), 0, 0, 20),
    **{name: ((int, kind), getattr(Sampling, name), *range_of(comment))
       for name, (kind, comment) in read_settings(Sampling).items()},
    'temperature': ((int, float), 1.0, 0, 2)}   # as OpenAI's


class Refusal(Exception):
    """An error that a client is told of, with its HTTP status."""

    def __init__(self, message, status=400, param=None):
        super().__init__(message)
        kind = {403: 'permission_error', 429: 'rate_limit_error'}.get(
            status, 'invalid_request_error' if status < 500 else 'server_error')
        self.status = status
        self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': None}}


def read(body, chat):
    """The bytes of a request -> all fields, each of its type. Raises Refusal."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise Refusal('the body is not a JSON object')
    fields = {name: default for name, (_, default, *_) in FIELDS.items()}
    # Clients send more fields than a small server knows: these are ignored, and it says so.
    fields['ignored'] = sorted(given.keys() - FIELDS.keys() - {'model'})
    given = {name: given[name] for name in FIELDS if given.get(name) is not None}
    for name, value in given.items():
        kinds, _, *limits = FIELDS[name]
        if type(value) not in kinds:
            names = ' or '.join(dict.fromkeys(kind.__name__ for kind in kinds))
            raise Refusal(f'{name} must be of type {names}', param=name)
        if type(value) in (int, float) and not limits[0] <= value <= limits[1]:
            raise Refusal(f'{name} must be from {limits[0]} to {limits[1]}', param=name)
    fields |= given
    if isinstance(fields['logprobs'], bool):    # as in a chat; completions say how many others
        fields['logprobs'] = fields['top_logprobs'] if fields['logprobs'] else None
    if fields['stream'] and (fields['echo'] or fields['logprobs'] is not None):
        raise Refusal('echo and logprobs are not given in a stream')
    stop = fields['stop'] = [fields['stop']] if isinstance(fields['stop'], str) else fields['stop']
    if len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise Refusal('stop must be a text or a list of at most 4 texts', param='stop')
    if chat:
        fields['messages'] = list(map(read_message, fields['messages']))
        if not fields['messages']:
            raise Refusal('messages must hold at least one message', param='messages')
    else:
        fields['prompt'] = read_prompts(fields['prompt'])
    return fields


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


def read_message(message):
    """-> {'role', 'content': text}, OpenAI's lists of text parts joined"""
    role, content = (message.get(name) if isinstance(message, dict) else None
                     for name in ('role', 'content'))
    if isinstance(content, list):
        texts = [part.get('text') if isinstance(part, dict) else None for part in content]
        content = ''.join(texts) if all(isinstance(text, str) for text in texts) else None
    role = 'system' if role == 'developer' else role
    if role not in ('system', 'user', 'assistant') or not isinstance(content, str):
        raise Refusal('a message is {"role": system, user or assistant, "content": text or a list '
                      'of text parts}', param='messages')
    return {'role': role, 'content': content}


class Endpoint:
    """What is served: a model, to which texts and conversations come as prompts of Requests."""

    def __init__(self, model, tokenizer, checkpoint, name, tools=True):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.taught, self.window = is_taught(checkpoint), model.config.block_size
        self.tool = calculator(tokenizer) if tools and self.taught else None
        self.ends = (*tokenizer.ends, *[i for name, i in tokenizer.special.items()
                                        if name == '<|end|>'])

    def encode(self, prompt):
        """A text or a list of ids -> ids, at least one. ValueError for what it never saw."""
        ids = prompt
        if isinstance(prompt, str):
            ids = self.tokenizer.prefix + self.tokenizer.encode(prompt)
        if ids and max(ids) >= self.model.config.vocab_size:
            raise ValueError(f'this model has no token {max(ids)}')
        if len(ids) > self.window:
            raise ValueError(f'the prompt has {len(ids)} tokens; this model sees {self.window}')
        return ids or self.tokenizer.begin

    def conversation(self, messages):
        """-> ids. Half of the window is for the answer; what does not fit the other is left out."""
        for message in messages:    # what people saw of a call may have signs that it never saw
            if message['role'] == 'assistant':
                message['content'] = self.tokenizer.drop_unknown(message['content'])
        if not self.taught:
            text = '\n'.join(message['content'] for message in messages)
            ids = self.tokenizer.encode(text)[-self.window // 2:]
            return self.tokenizer.prefix + ids or self.tokenizer.begin
        system = messages[0]['role'] == 'system'
        has_calls = '<|call|>' in self.tokenizer.special
        turns = [self.tokenizer.render_turn({**message, 'content': calls_in(message['content'])}
                                            if message['role'] == 'assistant' and has_calls
                                            else message)[0]
                 for message in messages]
        room = self.window - self.window // 2
        return self.tokenizer.fit(turns if system else [[], *turns], room)[0]

    def prompts(self, fields, chat):
        """-> lists of ids. Raises Refusal"""
        try:
            if chat:
                return [self.conversation(fields['messages'])]
            return list(map(self.encode, fields['prompt']))
        except ValueError as error:     # a character or an id that the model never saw
            raise Refusal(str(error), param='messages' if chat else 'prompt') from None

    def request(self, prompt, most, fields, seed, chat):
        return ClientRequest(prompt, most, Sampling.of(fields), seed, self.ends,
                             self.tool if chat else None)

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
        values, best = [], []   # of each token; of the likeliest ones: (id, log-probability)
        for i, row in list(zip(ids, self.scores(ids), strict=True))[first:]:
            likeliest = [] if row is None else row.topk(top)[1].tolist()
            values.append(None if row is None else row[i].item())
            best.append([(j, row[j].item()) for j in likeliest])
        if not chat:
            tokens = [word([i]) for i in ids[first:]]
            return {'tokens': tokens, 'token_logprobs': values,
                    'text_offset': list(itertools.accumulate(map(len, tokens), initial=0))[:-1],
                    'top_logprobs': [{word([j]): p for j, p in pairs} for pairs in best]}

        def shaped(i, value):
            return {'token': word([i]), 'logprob': value,
                    'bytes': list(self.tokenizer.token_bytes(i))}

        return {'content': [
            {**shaped(i, value), 'top_logprobs': [shaped(*pair) for pair in pairs]}
            for i, value, pairs in zip(ids[first:], values, best, strict=True)]}


@dataclass(eq=False)
class ClientRequest(Request):
    """A Request whose client waits, in another thread than the decoding loop's."""
    wake: object = None         # call it when there is news
    detokenizer: object = None
    final: tuple = ()           # the ids that the client gets: ids may go on past a stop text

    def finish_reason(self):
        if self.detokenizer.stopped or self.reason == 'end':
            return 'stop'
        return 'length' if self.reason == 'length' else None


class RequestQueue:
    """Where clients leave their requests for the one decoding loop, which runs in a thread."""

    def __init__(self, decode, limit):
        self.decode, self.limit = decode, limit     # an iterator of requests -> those at work
        self.waiting, self.live, self.changed = [], [], threading.Condition()
        self.open = True
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def put(self, requests):
        if len(requests) > self.limit:
            raise Refusal(f'more than {self.limit} answers at once')
        with self.changed:
            self.waiting = [request for request in self.waiting if not request.cancelled]
            if len(self.waiting) + len(requests) > self.limit:
                raise Refusal('too many requests are waiting; try again soon', 429)
            self.waiting += requests
            self.changed.notify()

    def close(self):
        with self.changed:
            self.open = False
            self.changed.notify()
        self.thread.join()
        self.fail_all()

    def source(self):
        """The decoding loop's iterator of requests; it gives None when there are none."""
        while self.open:
            with self.changed:
                self.waiting = [request for request in self.waiting if not request.cancelled]
                request = self.waiting.pop(0) if self.waiting else None
                if request:
                    self.live.append(request)
            yield request

    def run(self):
        """The thread's life. An error while decoding ends the requests it had, not the server."""
        while self.open:
            try:
                for request in self.decode(self.source()):
                    if not self.open:
                        break
                    if request is None:
                        with self.changed:
                            self.changed.wait_for(lambda: self.waiting or not self.open)
                        continue
                    if request.reason:
                        self.live.remove(request)
                    request.wake()
            except Exception as error:
                print(f'decoding failed: {type(error).__name__}: {error}', file=sys.stderr)
                self.fail_all()
                time.sleep(0.1)     # do not spin if it fails every time

    def fail_all(self):
        with self.changed:
            lost, self.live, self.waiting = self.live + self.waiting, [], []
        for request in lost:
            request.reason = 'error'
            request.wake()


class Completion:
    """A client's call of the API: its requests, and what goes back, whole or chunk by chunk."""

    def __init__(self, endpoint, fields, chat, prompts):
        self.endpoint, self.fields, self.chat = endpoint, fields, chat
        self.changed, self.loop = asyncio.Event(), asyncio.get_running_loop()
        kind = 'chat.completion' if chat else 'text_completion'
        self.head = {'id': ('chatcmpl-' if chat else 'cmpl-') + uuid.uuid4().hex,
                     'object': kind + '.chunk' if chat and fields['stream'] else kind,
                     'created': int(time.time()), 'model': endpoint.name}
        most = fields['max_completion_tokens'] or fields['max_tokens']
        if most is None:
            most = max(1, endpoint.window - len(prompts[0])) if chat else 16
        seed = time.time_ns() % 2 ** 32 if fields['seed'] is None else fields['seed']
        self.requests = [endpoint.request(prompt, most, fields, seed + i, chat)
                         for prompt in prompts for i in range(fields['n'])]
        for request in self.requests:
            request.wake = self.wake
            request.detokenizer = Detokenizer(endpoint.tokenizer, fields['stop'])
            request.reason = '' if most else 'length'       # 0: to score a prompt

    def wake(self):
        """Called from the decoding thread."""
        with contextlib.suppress(RuntimeError):     # the loop has been closed: the server stops
            self.loop.call_soon_threadsafe(self.changed.set)

    def cancel(self):
        for request in self.requests:
            request.cancelled = True

    async def pieces(self, http=None):
        """Yields (request, new text) until all have ended, or the client of http (a stream's is
        watched by Starlette) has left."""
        left = [request for request in self.requests if not request.reason]
        while left:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), 0.5)
            self.changed.clear()
            if http and await http.is_disconnected():
                return
            for request in list(left):
                reason, ids = request.reason, list(request.ids)     # so: the loop is ahead
                if reason == 'error':
                    raise Refusal('decoding failed', 500)
                piece = request.detokenizer.push(ids, last=bool(reason))
                if reason or request.detokenizer.stopped:
                    request.cancelled, request.final = True, ids
                    left.remove(request)
                yield request, piece

    def body(self, choices, usage=False):
        """-> a reply with these choices"""
        read = sum(len(request.prompt) for request in self.requests[::self.fields['n']])
        written = sum(len(request.final) for request in self.requests)
        usage = {'usage': {'prompt_tokens': read, 'completion_tokens': written,
                           'total_tokens': read + written}} if usage else {}
        return {**self.head, 'choices': choices, **usage}

    async def whole(self, score):
        """-> the non-streaming reply. score: async, Endpoint.logprobs"""
        choices = []
        for i, request in enumerate(self.requests):
            text, logprobs = request.detokenizer.text, None
            if self.fields['echo']:
                text = self.endpoint.tokenizer.decode(request.prompt) + text
            if self.fields['logprobs'] is not None:
                logprobs = await score(request.prompt, list(request.final), self.fields['echo'],
                                       self.fields['logprobs'], self.chat)
            said = {'message': {'role': 'assistant', 'content': text}} if self.chat else {
                'text': text}
            choices.append({'index': i, 'finish_reason': request.finish_reason(),
                            'logprobs': logprobs, **said})
        return self.body(choices, usage=True)

    async def stream(self):
        """Yields server-sent events. Starlette closes this generator when the client leaves."""
        def event(request=None, text='', **delta):
            said = {'delta': {**delta, 'content': text}} if self.chat else {'text': text}
            choices = [{'index': self.requests.index(request), 'logprobs': None,
                        'finish_reason': request.finish_reason(), **said}] if request else []
            return b'data: ' + json.dumps(self.body(choices, not request)).encode() + b'\n\n'

        try:
            for request in self.requests if self.chat else ():
                yield event(request, role='assistant')
            async for request, piece in self.pieces():
                if piece or request.finish_reason():
                    yield event(request, piece)
            if self.fields['stream_options'].get('include_usage'):
                yield event()
            yield b'data: [DONE]\n\n'
        except Refusal as refusal:      # it is too late for a status
            yield b'data: ' + json.dumps(refusal.body).encode() + b'\n\n'
        finally:
            self.cancel()


class Api:
    """The HTTP side: routes, and what may come in."""

    def __init__(self, endpoint, queue, local):
        self.endpoint, self.queue, self.local = endpoint, queue, local
        self.scoring = asyncio.Lock()       # one text at a time: it takes memory
        self.app = Starlette(
            routes=[Route('/', self.page), Route('/v1/models', self.models),
                    Route('/v1/completions', self.complete, methods=['POST']),
                    Route('/v1/chat/completions', self.complete, methods=['POST'])],
            exception_handlers=dict.fromkeys((Exception, Refusal, HTTPException), self.refuse))

    async def refuse(self, http, error):
        if isinstance(error, HTTPException):
            error = Refusal(f'there is no {http.method} {http.url.path}', error.status_code)
        elif not isinstance(error, Refusal):
            error = Refusal('the server failed', 500)
        return JSONResponse(error.body, error.status, {'Connection': 'close'})

    def check_origin(self, http):
        """Another host's page must not drive a model here (nor rebind its name to this machine)."""
        host, origin = http.headers.get('host', ''), http.headers.get('origin')
        name = host.rsplit(':', 1)[0] if not host.endswith(']') else host
        if self.local and name not in ('127.0.0.1', 'localhost', '[::1]'):
            raise Refusal(f'this server answers to localhost, not to {host!r}', 403)
        if origin is not None and origin.split('://')[-1] != host:
            raise Refusal(f'a page from {origin!r} may not use this server', 403)

    async def page(self, http):
        self.check_origin(http)
        return FileResponse(PAGE, headers={'X-Content-Type-Options': 'nosniff'})

    async def models(self, http):
        self.check_origin(http)
        return JSONResponse({'object': 'list', 'data': [{
            'id': self.endpoint.name, 'object': 'model', 'created': 0, 'owned_by': 'oneloop',
            'chat': self.endpoint.taught, 'window': self.endpoint.window}]})

    async def complete(self, http):
        self.check_origin(http)
        kind = http.headers.get('content-type', '').split(';')[0].strip()
        if kind != 'application/json':      # a form of another page could send anything else
            raise Refusal('the Content-Type must be application/json', 415)
        if {'content-length', 'transfer-encoding'} <= set(http.headers):
            raise Refusal('a body has a Content-Length or is chunked, not both')
        try:
            body = await asyncio.wait_for(read_body(http), MOST_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal('the body did not come in time', 408) from None
        chat = 'chat' in http.url.path
        fields = read(body, chat)
        prompts = await run_in_threadpool(self.endpoint.prompts, fields, chat)
        completion = Completion(self.endpoint, fields, chat, prompts)
        ignored = ', '.join(name for name in fields['ignored'] if name.isidentifier())[:1000]
        headers = {'X-Ignored-Fields': ignored} if ignored.isascii() and ignored else {}
        self.queue.put([request for request in completion.requests if not request.reason])
        if fields['stream']:
            return StreamingResponse(completion.stream(), media_type='text/event-stream',
                                     headers={'Cache-Control': 'no-store', 'Connection': 'close',
                                              **headers})
        try:
            async for _ in completion.pieces(http):
                pass
            return JSONResponse(await completion.whole(self.score), headers=headers)
        finally:
            completion.cancel()

    async def score(self, *what):
        async with self.scoring:
            return await run_in_threadpool(self.endpoint.logprobs, *what)


async def read_body(http):
    """-> the bytes of a body; one that is too large is read on for a while, so that its client
    sees the answer"""
    body, size = bytearray(), 0
    async for chunk in http.stream():
        size += len(chunk)
        body += chunk if size <= MOST_BYTES else b''
        if size > 4 * MOST_BYTES:
            break
    if size > MOST_BYTES:
        raise Refusal(f'the body is larger than {MOST_BYTES} bytes', 413)
    return body


class Protocol(H11Protocol):
    """uvicorn's HTTP, but a connection on which no request comes is closed, at once if there are as
    many as are allowed."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.began = self.loop.time()
        others = [other for other in self.connections if not other.transport.is_closing()]
        idle = [other for other in others if other.cycle is None and other is not self]
        if len(others) >= MOST_CLIENTS and idle:
            min(idle, key=lambda other: other.began).transport.close()
        self.loop.call_later(MOST_SECONDS, self.check, None)

    def check(self, last):
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(MOST_SECONDS, self.check, self.cycle)


class Server(uvicorn.Server):
    """An Endpoint at http://host:port, until Ctrl-C or should_exit ends run(). decode: an iterator
    of requests -> those at work."""

    def __init__(self, endpoint, decode, host, port, limit):
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        self.socket = socket.create_server((host, port), family=family, backlog=128)
        self.server_port = self.socket.getsockname()[1]
        self.queue = RequestQueue(decode, limit)
        api = Api(endpoint, self.queue, host in ('127.0.0.1', 'localhost', '::1'))
        super().__init__(uvicorn.Config(
            api.app, http=Protocol, log_level='critical', limit_concurrency=MOST_CLIENTS,
            lifespan='off', timeout_graceful_shutdown=2))

    def run(self):
        try:
            super().run(sockets=[self.socket])
        finally:
            self.queue.close()


def main():
    configure(globals())
    model, tokenizer, checkpoint = open_model(out_dir, device, dtype, quantize)
    endpoint = Endpoint(model, tokenizer, checkpoint, Path(out_dir).name, tools)
    try:
        server = Server(endpoint, lambda source: decode(model, source, rows), host, port,
                        queue_limit)
    except OSError as error:
        raise OSError(f'--host={host} --port={port}: {error.strerror or error}; try --port=0'
                      ) from None
    name = f'[{host}]' if ':' in host else host
    print(f'http://{name}:{server.server_port}/ (Ctrl-C ends)', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()


if __name__ == '__main__':
    program(main)
