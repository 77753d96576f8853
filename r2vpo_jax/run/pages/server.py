"""Pages for a browser on this machine, over the loopback and for nobody else.

The server listens at 127.0.0.1. A request must name it so: a foreign page whose name was made to point here (DNS
rebinding) is refused. It answers GET and HEAD, changes nothing, and gives out no files: pages are looked up by name.
"""

import errno
import http.server
import traceback
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run.pages.markup import POLICY, escaped, page
from r2vpo_jax.run.pages.site import Site

ADDRESS = "127.0.0.1"
_ALLOWED = "GET, HEAD"
_ICON = "/favicon.ico"  # browsers ask for it, and complain where there is none
_HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Handler(http.server.BaseHTTPRequestHandler):
    server_version, sys_version, timeout = "r2vpo_jax", "", 30

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, f"Only {_ALLOWED}.", Allow=_ALLOWED)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _answer(self) -> None:
        if (self.headers.get("Host") or "").lower() not in self.server.hosts:
            self._send(HTTPStatus.MISDIRECTED_REQUEST, f"This is {self.server.url} and answers to no other name.")
            return
        parts = urllib.parse.urlsplit(self.path)
        if parts.path == _ICON:
            self._send(HTTPStatus.NO_CONTENT, "")
            return
        try:
            refresh = urllib.parse.parse_qs(parts.query).get("refresh") != ["off"]
            found = self.server.site.page(parts.path.removeprefix("/"), refresh=refresh)
        except Exception as error:  # said here and there; the next request may find the files whole again
            traceback.print_exc()
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, f"The page could not be made: {error}")
            return
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, "There is no such page.")
        else:
            self._send(HTTPStatus.OK, found)

    def _send(self, status: HTTPStatus, content: str, **headers: str) -> None:
        if status >= HTTPStatus.BAD_REQUEST:
            content = page(status.phrase, f"<h1>{status.phrase}</h1><p>{escaped(content)}</p>")
        body = content.encode("utf-8")
        self.send_response(status)
        for name, value in {**_HEADERS, **headers}.items():
            self.send_header(name, value)
        if body:
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Requests are not worth a line."""


class Server(http.server.ThreadingHTTPServer):
    """Serves a `Site`, once `serve_forever` is called.

    Attributes:
      url: where.
    """

    daemon_threads = True

    def __init__(self, site: Site, port: int):
        """Listen.

        Args:
          site: what is served.
          port: of the loopback; 0: a free one.

        Raises:
          UsageError: the port is taken, or may not be had.
        """
        self.site = site
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            why = "is taken by another program" if taken else f"cannot be had ({error})"
            raise UsageError(f"--port={port} {why}; choose another, or --port=0 for a free one") from error
        names = (ADDRESS, "localhost")
        self.url = f"http://{ADDRESS}:{self.server_port}/"
        self.hosts = {f"{name}:{self.server_port}" for name in names} | set(names if self.server_port == 80 else ())


def serve(workdir, port: int, say: Callable[[str], None]) -> None:
    """Serve the pages of a run, or of a folder of runs, until Ctrl-C.

    Args:
      workdir: of a run or a sweep, or a folder of runs; also in a store.
      port: of the loopback; 0: a free one.
      say: where lines for people go.

    Raises:
      UsageError: there is no run, or the port cannot be had.
    """
    with Server(Site(workdir), port) as server:
        say(f"{workdir} is at {server.url} for browsers on this machine; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")
