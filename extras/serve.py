"""
A chat page (chat.html) and an API like OpenAI's, for many clients at once.

    pip install starlette uvicorn
    python -m extras.serve --out_dir=out-arithmetic-rl

Starlette and uvicorn speak HTTP; the clients' requests wait in one RequestQueue, which feeds the
decoding loop in a thread of its own.
"""
import asyncio
import collections
import contextlib
import functools
import itertools
import json
import socket
import sys
import threading
import time
import uuid
from dataclasses import fields
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
from data.runs import is_taught
from data.tokenizer import Detokenizer
from data.tools import calculator, calls_in
from sample import Request, Sampling, decode, open_model

out_dir = 'out'         # the run to serve; gpt2 or another source of sample.py's --init_from
host = '127.0.0.1'      # 0.0.0.0 lets other machines in
port = 8000             # 0: any that is free; from 0 to 65535
rows = 16               # requests that decode at a time; at least 1
queue_limit = 64        # requests that may wait for a row; more are answered with 429; at least 1
tools = True            # with the calculator, in chats
quantize = ''           # int8: weights of a byte each (extras/int8.py)
device = 'auto'         # cuda, cuda:1, mps or cpu
dtype = 'auto'          # float32, bfloat16 or float16; auto: the fastest here

PAGE = Path(__file__).with_name('chat.html')
MOST_BYTES = 2 ** 20        # of a request's body
MOST_SECONDS = 30           # for a client to send a request
MOST_CLIENTS = 256          # connected at a time

# What each field must be; None is always allowed and means the default.
FIELDS = {
    'model': (str, None), 'prompt': ((str, list), '\n'), 'messages': (list, None),
    'max_tokens': (int, None), 'max_completion_tokens': (int, None), 'n': (int, 1),
    'seed': (int, None), 'stop': ((str, list), None), 'stream': (bool, False),
    'stream_options': (dict, None), 'echo': (bool, False), 'logprobs': ((int, bool), None),
    'top_logprobs': (int, None),
    **{f.name: (f.type, f.default) for f in fields(Sampling)}}
LIMITS = {'max_tokens': (0, 100_000), 'max_completion_tokens': (1, 100_000), 'n': (1, 16),
          'seed': (0, 2 ** 63 - 1), 'logprobs': (0, 20), 'top_logprobs': (0, 20)}
LIMITS |= {name: range_of(text) for name, (_, text) in read_settings(Sampling).items()}
LIMITS['temperature'] = 0, 2    # OpenAI's


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
        fields['logprobs'] = (fields['top_logprobs'] or 0) if fields['logprobs'] else None
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


