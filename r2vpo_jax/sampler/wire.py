"""JSON over HTTP with a server that may be gone, slow, or answer anything at all.

Only the standard library. Redirects are not followed, proxies are not asked, and no more of an answer is read than it may
have. What fails in passing is tried again until a deadline.
"""

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
import urllib.parse
from typing import Any

from r2vpo_jax.errors import EngineError, UsageError

_PAUSE = 0.1, 5.0  # seconds between two tries: the first, and the longest
_CONNECT = 10.0  # seconds for a connection, if an answer may take longer
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be another one soon
_SHOWN = 300  # letters of an answer in a message
_GONE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class _Passing(Exception):
    """What may go well next time."""


class Wire:
    """Requests to one server, from any number of threads.

    Args:
      url: http or https, host and port, perhaps a path before those that are asked for.
      timeout: seconds for one answer.
      patience: seconds that a request is tried again.
      key: bearer token, "" for none. It is in no message.
    """

    def __init__(self, url: str, *, timeout: float, patience: float, key: str = ""):
        parts = urllib.parse.urlsplit(url)
        self._url, self._parts, self._base = url.rstrip("/"), parts, parts.path.rstrip("/")
        self._timeout, self._patience = timeout, patience
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._local, self._lock = threading.local(), threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self._ended = threading.Event()
        self._retries = 0

    def take_retries(self) -> int:
        """Requests that were sent once more, since this was last asked."""
        with self._lock:
            taken, self._retries = self._retries, 0
        return taken

    def get(self, path: str, *, limit: int) -> Any:
        """What is at a path; as `post`."""
        return self._patiently("GET", path, None, limit)

    def post(self, path: str, body: Any, *, limit: int) -> Any:
        """The answer, read as JSON; None if it is empty.

        Args:
          path: begins with "/".
          body: as JSON has it.
          limit: most bytes of the answer.

        Raises:
          EngineError: there was no answer until the deadline.
          UsageError: the server refuses the request, sends elsewhere, or answers what is no JSON, or too much of it.
        """
        return self._patiently("POST", path, json.dumps(body).encode(), limit)

    def interrupt(self) -> None:
        """Whoever waits for an answer waits no longer, and nothing more is sent until `close`."""
        self._ended.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):  # it has just been closed by the other side
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close what is open, once no thread asks anything; requests may be sent again."""
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()
        self._ended.clear()

    def _patiently(self, method: str, path: str, body: bytes | None, limit: int) -> Any:
        first, pause = time.monotonic(), _PAUSE[0]
        while True:
            try:
                return self._once(method, path, body, limit)
            except _Passing as error:
                waited = time.monotonic() - first
                if waited + pause > self._patience or self._ended.is_set():
                    raise EngineError(
                        f"the engine at {self._url} does not answer {method} {path} ({error}; tried for {waited:.0f} s): see what "
                        "has become of it; then the same command goes on from the last checkpoint"
                    ) from error
            with self._lock:
                self._retries += 1
            self._ended.wait(pause)
            pause = min(2 * pause, _PAUSE[1])

    def _once(self, method: str, path: str, body: bytes | None, limit: int) -> Any:
        deadline = time.monotonic() + self._timeout
        try:
            response = self._send(method, path, body)
            content = self._read(response, limit, deadline)
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            raise _Passing(_words(error)) from error
        except UsageError:
            self._drop()
            raise
        said = f"{method} {path} of the engine at {self._url}"
        if response.status in _PASSING:
            raise _Passing(f"status {response.status}: {_shown(content)}")
        if 300 <= response.status < 400:
            raise UsageError(
                f"{said} is redirected (status {response.status}), which is not followed; give its own address"
            )
        if response.status != 200:
            raise UsageError(f"{said} is refused (status {response.status}): {_shown(content)}")
        if not content.strip():
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{said} answers what is no JSON: {_shown(content)}") from error

    def _send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            try:
                return self._ask(connection, method, path, body)
            except _GONE:  # it was idle for too long for the server: no fault
                self._drop()
        return self._ask(self._connect(), method, path, body)

    def _ask(self, connection, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        connection.timeout = min(self._timeout, _CONNECT)
        if connection.sock is None:
            connection.connect()
        with self._lock:  # from here on `interrupt` finds it
            if self._ended.is_set():
                raise ConnectionAbortedError("nothing is sent any more")
            self._open.add(connection)
        connection.sock.settimeout(self._timeout)
        connection.request(method, self._base + path, body, self._headers)
        return connection.getresponse()

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname, self._parts.port
        if self._parts.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, context=ssl.create_default_context())
        else:
            connection = http.client.HTTPConnection(host, port)
        self._local.connection = connection
        return connection

    def _drop(self) -> None:
        connection, self._local.connection = getattr(self._local, "connection", None), None
        if connection is not None:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _read(self, response: http.client.HTTPResponse, limit: int, deadline: float) -> bytes:
        """The whole body, of at most `limit` bytes."""
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise UsageError(
                    f"the engine at {self._url} answers with more than {limit:,} bytes, which no answer to this request has"
                )
            if time.monotonic() > deadline:
                raise TimeoutError("timed out")
        if response.length:
            raise ConnectionResetError("the answer is cut off")
        response.close()  # read1 does not, at the end of a body: the connection would take no further request
        return b"".join(parts)


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _shown((said or type(error).__name__).encode())


def _shown(content: bytes) -> str:
    """The beginning of what a server says, on one line, without letters that do something to a terminal."""
    text = " ".join(content[: 4 * _SHOWN].decode(errors="replace").split())[:_SHOWN]
    return "".join(letter if letter.isprintable() else "?" for letter in text) or "nothing"
