"""The directory of one run: whose it is, who works in it now, and what may change in between."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Callable

from r2vpo_jax import cluster, hub, storage
from r2vpo_jax import config as config_lib
from r2vpo_jax.config import Config, continuing
from r2vpo_jax.config.continuing import Changes
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files, lease

_CONFIG = "config.json"
_HUB = "hub.json"  # what names on the Hub were resolved to, where there are any
_LOCK = "lock"  # a file; what counts is who holds it, not that it is there
_STORES = ("gs",)  # where Orbax can write


def folder(path, flag="--workdir", *, store=True):
    """The path of a directory that is written to: on a disk, or at gs:// (storage.path).

    Args:
      path: a text or a path.
      flag: what named it.
      store: whether an address will do.

    Raises:
      UsageError: it is another address, or begins with a ~ that no shell has replaced; or its bucket cannot be reached.
    """
    found = storage.path(path, flag, _STORES if store else ())
    storage.check(found, flag)
    return found


# Who works in it ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir, *, say: Callable[[str], None], flag="--workdir"):
    """Inside, no other process (and nobody else in this one) works in the directory; it is made if needed.

    On a disk the lock is the operating system's and is gone with the process that holds it, however that ends. Its file is
    there meanwhile, and after a crash, when it locks nothing. In a store it is a lease, which runs out (run/lease.py).

    Yields:
      A function that raises UsageError once the directory was lost, as a lease can be.

    Raises:
      UsageError: somebody else works there, or it cannot be written to.
    """
    path = folder(workdir, flag)
    if storage.is_store(path):
        with files.disk_errors(f"{flag}={path}"):
            held = lease.take(path, flag, say)
        with contextlib.closing(held):
            yield held.check
        return
    with files.disk_errors(f"{flag}={path}"):
        path.mkdir(parents=True, exist_ok=True)
    descriptor, locked = _open_locked(path, flag, say)
    try:
        with files.disk_errors(f"{flag}={path}"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield lambda: None
    finally:
        if locked:
            (path / _LOCK).unlink(missing_ok=True)  # while it is held: nobody can have taken it
        os.close(descriptor)


def _open_locked(path: pathlib.Path, flag: str, say) -> tuple[int, bool]:
    """(file descriptor of the lock's file, whether it is locked); it is not where the file system has no locks."""
    while True:
        with files.disk_errors(f"{flag}={path}"):
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = _in_use(path, descriptor, flag)
            os.close(descriptor)
            raise UsageError(message) from error
        except OSError as error:  # not all network file systems have locks
            say(f"note: {path} cannot be locked ({error.strerror}): see to it that nobody else works in it")
            return descriptor, False
        # Whoever held it may have taken the file away since it was opened: then this one locks nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path / _LOCK)):
                return descriptor, True
        os.close(descriptor)


def refuse_if_in_use(workdir, flag="--workdir") -> None:
    """What `lock` would refuse, found early and without writing anything.

    Raises:
      UsageError: somebody else works in the directory.
    """
    path = folder(workdir, flag)
    if storage.is_store(path):
        lease.refuse_if_in_use(path, flag)
        return
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR)
    except OSError:
        return  # nobody has worked there yet; whether it can be written to is found when it is
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(_in_use(path, descriptor, flag)) from error
    except OSError:
        return  # no locks here: `lock` says so
    finally:
        os.close(descriptor)


def _in_use(path: pathlib.Path, descriptor: int, flag: str) -> str:
    who = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
    return f"{path} is in use by {who}; wait until that has ended, stop it, or choose another {flag}"


# Whose it is -------------------------------------------------------------------------------------------------


def claim(workdir, config: Config, *, write=True) -> Changes:
    """Make the directory this run's own, or find that it already is.

    Args:
      workdir: created if needed.
      config: the run's; written to config.json of a new directory.
      write: False on processes that only read.

    Returns:
      What the run may go on with although it was started with something else; `record` keeps it.

    Raises:
      UsageError: the directory belongs to a run with another configuration, or cannot be written.
    """
    changes = Changes()

    def differences(there: dict, here: dict):
        nonlocal changes
        changes = continuing.compare(there, here)
        return changes.refused

    claim_file(workdir, _CONFIG, config_lib.to_dict(config), write=write, differences=differences)
    return changes


def resolving(workdir, *others):
    """A context in which names on the Hub are what they were when something in `workdir` was begun (`record_names`).

    Args:
      workdir: of a run, an evaluation or a sweep, new or not.
      others: directories, or None, of what this is made of; where they know a name, and `workdir` does not, they count.

    Raises:
      UsageError: a record cannot be read.
    """
    begun = {}
    for place in (*others, workdir):
        if place is not None and not hub.is_name(place):
            begun |= _read_names(storage.path(place))
    return hub.resolving(begun, cluster.of_first)


def _read_names(path) -> dict:
    file = path / _HUB
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not valid JSON ({error}); take it away, and names are resolved anew") from error


def record_names(workdir, say: Callable[[str], None]) -> None:
    """Keep what names on the Hub were resolved to until now, and say it."""
    found = hub.resolved()
    if found.found:
        path = folder(workdir)
        before = _read_names(path)
        files_before = {name: before[name]["files"] for name in found.found.keys() & before.keys()}
        now = {name: {**one, "files": files_before.get(name, {}) | one["files"]} for name, one in found.found.items()}
        _write(path / _HUB, before | now)
        for line in found.lines():
            say(line)


def record(workdir, config: Config) -> None:
    """Write the configuration that the run goes on with to config.json."""
    _write(folder(workdir) / _CONFIG, config_lib.to_dict(config))


def _all_differences(there: dict, here: dict):
    changes = continuing.compare(there, here)
    return sorted((*changes.refused, *changes.accepted))


def claim_file(workdir, name: str, identity: dict, *, write=True, flag="--workdir", differences=_all_differences):
    """`claim` for any JSON identity kept in `workdir/name`.

    Args:
      workdir: created if needed.
      name: of the file.
      identity: what is compared, or written to a new directory.
      write: False on processes that only read.
      flag: the one that names the directory.
      differences: (identity there, identity here) -> the differences that are refused, as texts.

    Returns:
      The directory.

    Raises:
      UsageError: the identities differ, or the directory cannot be written.
    """
    path = folder(workdir, flag)
    file, mine = path / name, json.loads(json.dumps(identity))
    if file.exists():
        try:
            theirs = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise UsageError(f"{file} is not valid JSON ({error}); choose another {flag}") from error
        if refused := differences(theirs, mine):
            raise UsageError(
                f"{path} holds a run with another configuration ({'; '.join(refused[:4])}"
                f"{'; ...' if len(refused) > 4 else ''}); choose another {flag}"
            )
    elif write:
        with files.disk_errors(f"{flag}={path}"):
            _write(file, mine)
    return path


def _write(file, values: dict) -> None:
    files.write_atomically(file, json.dumps(values, indent=2) + "\n")