class Endpoint:
    """What is served: a model, to which texts and conversations come as prompts of Requests."""

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
        return ids or self.tokenizer.begin

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
        return self.tokenizer.fit(turns if system else [[], *turns], room)[0]

    def request(self, prompt, most, fields, seed, chat):
        return Request(prompt, most, Sampling.of(fields), seed, self.ends,
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


class RequestQueue:
    """Where clients leave their requests for the one decoding loop, which runs in a thread."""

    def __init__(self, decode, limit):
        self.decode, self.limit = decode, limit     # an iterator of Requests -> those at work
        self.waiting, self.live, self.changed = collections.deque(), [], threading.Condition()
        self.open = True
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

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
                request.cancelled, request.reason = True, request.reason or 'error'
                request.wake()
            self.changed.notify()
        self.thread.join()

    def source(self):
        """The decoding loop's iterator of requests; it gives None when there are none."""
        while self.open:
            with self.changed:
                request = self.waiting.popleft() if self.waiting else None
                if request and not request.cancelled:
                    self.live.append(request)
            if request is None or not request.cancelled:
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
                            self.changed.wait_for(lambda: self.waiting or not self.open, 1)
                        continue
                    if request.reason:
                        self.live.remove(request)
                    request.wake()
            except Exception as error:
                print(f'decoding failed: {type(error).__name__}: {error}', file=sys.stderr)
                with self.changed:
                    lost, self.live = [*self.live, *self.waiting], []
                    self.waiting.clear()
                for request in lost:
                    request.reason = 'error'
                    request.wake()
                time.sleep(0.1)     # if it fails at once and always, let it not spin


def requests_of(endpoint, values, chat, limit):
    """The fields of a body -> Requests. Refusal for what cannot be answered."""
    try:
        prompts = ([endpoint.conversation(values['messages'])] if chat
                   else [endpoint.encode(prompt) for prompt in values['prompt']])
    except ValueError as error:     # a character or an id that the model never saw
        raise Refusal(str(error)) from None
    for ids in prompts:
        if len(ids) > endpoint.window:
            raise Refusal(f'the prompt has {len(ids)} tokens; this model sees {endpoint.window}',
                          param='messages' if chat else 'prompt')
    if values['stream'] and (values['echo'] or values['logprobs'] is not None):
        raise Refusal('echo and logprobs are not given in a stream')
    most = values['max_completion_tokens'] or values['max_tokens']
    if most is None:
        most = max(1, endpoint.window - len(prompts[0])) if chat and endpoint.taught else (
            endpoint.window // 2 if chat else 16)
    if len(prompts) * values['n'] > limit:
        raise Refusal(f'more than {limit} answers at once')
    first = values['seed'] if values['seed'] is not None else time.time_ns() % 2 ** 32
    requests = [endpoint.request(prompt, most, values, first + i, chat)
                for prompt in prompts for i in range(values['n'])]
    for request in requests:
        request.detokenizer = Detokenizer(endpoint.tokenizer, values['stop'])
        request.final = []
        request.reason = '' if most else 'length'   # to score a prompt
    return requests


async def pieces(requests, changed, http=None):
    """Yields (request, new text) until all have ended, or the client of http (a stream's client is
    watched by Starlette) has left. changed: an Event set when they have more"""
    left = [request for request in requests if not request.reason]
    while left:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), 0.5)
        changed.clear()
        if http and await http.is_disconnected():
            return
        for request in list(left):
            reason, ids = request.reason, list(request.ids)     # in this order: the loop is ahead
            if reason == 'error':
                raise Refusal('decoding failed', 500)
            piece = request.detokenizer.push(ids, last=bool(reason))
            if reason or request.detokenizer.stopped:
                request.cancelled = True
                request.final = ids
                left.remove(request)
            yield request, piece


def wake(loop, changed):
    """Set a client's Event from the decoding thread."""
    with contextlib.suppress(RuntimeError):     # the loop has been closed: the server stops
        loop.call_soon_threadsafe(changed.set)


def cancel(requests):
    for request in requests:
        request.cancelled = True


def finish_reason(request):
    if request.detokenizer.stopped or request.reason == 'end':
        return 'stop'
    return 'length' if request.reason == 'length' else None


def token_counts(requests, values):
    return (sum(len(request.prompt) for request in requests[::values['n']]),
            sum(len(request.final) for request in requests))


