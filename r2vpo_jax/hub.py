"""Names on the Hugging Face Hub in the place of paths: hf://OWNER/NAME@REVISION, by the library huggingface_hub.

Nothing here goes to a network unless a name begins with hf://. Such a name is first resolved to a commit, once; then the files
that are read, and no others, are fetched into huggingface_hub's own cache and compared with the digests that the Hub states.
HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and so on mean what they mean to that library. Every process fetches for itself; its
locks let those of one host wait for each other, so that a file is fetched once.

What names were resolved to is kept by `resolving`: inside of it a branch that moves does not move what is read.
"""

import contextlib
import contextvars
import glob
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

from r2vpo_jax import storage, waits
from r2vpo_jax.errors import UsageError

SCHEME = "hf://"
_NAME = re.compile(r"hf://[^\s?,]+")
_FORMS = "hf://OWNER/NAME, hf://OWNER/NAME@REVISION and hf://datasets/OWNER/NAME@REVISION/path/in/repository.parquet"
_LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


def is_name(text) -> bool:
    """Whether this names something on the Hub."""
    return os.fspath(text).startswith(SCHEME)


def names_in(text: str) -> list["Name"]:
    """The names that a text mentions, such as that of a mixture of data sets."""
    return [Name(found) for found in _NAME.findall(text)]


class Name:
    """A name, taken apart.

    Attributes:
      text: as it was written.
      kind: "model" or "dataset".
      id: OWNER/NAME.
      revision: branch, tag or commit; None: main.
      path: of a file or folder in the repository; "": all of it.

    Raises:
      UsageError: it is none.
    """

    def __init__(self, text: str):
        import huggingface_hub
        from huggingface_hub.errors import HfUriError

        try:
            found = huggingface_hub.parse_hf_uri(text)
        except HfUriError as error:
            raise UsageError(f"{text} is no name on the Hub ({error.msg}); names are {_FORMS}") from error
        if found.type not in ("model", "dataset"):
            raise UsageError(f"{text} names a {found.type}, and only models and data sets are read; names are {_FORMS}")
        self.text, self.kind, self.id = text, found.type, found.id
        self.revision, self.path = found.revision, found.path_in_repo

    @property
    def repository(self) -> str:
        """The name without the path."""
        prefix = "datasets/" if self.kind == "dataset" else ""
        return f"{SCHEME}{prefix}{self.id}" + (f"@{self.revision.replace('/', '%2F')}" if self.revision else "")


# What names were resolved to ---------------------------------------------------------------------------------


class Resolved:
    """What names mean, each once asked.

    Attributes:
      found: name of a repository -> {"commit": its 40 digits, "files": {path: digest}}, of what was asked for.
    """

    def __init__(self, begun: Mapping[str, Mapping], outer: "Resolved | None" = None, share=None):
        self._begun, self._outer = dict(begun), outer
        self._share = share or (outer._share if outer else lambda question, value: value)
        self.found: dict[str, dict] = {}

    def commit(self, name: Name) -> str:
        """The commit of a name's repository: what this was begun with, else what the part of the program around it finds,
        else what the Hub says now, and without one its cache.

        Raises:
          UsageError: there is none, or the Hub cannot be asked.
        """
        key = name.repository
        if key not in self.found:
            if key in self._begun:
                commit = self._begun[key]["commit"]
            else:
                commit = self._outer.commit(name) if self._outer else _ask_for_commit(name)
            self.found[key] = {"commit": self._share(f"the commit of {key}", commit), "files": {}}
        return self.found[key]["commit"]

    def is_begun(self, name: Name) -> bool:
        """Whether the commit of a name's repository is what something was begun with."""
        return name.repository in self._begun or (self._outer is not None and self._outer.is_begun(name))

    def add(self, name: Name, files: Mapping[str, str]) -> None:
        """Files of a name's repository were read, with these digests.

        Raises:
          UsageError: they had others before.
        """
        before = self._begun.get(name.repository, {}).get("files", {})
        for path, digest in files.items():
            if before.get(path, digest) != digest:
                raise UsageError(
                    f"{name.text}: {path} is not the file that this was begun with ({digest} now, {before[path]} then), though the "
                    "commit is the same; put the cache or HF_ENDPOINT back as it was, or start anew"
                )
        self.found[name.repository]["files"].update(files)

    def lines(self) -> list[str]:
        """For people: what each name was resolved to."""
        lines = []
        for key, found in sorted(self.found.items()):
            files = f", {len(found['files'])} files of digest {digest(found['files'])}" if found["files"] else ""
            lines.append(f"{key}: commit {found['commit']}{' as before' * (key in self._begun)}{files}")
        return lines


