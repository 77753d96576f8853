"""Files on a disk or in an object store (gs://bucket/run): what differs between the two, so that callers need not know.

A path on a disk is a pathlib.Path, an address an etils.epath.Path, which has the same methods for names and for whole
files. A store has no folders to make, no appending, no renaming and no locks; but a file appears there whole or not at
all, and the store knows its checksum. Stores are reached by fsspec; gs:// needs gcsfs: `pip install 'r2vpo_jax[gcs]'`.
"""

import base64
import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from r2vpo_jax import waits
from r2vpo_jax.errors import UsageError

SCHEMES = ("gs", "s3", "az")  # of those of etils.epath; hf:// is hub.py's
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes one slash of two
_MD5, _SHA256 = "md5:", ""  # how a checksum of each kind begins
# What distinguishes two contents of one address, in the words of the stores; the first that a store has.
_CONTENT = ("md5Hash", "crc32c", "ETag", "etag", "content_md5", "blob_id", "updated", "mtime")


def is_address(name) -> bool:
    """Whether this names something outside of the machine's file system."""
    return _ADDRESS.match(os.fspath(name)) is not None


def path(name, flag: str = "path", schemes: Sequence[str] = SCHEMES):
    """The path that a text (or a path) names: pathlib's, or etils.epath's for an address.

    Args:
      name: a file or a folder, which need not be there.
      flag: what named it, for messages.
      schemes: the kinds of address that will do.

    Raises:
      UsageError: an address of another kind, or one whose library is not installed; or a ~ that no shell has replaced.
    """
    text = os.fspath(name)
    if found := _ADDRESS.match(text):
        return _store_path(text, found[1], flag, schemes)
    if pathlib.Path(text).parts[:1] == ("~",):
        raise UsageError(f"{flag}={text}: the shell does not replace ~ there; write the folder's full name, or $HOME")
    return pathlib.Path(text)


def _store_path(text: str, scheme: str, flag: str, schemes: Sequence[str]):
    if scheme not in schemes or not re.match(rf"{scheme}://[^/]", text):
        can = " or ".join(f"{name}://BUCKET/NAME" for name in schemes)
        what = f"is an address, and only folders of this machine{' or ' * bool(can)}{can} will do here"
        advice = "; names on the Hub are for model.path and for data sets (docs/data.md)" if scheme == "hf" else ""
        raise UsageError(f"{flag}={text} {what}; mount the store as a folder, or copy it{advice}")
    # With TensorFlow installed epath would read by that, whose answers differ from those of Orbax's and our own reading.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils import epath

    try:
        _file_system(scheme)
    except ImportError as error:
        extra = "pip install 'r2vpo_jax[gcs]'" if scheme == "gs" else str(error)
        raise UsageError(f"{flag}={text}: {scheme}:// needs a library that is not installed: {extra}") from error
    return epath.Path(text.rstrip("/"))


@functools.cache
def _file_system(scheme: str):
    import fsspec

    # What it cannot do it both logs and raises; a user is to hear it once.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # Listings that are kept miss what other processes have written. So for epath's own file system too.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


def is_store(path) -> bool:
    """Whether a path that `path` has made is an address."""
    return not isinstance(path, pathlib.Path)


def absolute(path):
    """The path, whatever the working directory becomes; links are followed."""
    return path if is_store(path) else path.resolve()