class Api:
    """The HTTP side: routes, and what a client sends and gets."""

    def __init__(self, endpoint, queue, local):
        self.endpoint, self.queue, self.local = endpoint, queue, local
        self.scoring = asyncio.Lock()       # one text at a time: it takes memory
        self.app = Starlette(
            routes=[Route('/', self.page), Route('/v1/models', self.models),
                    Route('/v1/completions', self.complete, methods=['POST']),
                    Route('/v1/chat/completions', self.complete, methods=['POST'])],
            exception_handlers={Exception: self.refuse, Refusal: self.refuse,
                                HTTPException: self.refuse})

    async def refuse(self, http, error):
        if isinstance(error, HTTPException):
            error = Refusal(f'there is no {http.method} {http.url.path}', error.status_code)
        elif not isinstance(error, Refusal):
            error = Refusal('the server failed', 500)
        return JSONResponse(error.body, error.status, {'Connection': 'close'})

    def check_origin(self, http):
        """Another host's page must not drive a model here (nor rebind its name to this machine)."""
        host = http.headers.get('host', '')
        name = host.rsplit(':', 1)[0] if not host.endswith(']') else host
        if self.local and name not in ('127.0.0.1', 'localhost', '[::1]'):
            raise Refusal(f'this server answers to localhost, not to {host!r}', 403)
        origin = http.headers.get('origin')
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
        chat = 'chat' in http.url.path
        kind = http.headers.get('content-type', '').split(';')[0].strip()
        if kind != 'application/json':      # a form of another page could send anything else
            raise Refusal('the Content-Type must be application/json', 415)
        try:
            body = await asyncio.wait_for(read_body(http), MOST_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal('the body did not come in time', 408) from None
        values, loop, changed = read(body, chat), asyncio.get_running_loop(), asyncio.Event()
        requests = requests_of(self.endpoint, values, chat, self.queue.limit)
        for request in requests:
            request.wake = functools.partial(wake, loop, changed)
        self.queue.put([request for request in requests if not request.reason])
        if values['stream']:
            return StreamingResponse(self.stream(requests, changed, values, chat),
                                     media_type='text/event-stream',
                                     headers={'Cache-Control': 'no-store', 'Connection': 'close'})
        try:
            async for _ in pieces(requests, changed, http):
                pass
            return JSONResponse(await self.whole(requests, values, chat))
        finally:
            cancel(requests)

    async def whole(self, requests, values, chat):
        """-> the body of a reply that is no stream"""
        reply, choices = Reply(self.endpoint.name, chat, stream=False), []
        for i, request in enumerate(requests):
            text, logprobs = request.detokenizer.text, None
            if values['echo']:
                text = self.endpoint.tokenizer.decode(request.prompt) + text
            if values['logprobs'] is not None:
                async with self.scoring:
                    logprobs = await run_in_threadpool(
                        self.endpoint.logprobs, request.prompt, request.final, values['echo'],
                        values['logprobs'], chat)
            choices.append(reply.choice(i, text, finish_reason(request), logprobs))
        return reply.body(choices, *token_counts(requests, values))

    async def stream(self, requests, changed, values, chat):
        """Yields server-sent events. Starlette closes this generator when the client leaves."""
        reply = Reply(self.endpoint.name, chat, stream=True)
        try:
            async for request, piece in pieces(requests, changed):
                reason = finish_reason(request)
                if piece or reason:
                    choice = reply.choice(requests.index(request), piece, reason)
                    yield event(reply.body([choice]))
            if (values['stream_options'] or {}).get('include_usage'):
                yield event(reply.body([], *token_counts(requests, values)))
            yield b'data: [DONE]\n\n'
        except Refusal as refusal:      # it is too late for a status
            yield event(refusal.body)
        finally:
            cancel(requests)


async def read_body(http):
    """-> the bytes of a body; one that is too large is read on for a while, so that its client
    sees the answer"""
    body, size = [], 0
    async for chunk in http.stream():
        size += len(chunk)
        body += [chunk] if size <= MOST_BYTES else []
        if size > 4 * MOST_BYTES:
            break
    if size > MOST_BYTES:
        raise Refusal(f'the body is larger than {MOST_BYTES} bytes', 413)
    return b''.join(body)


class Protocol(H11Protocol):
    """uvicorn's HTTP, but a connection on which no request comes is closed."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.loop.call_later(MOST_SECONDS, self.check, None)

    def check(self, last):
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(MOST_SECONDS, self.check, self.cycle)


class Server:
    """
    An Endpoint at http://host:port, until run() ends by Ctrl-C or, if it was made as a context and
    runs in a thread, the context ends. decode: an iterator of Requests -> those at work.
    """

    def __init__(self, endpoint, decode, host, port, limit):
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        self.socket = socket.create_server((host, port), family=family, backlog=128)
        self.server_port = self.socket.getsockname()[1]
        self.queue = RequestQueue(decode, limit)
        api = Api(endpoint, self.queue, host in ('127.0.0.1', 'localhost', '::1'))
        self.http = uvicorn.Server(uvicorn.Config(
            api.app, http=Protocol, log_level='critical', limit_concurrency=MOST_CLIENTS,
            lifespan='off', timeout_graceful_shutdown=2))

    def run(self):
        try:
            self.http.run(sockets=[self.socket])
        finally:
            self.queue.close()

    def __enter__(self):
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        while not self.http.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.http.should_exit = True
        self.thread.join()


def main():
    configure(globals())
    try:
        model, tokenizer, checkpoint = open_model(out_dir, device, dtype)
        if quantize:
            from extras.int8 import quantize_model
            quantize_model(model, quantize)
        endpoint = Endpoint(model, tokenizer, checkpoint, Path(out_dir).name, tools)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    try:
        server = Server(endpoint, lambda source: decode(model, source, rows), host, port,
                        queue_limit)
    except OSError as error:
        sys.exit(f'--host={host} --port={port}: {error.strerror or error}; try --port=0')
    print(f'http://{host}:{server.server_port}/ (Ctrl-C ends)', flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()


if __name__ == '__main__':
    main()