_resolved = contextvars.ContextVar("resolved", default=None)


def resolved() -> Resolved:
    """What is in force here; outside of `resolving` each call begins with nothing."""
    return _resolved.get() or Resolved({})


@contextlib.contextmanager
def resolving(
    begun: Mapping[str, Mapping] | None = None, share: Callable[[str, str], str] | None = None
) -> Iterator[Resolved]:
    """Inside, a name is resolved once, and those that something was begun with are what they were then.

    Args:
      begun: as `Resolved.found`; None: what is in force goes on, if anything is.
      share: (question, value) -> process 0's value, where there are several; all ask the same questions in the same order.
    """
    outer = _resolved.get()
    inner = outer if outer and begun is None else Resolved(begun or {}, outer, share)
    token = _resolved.set(inner)
    try:
        yield inner
    finally:
        _resolved.reset(token)


def digest(files: Mapping[str, str]) -> str:
    """16 hexadecimal digits of file names and their digests."""
    return hashlib.sha256("\n".join(f"{path} {files[path]}" for path in sorted(files)).encode()).hexdigest()[:16]


# Files -------------------------------------------------------------------------------------------------------


def folder(text: str, names: Sequence[str]) -> pathlib.Path:
    """The folder on this machine that has the files of a name.

    Args:
      text: hf://…; its path is that of a folder.
      names: patterns of the files that are wanted, below that folder; those that there are are fetched and compared.

    Raises:
      UsageError: there is no such repository, revision or right; the Hub cannot be reached, and the files are not in the cache;
        or a file has other contents than the Hub states.
    """
    name, here = Name(text), resolved()
    prefix = f"{glob.escape(name.path)}/" if name.path else ""
    root = _fetch(here, name, [prefix + pattern for pattern in names])
    inside = root / name.path
    there = [path for pattern in names for path in sorted(inside.glob(pattern)) if path.is_file()]
    _compare(here, name, root, there)
    return inside


def files(text: str, choose: Callable[[pathlib.Path], Sequence[pathlib.Path]]) -> list[pathlib.Path]:
    """Files of a repository that are chosen by their names, before any of them is fetched.

    Args:
      text: hf://…, of a file or a folder.
      choose: given a path with empty files of all those names below it (or that is one), the paths that are wanted.

    Raises:
      UsageError: as `folder`; or there is nothing of that name.
      FileNotFoundError, ValueError: of `choose`.
    """
    name, here = Name(text), resolved()
    listed = [
        path for path in _listing(here, name) if path == name.path or path.startswith(f"{name.path}/" * bool(name.path))
    ]
    if not listed:
        raise UsageError(f"{text}: there is no {name.path or 'file'} in {name.repository}")
    with tempfile.TemporaryDirectory(prefix="r2vpo_jax.") as temporary:
        base = pathlib.Path(temporary, name.id.partition("/")[2])
        for path in listed:
            (base / path).parent.mkdir(parents=True, exist_ok=True)
            (base / path).touch()
        try:
            chosen = [path.relative_to(base).as_posix() for path in choose(base / name.path)]
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(
                str(error).replace(str(base / name.path), text).replace(str(base), name.repository)
            ) from None
    root = _fetch(here, name, [glob.escape(path) for path in chosen])
    _compare(here, name, root, [root / path for path in chosen])
    return [root / path for path in chosen]


def _ask_for_commit(name: Name) -> str:
    import huggingface_hub

    with _spoken(name):
        api = huggingface_hub.HfApi()
        return api.resolve_revision(name.id, repo_type=name.kind, revision=name.revision).resolved


def _listing(here: Resolved, name: Name) -> list[str]:
    """The paths of all files: of a commit, so that what is in the cache does not grow old."""
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    where = {"repo_id": name.id, "repo_type": name.kind, "revision": here.commit(name)}
    with _spoken(name, here):
        try:
            return [file.path for file in huggingface_hub.get_cached_repo_tree(**where)]
        except CachedRepoTreeNotFoundError:
            tree = huggingface_hub.HfApi().list_repo_tree(recursive=True, **where)
            return [entry.path for entry in tree if isinstance(entry, huggingface_hub.hf_api.RepoFile)]


def _fetch(here: Resolved, name: Name, patterns: Sequence[str]) -> pathlib.Path:
    import huggingface_hub

    commit = here.commit(name)
    with _spoken(name, here), waits.told(f"downloading {name.text}", unit="B") as wait:
        root = huggingface_hub.snapshot_download(
            name.id, repo_type=name.kind, revision=commit, allow_patterns=list(patterns), tqdm_class=_counter(wait)
        )
    return pathlib.Path(root)