@contextlib.contextmanager
def spoken(path) -> Iterator[None]:
    """Inside, what the libraries of a store raise on a network, on credentials or on rights is an OSError."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or library not in ("gcsfs", "google", "aiohttp", "botocore", "azure", "requests"):
            raise
        raise OSError(f"{path}: {' '.join(str(error).split()) or repr(error)}") from error


def out_of_reach(path, error: OSError) -> bool:
    """Whether a file could not be read because its store was not reached, which says nothing of the file."""
    return is_store(path) and not isinstance(error, FileNotFoundError)


def check(path, flag: str) -> None:
    """Find out whether a store can be reached, before any work is done; a disk is not looked at.

    Raises:
      UsageError: there is no such bucket, or no right to look at it.
    """
    if not is_store(path):
        return
    scheme, _, rest = os.fspath(path).partition("://")
    bucket = rest.partition("/")[0]
    try:
        with spoken(path):
            there = _file_system(scheme).exists(f"{scheme}://{bucket}")
    except OSError as error:
        raise UsageError(f"{flag}={path} cannot be reached ({error}){_rights(scheme)}") from error
    if not there:
        raise UsageError(f"{flag}={path}: there is no bucket {bucket}, or it may not be looked at{_rights(scheme)}")


def _rights(scheme: str) -> str:
    if scheme != "gs":
        return ""
    return (
        "; who runs this needs the roles storage.objectAdmin and storage.legacyBucketReader (docs/pods.md), and at a "
        "desk `gcloud auth application-default login`"
    )


# Whole files -------------------------------------------------------------------------------------------------


def _inside(path) -> tuple:
    """(file system of an address, its name there)."""
    scheme, _, name = os.fspath(path).partition("://")
    return _file_system(scheme), name


def put(path, content: bytes) -> None:
    """Write a file of a store: it appears whole or not at all."""
    system, name = _inside(path)
    with spoken(path):
        system.pipe_file(name, content)


def create(path, content: bytes) -> bool:
    """Write a file of a store unless it is there already, and whether it was written: the store decides who was first."""
    system, name = _inside(path)
    try:
        with spoken(path):
            system.pipe_file(name, content, mode="create")
    except FileExistsError:
        return False
    return True


def read_all(paths: Sequence) -> list[bytes]:
    """The contents of many files; those of a store are read at the same time."""
    if not paths or not is_store(paths[0]):
        return [path.read_bytes() for path in paths]
    system, _ = _inside(paths[0])
    names = [_inside(path)[1] for path in paths]
    with spoken(paths[0]):
        found = system.cat(names)
    return [found[name] for name in names] if isinstance(found, dict) else [found]


def sizes(folder) -> dict[str, int]:
    """Name -> bytes of the files directly in a folder; {} if there is none."""
    if not is_store(folder):
        return {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
    return {name: info["size"] for name, info in _found(folder).items() if "/" not in name}


def size(path) -> int:
    """Bytes of a file; 0 if there is none."""
    if not is_store(path):
        return path.stat().st_size if path.exists() else 0
    system, name = _inside(path)
    try:
        with spoken(path):
            return system.info(name)["size"]
    except FileNotFoundError:
        return 0


def _found(folder) -> dict[str, Mapping]:
    """Name below a folder of a store -> what the store says of the file."""
    system, name = _inside(folder)
    with spoken(folder):
        found = system.find(name, detail=True)
    return {n.removeprefix(name + "/"): info for n, info in sorted(found.items()) if info["type"] == "file"}


def remove_folder(folder) -> None:
    """Delete a folder of a store with all that is in it."""
    system, name = _inside(folder)
    with spoken(folder), contextlib.suppress(FileNotFoundError):
        system.rm(name, recursive=True)


# Checksums ---------------------------------------------------------------------------------------------------


def listing(folder) -> dict[str, str | None]:
    """Name -> checksum that the file system keeps of it (a disk keeps none: None), of all files below a folder."""
    if not is_store(folder):
        return {str(p.relative_to(folder)): None for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: _md5(info) for name, info in _found(folder).items()}


def _md5(info: Mapping) -> str | None:
    kept = info.get("md5Hash")  # Google's; a file put together from several has none
    return kept and _MD5 + base64.b64decode(kept).hex()


def checksum(path, kept: str | None = None, like: str | None = None) -> str:
    """The checksum of a file: what the store keeps of it, or from its contents.

    Args:
      path: the file.
      kept: as `listing` says of it.
      like: a checksum of the same kind is wanted: "md5:…", or a sha256 in hexadecimal digits. None: whatever costs least.
    """
    wants_md5 = kept is not None if like is None else like.startswith(_MD5)
    if wants_md5 and kept is not None:
        return kept
    with spoken(path), path.open("rb") as file:
        name, start = ("md5", _MD5) if wants_md5 else ("sha256", _SHA256)
        return start + hashlib.file_digest(file, name).hexdigest()


# Copies here, and copies there -------------------------------------------------------------------------------


def cache() -> pathlib.Path:
    """The folder of what was fetched; it need not be there, and may be deleted whenever nothing runs."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "r2vpo_jax"


def local_copy(path, names: Sequence[str] = ("*",)) -> pathlib.Path:
    """The file or folder on this machine's disk: itself, or what was fetched from its address into the cache.

    What is there already is fetched again only when the store says that it has changed. The cache is
    $XDG_CACHE_HOME/r2vpo_jax (else ~/.cache/r2vpo_jax); it may be deleted whenever nothing runs.

    Args:
      path: from `path`.
      names: of a folder, the patterns of the files that are wanted; a * also stands for slashes.

    Raises:
      FileNotFoundError: there is nothing at the address.
      OSError: it cannot be read, or not be kept.
    """
    if not is_store(path):
        return path
    system, name = _inside(path)
    with spoken(path):
        whole = system.isfile(name)
        found = {path.name: system.info(name)} if whole else _found(path)
    wanted = {n: i for n, i in found.items() if whole or any(fnmatch.fnmatchcase(n, pattern) for pattern in names)}
    if not wanted:
        raise FileNotFoundError(f"there is nothing at {path}")
    content = {n: [i["size"], next((str(i[k]) for k in _CONTENT if i.get(k)), "")] for n, i in wanted.items()}
    said = json.dumps([os.fspath(path), content], sort_keys=True)
    folder = cache() / hashlib.sha256(said.encode()).hexdigest()[:32]
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of one machine fetch it once
        if not folder.exists():
            fresh = pathlib.Path(tempfile.mkdtemp(dir=cache(), prefix="part."))
            total = sum(info["size"] for info in wanted.values())
            try:
                with waits.told(f"downloading {path}", total, "B") as wait:
                    for n in wanted:
                        target = fresh / n if whole else fresh / path.name / n
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with spoken(path):
                            system.get_file(name if whole else f"{name}/{n}", str(target))
                        if target.stat().st_size != wanted[n]["size"]:
                            raise OSError(f"{path}: {n} has changed while it was fetched; try again")
                        wait.add(wanted[n]["size"])
                fresh.rename(folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder / path.name


@contextlib.contextmanager
def staged(path, last: str) -> Iterator[pathlib.Path]:
    """A folder to fill: `path` itself on a disk; else a temporary one ($TMPDIR), which takes the place of what is at the
    address when it is filled.

    Args:
      path: of the folder.
      last: the file that others take for a sign that the folder is complete. It is uploaded last.
    """
    if not is_store(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="r2vpo_jax.") as folder:
        folder = pathlib.Path(folder)
        yield folder
        system, name = _inside(path)
        files = sorted(listing(folder), key=lambda file: file == last)
        with spoken(path):
            for file in sorted(_found(path), key=lambda file: file != last):
                if file == last or file not in files:
                    system.rm_file(f"{name}/{file}")
            for file in files:
                system.put_file(str(folder / file), f"{name}/{file}")
