"""Our own sampler as a server: a small part of OpenAI's completions API, with what vLLM and SGLang add for reinforcement
learning.

    GET  /health, /v1/models
    POST /v1/completions              token ids in and out, log-probabilities of the distribution sampled from, a seed
    POST /update_weights_from_disk    {"model_path": a Hugging Face directory, "weight_version": its name}

It has no authentication: whoever reaches the port can use it, and have it read directories. So it listens to this machine
alone, unless it is told otherwise.
"""

import http.server
import json
import math
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from r2vpo_jax.sampler.serving import Engine, Request, Response, Settings

_MOST_BYTES = 4 << 20  # of a request
_MOST_RESPONSES = 256  # n
_IDLE = 120.0  # seconds that a connection is kept without a request


class _Refused(Exception):
    """What is wrong with a request: (status, text)."""


class Server:
    """It answers from the time it is made until `close`.

    Args:
      engine: answers; closed with the server.
      name: of the model.
      host, port: where it listens; port 0: any that is free.
    """

    def __init__(self, engine: Engine, name: str, *, host: str = "127.0.0.1", port: int = 0):
        """Raises OSError where it cannot listen there."""
        self._engine = engine
        self._http = _Listener((host, port), engine, name)
        self._thread = threading.Thread(target=self._http.serve_forever, name="server", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is."""
        host, port = self._http.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def close(self) -> None:
        """Close the port and every connection, whatever was going on there."""
        self._http.shutdown()
        self._http.server_close()
        self._http.hang_up()
        self._engine.close()
        self._thread.join()


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 1024

    def __init__(self, address, engine: Engine, name: str):
        self.engine, self.name, self.started = engine, name, int(time.time())
        self._connections: set[socket.socket] = set()
        self._lock, self.closed = threading.Lock(), False
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def process_request(self, request, client_address):
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        # A client that hung up is no news, nor are those that we hang up on.
        if not self.closed and not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def hang_up(self) -> None:
        with self._lock:
            self.closed = True
            connections = list(self._connections)
        for connection in connections:
            self.shutdown_request(connection)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "r2vpo_jax", ""
    timeout = _IDLE
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, *_):
        """A line for each request would be thousands."""

    def do_GET(self):
        routes = {"/health": lambda: {}, "/v1/models": self._models}
        self._respond(routes, lambda answer: answer())

    def do_POST(self):
        routes = {"/v1/completions": self._complete, "/update_weights_from_disk": self._load}
        self._respond(routes, lambda answer: answer(self._body()))

    def _respond(self, routes: dict[str, Callable], call) -> None:
        try:
            if self.path not in routes:
                raise _Refused(404, f"there is no {self.path[:100]} here; there is {', '.join(routes)}")
            status, answer = 200, call(routes[self.path])
        except _Refused as refused:
            status, text = refused.args
            answer = {"error": {"message": text, "type": "invalid_request_error", "code": status}}
            self.close_connection = True  # a body may not have been read
        except RuntimeError as error:  # the engine is closed, or has failed
            status, answer = 500, {"error": {"message": str(error), "type": "server_error", "code": 500}}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":  # a page in a browser cannot send that unasked
            raise _Refused(415, "a request must have the Content-Type application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(411, "a request must say its Content-Length")
        if int(length[:20]) > _MOST_BYTES:
            raise _Refused(413, f"a request has at most {_MOST_BYTES} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the body is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise _Refused(400, "the body must be a JSON object")
        return body

    def _models(self) -> dict:
        model = {"id": self.server.name, "object": "model", "created": self.server.started, "owned_by": "r2vpo_jax"}
        return {"object": "list", "data": [model | {"max_model_len": self.server.engine.longest}]}

    def _load(self, body: dict) -> dict:
        path, version = body.get("model_path"), body.get("weight_version", "default")
        if not isinstance(path, str) or not path:
            raise _Refused(400, "model_path must be a directory")
        try:
            self.server.engine.load(path, str(version)[:40]).result()
        except (OSError, ValueError) as error:
            raise _Refused(400, f"model_path={path} is not loaded: {error}") from error
        return {"success": True, "message": f"weights of {path}", "weight_version": self.server.engine.version}

    def _complete(self, body: dict) -> dict:
        requests = _requests(body, self.server.engine, self.server.name)
        responses = [future.result() for future in [self.server.engine.submit(request) for request in requests]]
        choices = [self._choice(number, response, body) for number, response in enumerate(responses)]
        prompt, total = len(requests[0].prompt), sum(len(response.tokens) for response in responses)
        usage = {"prompt_tokens": prompt, "completion_tokens": total, "total_tokens": prompt + total}
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.server.name,
            "choices": choices,
            "usage": usage,
            "metadata": {"weight_version": responses[0].version},
        }

    def _choice(self, number: int, response: Response, body: dict) -> dict:
        tokenizer = self.server.engine.base.tokenizer
        text = tokenizer.decode(response.tokens, skip_special_tokens=body.get("skip_special_tokens") is not False)
        choice = {"index": number, "text": text, "finish_reason": "stop" if response.ended else "length"}
        choice["logprobs"] = None
        if body.get("logprobs") is not None:
            spelled = body.get("return_tokens_as_token_ids") is True
            names = [f"token_id:{i}" if spelled else tokenizer.decode([i]) for i in response.tokens]
            choice["logprobs"] = {"tokens": names, "token_logprobs": response.logps}
        if body.get("return_token_ids") is True:
            choice["token_ids"] = response.tokens
        return choice


# What a request is. Fields that are not here have no effect.


def _requests(body: dict, engine: Engine, name: str) -> list[Request]:
    """The responses that a body asks for.

    Raises:
      _Refused: something is missing, out of range, or cannot be done here.
    """
    model = body.get("model")
    if model is not None and model != name:
        raise _Refused(404, f"there is no model {str(model)[:100]!r}; there is {name!r}")
    for field in ("stream", "echo", "use_beam_search"):
        if body.get(field):
            raise _Refused(400, f"{field} is not there")
    neutral = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    for field, value in neutral.items():
        if body.get(field) not in (None, value):
            raise _Refused(400, f"{field} is not there: leave it at {value}")
    config = engine.base.model.config
    vocabulary = config.num_tokens or config.vocab_size
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        prompt = engine.base.tokenizer(prompt)["input_ids"]
    if not isinstance(prompt, list) or not prompt or not all(_whole(i, 0, vocabulary - 1) for i in prompt):
        raise _Refused(400, f"prompt must be a text, or a list of token ids from 0 to {vocabulary - 1}")
    count = _number(body, "n", 1, low=1, high=_MOST_RESPONSES)
    longest = _number(body, "max_tokens", 16, low=1, high=2**31 - 1)
    if len(prompt) + longest > engine.longest:
        raise _Refused(
            400,
            f"prompt and response have {len(prompt)} + {longest} tokens, and the model has {engine.longest} positions",
        )
    top_k = _number(body, "top_k", -1, low=-1, high=2**31 - 1)
    seed = _number(body, "seed", secrets.randbits(63), low=-(2**63), high=2**63 - 1)
    ids = body.get("stop_token_ids") or []
    if not isinstance(ids, list) or len(ids) > 64 or not all(_whole(i, 0, config.vocab_size - 1) for i in ids):
        raise _Refused(400, "stop_token_ids must be a list of token ids, of at most 64")
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop):
        raise _Refused(400, "stop must be a string or a list of them, of at most 16, none of them empty")
    settings = Settings(
        temperature=_number(body, "temperature", 1.0, low=0.0, high=100.0),
        top_k=max(top_k, 0),
        top_p=_number(body, "top_p", 1.0, low=1e-6, high=1.0),
        eos_ids=tuple(sorted({*engine.base.eos_ids, *ids})),
        stop=tuple(stop),
    )
    return [Request(prompt, longest, seed + number, settings) for number in range(count)]


def _number(body: dict, field: str, default, *, low, high):
    value = body.get(field)
    if value is None:
        return default
    if isinstance(default, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        fits = fits and math.isfinite(value)
    else:
        fits = _whole(value, low, high)
    if not fits:
        raise _Refused(400, f"{field} must be between {low} and {high}")
    return type(default)(value)


def _whole(value, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
