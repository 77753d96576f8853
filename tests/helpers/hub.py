"""A Hugging Face Hub on this machine: as much of its protocol as huggingface_hub needs to resolve, list and fetch."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


@dataclasses.dataclass
class Repository:
    """One repository, by its commits."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)  # branch or tag -> commit
    gated: bool = False
    then: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # branch -> commit that it is at after the next question
    says: dict[str, bytes] = dataclasses.field(
        default_factory=dict
    )  # path -> what is sent in the place of its contents
    cuts: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # path -> bytes after which the connection breaks, once

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """A new commit with these files, at the head of a branch."""
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """What is there, and what was asked for.

    Attributes:
      url: at the loopback.
      asked: (method, path) of each request for something of a repository, in order.
      others: the same of all other requests.
    """

    def __init__(self, url: str):
        self.url, self.asked, self.others, self._repositories = url, [], [], {}

    def repository(self, name: str) -> Repository:
        """OWNER/NAME of a model, datasets/OWNER/NAME of a data set; made if needed."""
        return self._repositories.setdefault(name, Repository())

    def fetched(self) -> list[str]:
        """Names of the files whose contents were sent."""
        return sorted(path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path)

    def answer(self, handler, method: str) -> None:
        path = urllib.parse.urlsplit(handler.path).path
        kind, api = "", re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
        if api:
            kind, name, what, revision = api.groups()
        else:
            file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not file:
                self.others.append((method, path))
                return _send(handler, 404, {}, b"")
            kind, name, revision, inside = file.groups()
            kind, what = ("datasets" if kind else "models"), "resolve"
        self.asked.append((method, path))
        name = f"datasets/{name}" if kind == "datasets" else name
        if name not in self._repositories:
            return _send(handler, 401, {"X-Error-Code": "RepoNotFound"}, b"")
        repository = self._repositories[name]
        sha = repository.find(urllib.parse.unquote(revision or "main"))
        if sha is None:
            return _send(handler, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
        files = repository.commits[sha]
        if what == "tree":
            return _send(handler, 200, {}, json.dumps([_entry(p, c) for p, c in files.items()]).encode())
        if what != "resolve":
            ref = urllib.parse.unquote(revision or "main")
            if ref in repository.then:
                repository.refs[ref] = repository.then.pop(ref)
            return _send(handler, 200, {}, json.dumps({"id": name, "sha": sha}).encode())
        inside = urllib.parse.unquote(inside)
        if repository.gated:
            return _send(handler, 403, {"X-Error-Code": "GatedRepo"}, b"")
        if inside not in files:
            return _send(handler, 404, {"X-Error-Code": "EntryNotFound"}, b"")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_digest(inside, files[inside])}"', "Accept-Ranges": "bytes"}
        content = repository.says.get(inside, files[inside])
        status, begin = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")):
            status, begin = 206, int(found[1])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        cut = repository.cuts.pop(inside, None) if method == "GET" else None
        _send(handler, status, headers, content[begin:], None if cut is None else cut)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".parquet", ".bin"))


def _digest(path: str, content: bytes) -> str:
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    large = (
        {"lfs": {"oid": _digest(path, content), "size": len(content), "pointerSize": 130}} if _is_large(path) else {}
    )
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest(), **large}


def _send(handler, status: int, headers: dict[str, str], content: bytes, cut: int | None = None) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content[:cut])
    if cut is not None:
        handler.close_connection = True


@contextlib.contextmanager
def serve():
    """A Hub without repositories."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            hub.answer(self, "GET")

        def do_HEAD(self):
            hub.answer(self, "HEAD")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def used(hub: Hub, cache, patch):
    """Inside, huggingface_hub in this process takes it for the Hub, with an empty cache; `patch` is pytest's monkeypatch."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("XDG_CACHE_HOME", str(cache / "xdg"))
    yield hub
