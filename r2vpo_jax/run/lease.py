"""Who works in a directory of a store, where there are no locks: a lease, which its holder renews and which runs out.

A lease is a file `lease/00001.json`, made on the condition that there is none of that name: the store decides who was first.
Its holder alone writes it again, every 15 seconds. Who wants to work there watches it. If it changes, its holder is alive, and
the directory is in use. If it does not change for 60 seconds, its holder is dead, or cannot reach the store: the next number
is made, on the same condition, and the earlier holder, should it come back, finds that it has lost the directory. Nobody's
clock is compared with anybody else's.
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable

from r2vpo_jax import storage
from r2vpo_jax.errors import UsageError

BEAT_SECONDS = 15.0  # between two renewals
EXPIRES_SECONDS = 60.0  # without one
_POLL_SECONDS = 2.0
_FOLDER = "lease"
_NUMBER = re.compile(r"(\d{5,})\.json")


class Lease:
    """The right to work in a directory of a store, until it is given back or lost."""

    def __init__(self, file, content: dict, flag: str):
        self._file, self._content, self._flag = file, content, flag
        self._lost, self._given_back = None, threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UsageError if another process has taken the directory over."""
        if self._lost:
            raise UsageError(self._lost)

    def close(self) -> None:
        """Give it back: others may take it at once."""
        self._given_back.set()
        self._thread.join()
        if not self._lost:
            with storage.spoken(self._file):
                self._file.unlink(missing_ok=True)

    def _renew(self) -> None:
        folder = self._file.parent
        while not self._given_back.wait(BEAT_SECONDS):
            try:
                newest, _ = _newest(folder)
                if newest != self._file:
                    self._lost = (
                        f"{folder.parent} was taken over by another process while this one could not renew its lease for "
                        f"{EXPIRES_SECONDS:.0f} s; this one has ended, and the other goes on from the last checkpoint"
                    )
                    return
                self._content["beat"] += 1
                storage.put(self._file, _encode(self._content))
            except OSError:
                continue  # out of reach: it is tried again, and found out whether it was lost meanwhile


def take(workdir, flag: str, say: Callable[[str], None]) -> Lease:
    """Take the lease of a directory; the lease of a process that has died is waited out, if it was on another machine.

    Raises:
      UsageError: another process works there.
      OSError: the store cannot be reached.
    """
    folder, mine = workdir / _FOLDER, _who()
    newest, number = _newest(folder)
    if newest is not None and not _has_expired(newest, workdir, flag, say):
        newest, number = _newest(folder)  # it was given back
    file = folder / f"{number + 1:05d}.json"
    # Read back: a store may not know the condition, and the numbers begin anew once all were given back.
    if not storage.create(file, _encode(mine)) or _read(file) != mine:
        raise UsageError(_in_use(workdir, _read(file), flag))
    if (other := _newest(folder)[0]) != file:
        file.unlink()
        raise UsageError(_in_use(workdir, _read(other), flag))
    if newest is not None:
        newest.unlink(missing_ok=True)
    return Lease(file, mine, flag)


def refuse_if_in_use(workdir, flag: str) -> None:
    """What `take` would refuse, found early and without writing anything; a lease that is not renewed is left to `take`.

    Raises:
      UsageError: another process works there.
    """
    newest, _ = _newest(workdir / _FOLDER)
    if newest is None or _is_dead_here(before := _read(newest)):
        return
    _watch(newest, before, BEAT_SECONDS + _POLL_SECONDS, workdir, flag)


def _has_expired(file, workdir, flag: str, say) -> bool:
    """True once the lease has not been renewed for long enough; False if it is gone."""
    before = _read(file)
    if before is None:
        return False
    if _is_dead_here(before):
        return True
    say(
        f"{workdir} was in use by {_named(before)}; it can be taken over in {EXPIRES_SECONDS:.0f} s, unless that is alive"
    )
    return _watch(file, before, EXPIRES_SECONDS, workdir, flag)


def _watch(file, before: dict, seconds: float, workdir, flag: str) -> bool:
    """True if the lease stays as it was for so long, False if it is given back; UsageError if it is renewed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        now = _read(file)
        if now is None:
            return False
        if now != before:
            raise UsageError(_in_use(workdir, now, flag))
    return True


def _in_use(workdir, content: dict | None, flag: str) -> str:
    return (
        f"{workdir} is in use by {_named(content)}; wait until that has ended, stop it, or choose another {flag} (should it "
        f"die, the directory can be taken over {EXPIRES_SECONDS:.0f} s later)"
    )


def _named(content: dict | None) -> str:
    return f"process {content['pid']} on {content['host']} since {content['since']}" if content else "another process"


def _newest(folder) -> tuple:
    """(the file with the highest number, or None; that number)."""
    numbers = [int(match[1]) for name in storage.sizes(folder) if (match := _NUMBER.fullmatch(name))]
    return (folder / f"{max(numbers):05d}.json", max(numbers)) if numbers else (None, 0)


def _read(file) -> dict | None:
    try:
        with storage.spoken(file):
            return json.loads(file.read_bytes())
    except FileNotFoundError:
        return None


def _encode(content: dict) -> bytes:
    return json.dumps(content).encode()


def _who() -> dict:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    who = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "started": _started(os.getpid())}
    return who | {"since": since, "beat": 0, "token": uuid.uuid4().hex}


def _machine() -> str | None:
    """What two processes share that see the same process numbers, until the machine starts anew; None if it is not known."""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None if there is none."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _is_dead_here(content: dict | None) -> bool:
    """Whether the holder was a process of this very machine that is no more."""
    here = content is not None and content["machine"] is not None and content["machine"] == _machine()
    return here and _started(content["pid"]) != content["started"]
