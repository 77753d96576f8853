"""Servers that stand in for an inference engine: one that answers what a test says, and our own sampler."""

import contextlib
import http.server
import json
import sys
import threading
import time

from r2vpo_jax.config import ModelConfig
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.sampler.server import Server
from r2vpo_jax.sampler.serving import Engine

MODELS = {"object": "list", "data": [{"id": "policy", "object": "model", "max_model_len": 64}]}


class Stub:
    """A server on loopback whose answers are a function's: (path, body) -> (status, object or bytes, headers).

    Attributes:
      seen: (path, body, headers) of each request.
    """

    def __init__(self, answer):
        self.answer, self.seen, self.ended = answer, [], threading.Event()
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20

            def do_GET(self):
                self._respond(None)

            def do_POST(self):
                self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _respond(self, body):
                stub.seen.append((self.path, body, dict(self.headers)))
                status, said, headers = stub.answer(self.path, body)
                if status is None:  # hangs up
                    self.close_connection = True
                    return
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # it had read enough
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Listener(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                if not isinstance(sys.exception(), ConnectionError):  # clients hang up here
                    super().handle_error(*_)

        self.handler = Handler
        self._http = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def hang(self):
        """Until the test is over, and ten seconds at most."""
        self.ended.wait(10)

    def close(self):
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()


@contextlib.contextmanager
def stub(answer):
    """A `Stub`, closed afterwards."""
    server = Stub(answer)
    try:
        yield server
    finally:
        server.close()


def completion(tokens, logps=None, finish="stop", **more):
    """An answer of /v1/completions with one response."""
    logps = [-0.5] * len(tokens) if logps is None else logps
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": finish,
        "token_ids": tokens,
        "logprobs": {"token_logprobs": logps},
    }
    return {"object": "text_completion", "choices": [choice]} | more


@contextlib.contextmanager
def served(path, weights="compute", compute_dtype="float32"):
    """Our own sampler as a server, of the model in a directory."""
    base = open_base_model(ModelConfig(path=str(path), compute_dtype=compute_dtype))
    server = Server(Engine(base, weights=weights, batch_size=16), "policy")
    try:
        yield server
    finally:
        server.close()


def wait_for(condition, seconds=20.0):
    """Until it holds; AssertionError where it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)