def _counter(wait: waits.Wait) -> type:
    """What huggingface_hub takes for a progress bar: it counts the bytes, and shows nothing itself."""
    from tqdm.auto import tqdm

    class Counter(tqdm):
        def __init__(self, *args, **options):
            self._of_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n=1):
            self.n += n or 0
            if self._of_bytes:  # there is a bar for what was received and one for what was written: the further one
                wait.reach(self.n, self.total)

    return Counter


@contextlib.contextmanager
def _spoken(name: Name, here: Resolved | None = None) -> Iterator[None]:
    """Inside, what huggingface_hub raises is one line that says what to do."""
    import huggingface_hub.errors as errors
    from huggingface_hub import constants

    revision = f" --revision {name.revision}" if name.revision else ""
    kind = " --repo-type dataset" if name.kind == "dataset" else ""
    page = f"{constants.ENDPOINT}/{'datasets/' if name.kind == 'dataset' else ''}{name.id}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(f"{name.text} is gated: accept its conditions at {page}, and {_LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{name.text}: there is no {name.kind} {name.id} at {constants.ENDPOINT}, or it may not be seen; if it is private, {_LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        if here is None or not here.is_begun(name):
            raise UsageError(
                f"{name.text}: {name.id} has no branch, tag or commit {name.revision or 'main'}"
            ) from error
        raise UsageError(
            f"{name.text}: {name.id} no longer has the commit {here.commit(name)}, which this was begun with; put its files back into the "
            f"cache {constants.HF_HUB_CACHE}, or start anew"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.RemoteEntryNotFoundError):
            raise UsageError(f"{name.text}: there is no such file in {name.id} ({_first_line(error)})") from error
        raise UsageError(_not_here(name, error, revision, kind)) from error
    except errors.RevisionResolutionError as error:
        raise UsageError(_not_here(name, error, revision, kind)) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise UsageError(f"{name.text} cannot be fetched: {_first_line(error)}") from error
    except Exception as error:  # of the library that it speaks HTTP by, and of Xet
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet"):
            raise
        raise UsageError(
            f"{name.text} cannot be fetched: {_first_line(error)}; the same command tries again"
        ) from error


def _not_here(name: Name, error: Exception, revision: str, kind: str) -> str:
    from huggingface_hub import constants

    offline = constants.is_offline_mode()
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached ({_reason(error)})"
    return (
        f"{name.text} is not in the cache {constants.HF_HUB_CACHE}, or not all of it, and {why}; run `hf download {name.id}{kind}{revision}` "
        f"where there is a network, {'take HF_HUB_OFFLINE away, ' * offline}or give the path of a folder that has the files"
    )


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


# Contents ----------------------------------------------------------------------------------------------------


def _compare(here: Resolved, name: Name, root: pathlib.Path, paths: Sequence[pathlib.Path]) -> None:
    """Compare files of the cache with their digests, unless that was done before, and note them.

    The cache names a blob by what the Hub states of it: sha256 of a large file (LFS, Xet), else git's sha1.
    """
    digests = {}
    for path in dict.fromkeys(paths):
        blob = _blob(path)
        stated = blob.name if blob else ""
        if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", stated):
            _compare_one(name, path, blob, stated)
            digests[path.relative_to(root).as_posix()] = f"{'sha256' if len(stated) == 64 else 'sha1'}:{stated}"
        else:  # a cache without links does not say what should be in a file: what is in it is noted
            digests[path.relative_to(root).as_posix()] = f"sha256:{_sha256(path)}"
    here.add(name, digests)


def _blob(path: pathlib.Path) -> pathlib.Path | None:
    return pathlib.Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else None


def _compare_one(name: Name, path: pathlib.Path, blob: pathlib.Path, stated: str) -> None:
    status = path.stat()
    key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{stated}"
    mark = storage.cache() / "compared" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if mark.exists():
        return
    found = _sha256(path) if len(stated) == 64 else _git_sha1(path)
    if found != stated:
        path.unlink()
        blob.unlink()
        raise UsageError(
            f"{name.text}: {path.name} is damaged: its digest is {found}, and the Hub states {stated}; it was taken out of the cache, and "
            "the same command fetches it again"
        )
    with contextlib.suppress(OSError):  # where nothing can be kept, it is compared again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _sha256(path: pathlib.Path) -> str:
    hashed = hashlib.sha256()
    with (
        path.open("rb") as file,
        waits.told(f"comparing {path.name} with its digest", path.stat().st_size, "B") as wait,
    ):
        while block := file.read(1 << 22):
            hashed.update(block)
            wait.add(len(block))
    return hashed.hexdigest()


def _git_sha1(path: pathlib.Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
