"""Who of a run is gone, and what was going on: one line, and an end that a loop around the run starts again.

Every process writes a beat to the key-value store, and looks at the others' beats, in threads of its own. A peer without a new
beat for the time-out is gone or hangs, wherever this process is just waiting for it. JAX's coordinator has heartbeats of its
own; what it does about a missing one is to abort the process, from C++ and without a word of Python's. So its time-out is longer
than ours, and where it aborts all the same, because process 0 is gone and its socket with it, the line comes from a handler
of that signal.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from r2vpo_jax.cluster.facts import names

LOST = 75  # exit code: another process is gone; the same command goes on (sysexits.h calls it a temporary failure)
_AFTER_AN_ERROR = 10.0  # seconds without a beat that tell who is gone, once an operation between processes has failed


@dataclasses.dataclass
class Where:
    """What this process is doing; for the line that says where a run ended."""

    iteration: int | None = None  # under way, from 1
    phase: str = "start"
    saved: int | None = None  # the last iteration whose checkpoint is known to be complete

    def __str__(self) -> str:
        return self.phase if self.iteration is None else f"iteration {self.iteration}, {self.phase}"


where = Where()


@contextlib.contextmanager
def phase(name: str):
    """Inside, that is what this process is doing. Threads beside the main one do not count."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, where.phase = where.phase, name
    yield
    where.phase = before  # an error leaves it: there it happened


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why a process cannot go on."""

    code: int  # exit code
    why: str
    gone: tuple[int, ...] = ()  # processes


@dataclasses.dataclass
class _Peer:
    seen: float  # by our clock
    beat: int = -1
    where: str = "start"


class Watch:
    """Beats of this process, and an eye on those of the others. Call `start`.

    Args:
      store: a `store.Store`.
      process: number of this process.
      hosts: the host of each process.
      timeout: seconds without a beat after which a process is gone.
      reachable: whether process 0 still listens.
      clock: seconds.
    """

    def __init__(
        self, store, process: int, hosts, *, timeout: float, reachable: Callable[[], bool], clock=time.monotonic
    ):
        self._store, self._process, self._hosts = store, process, list(hosts)
        self._reachable, self._clock = reachable, clock
        self.interval = min(2.0, timeout / 10)
        # So that the end comes within the time-out, although beats and looks have their intervals.
        self._limit = timeout - 2 * self.interval
        now = clock()
        self._peers = {i: _Peer(now) for i in range(len(self._hosts)) if i != process}
        self._notes: dict[int, dict] = {}  # of those that have ended: how
        self._answered = self._looked = now  # when the store last did, and when `verdict` was last asked
        self._beats = 0
        self._failed = False  # an operation between processes has
        self._lock = threading.Lock()
        self._ending: int | None = None  # the exit code, once this process ends
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin to watch, in the background."""
        # Two, because a call of a store that hangs does not return.
        for act, seconds in ((self.beat, self.interval), (self.judge, self.interval / 2)):
            threading.Thread(target=self._repeat, args=(act, seconds), daemon=True).start()
        self._catch_abort()

    def _repeat(self, act, seconds: float) -> None:
        while not self._stop.is_set():
            act()
            self._stop.wait(seconds)

    # What is known -----------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Write a beat, and read the others'. The store may be gone, or hang: `verdict` sees that nothing comes from it."""
        self._beats += 1
        with contextlib.suppress(RuntimeError):
            self._store.set(f"beat/{self._process}", json.dumps([self._beats, str(where)]))
            beats, notes = self._store.under("beat"), self._store.under("end")
            now = self._clock()
            for number, text in beats.items():
                peer = self._peers.get(int(number))
                count, doing = json.loads(text)
                if peer is not None and count != peer.beat:
                    peer.beat, peer.where, peer.seen = count, doing, now
            self._notes = {
                int(number): json.loads(text) for number, text in notes.items() if int(number) != self._process
            }
            self._answered = now

    def verdict(self) -> Verdict | None:
        """Why this process cannot go on, or None."""
        now = self._clock()
        still, self._looked = now - self._looked, now
        if still > self._limit / 2:
            # This process itself stood still: that it has heard nothing says nothing about the others.
            self._answered = now
            for peer in self._peers.values():
                peer.seen = now
        for number, note in sorted(self._notes.items()):
            if "error" in note:
                refused = note["code"] == 2
                how = "refused to go on" if refused else "ended"
                return Verdict(
                    2 if refused else LOST, f"process {number} on {self._hosts[number]} {how}: {note['error']}"
                )
        limit = min(self._limit, _AFTER_AN_ERROR) if self._failed else self._limit
        if now - self._answered > limit:  # what is known of the others is as old
            unknown = self._process != 0 and 0 not in self._notes
            return Verdict(LOST, self._gone((0,), limit), (0,)) if unknown else None
        gone = {i for i, peer in self._peers.items() if now - peer.seen > limit and i not in self._notes}
        gone = tuple(sorted(gone.union(*(note.get("gone", ()) for note in self._notes.values()))))
        return Verdict(LOST, self._gone(gone, limit), gone) if gone else None

    def _gone(self, processes: tuple[int, ...], seconds: float) -> str:
        if self._process in processes:
            return "the other processes have ended: they had no sign of life of this one"
        who = names(processes)
        if len(processes) == 1:
            number = processes[0]
            who += f" on {self._hosts[number]} (last heard of in {self._peers[number].where})"
        return f"{who} {'are' if len(processes) > 1 else 'is'} gone or stopped: no sign of life for {seconds:.0f} s"

    def _all_ended(self, but=()) -> bool:
        return self._notes.keys() >= self._peers.keys() - set(but)

    # What is done about it ---------------------------------------------------------------------------------------

    def judge(self) -> None:
        """End this process where it cannot go on."""
        found = self.verdict()
        if found is None:
            return
        with self._lock:
            if self._ending is not None:
                return
            self._ending = found.code
        tell(f"{where}: {found.why}; {what_to_do(found.code)}")
        self._leave({"code": found.code, "gone": list(found.gone)}, found.gone)
        exit_now(found.code)

    def end(self, code: int, error: str) -> None:
        """This process has failed, and has said so; the others are told, and it ends.

        Args:
          code: its exit code.
          error: why, in one line.
        """
        with self._lock:
            if self._ending is not None:
                threading.Event().wait()  # the watch ends the process
            self._ending = code
        self._leave({"code": code, "error": f"{error[:1000]} ({where})"})
        exit_now(code)

    def _leave(self, note: dict, gone=()) -> None:
        """Write how this process ends; process 0, whose end takes the store away, waits until the others have read it."""
        done = threading.Event()

        def write():
            with contextlib.suppress(RuntimeError):  # nobody is left to be told
                self._store.set(f"end/{self._process}", json.dumps(note))
            done.set()

        threading.Thread(target=write, daemon=True).start()
        done.wait(2)
        if self._process == 0:
            until = self._clock() + 3 * self.interval + 3
            while not self._all_ended(gone) and self._clock() < until:
                time.sleep(0.1)

    def failed(self) -> None:
        """An operation between processes has failed; returns only if nobody turns out to be gone."""
        self._failed = True
        time.sleep(min(self._limit, _AFTER_AN_ERROR) + 3 * self.interval)
        self._failed = False

    def finish(self, code: int) -> None:
        """This process has come to its good end; it ends when all others have too.

        Not by JAX's shutdown, whose barrier aborts a process that has done its work if a peer is killed just there.
        """
        where.phase = "waiting for the others to end"
        with contextlib.suppress(RuntimeError):  # the store is gone, which the watch finds out
            self._store.set(f"end/{self._process}", json.dumps({"code": 0}))
        while not self._all_ended():
            time.sleep(min(self.interval, 0.2))
            self.beat()
        self._ending = code
        self._stop.set()  # nobody is missed from here on
        until = self._clock() + self._limit
        with contextlib.suppress(RuntimeError):  # process 0 was killed now: everything is done
            self._store.set(f"bye/{self._process}", "")
            while self._process == 0 and len(self._store.under("bye")) <= len(self._peers) and self._clock() < until:
                time.sleep(0.05)
        sys.stdout.flush()
        exit_now(code)

    # JAX's abort -------------------------------------------------------------------------------------------------

    def _catch_abort(self) -> None:
        """Have the line said where JAX aborts the process: a handler in Python would only run when abort() had returned."""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._handler = kind(self._aborted)  # kept: C has its address only
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, kind], ctypes.c_void_p
        libc.signal(signal.SIGABRT, self._handler)

    def _aborted(self, _) -> None:
        """On the thread that calls abort(): the line, if process 0 is gone; else this returns, and abort() goes on."""
        if self._ending is not None:
            exit_now(self._ending)  # as it was to end in a moment
        if self._process != 0 and not self._reachable():
            self._ending = LOST
            still = self._clock() - self._looked
            paused = f"; this process itself had stood still for {still:.0f} s" if still > self._limit / 2 else ""
            peer = self._peers[0]
            tell(
                f"{where}: process 0 on {self._hosts[0]} (last heard of in {peer.where}) is gone: it does not answer any "
                f"more{paused}; {what_to_do(LOST)}"
            )
            exit_now(LOST)


def what_to_do(code: int) -> str:
    """For the reader of the line."""
    if code == 2:
        return "put that right, and give the same command to all processes again"
    saved = "the last checkpoint" if where.saved is None else f"checkpoint {where.saved}, or a later one"
    return f"the same command on all processes goes on from {saved}; scripts/run_until_done.sh gives it again by itself"


def tell(text: str) -> None:
    """One line to stderr, past Python's buffers: the thread that holds them may be stuck."""
    os.write(2, f"error: {' '.join(text.split())}\n".encode())


def exit_now(code: int) -> None:
    """End without JAX's shutdown, which waits for the processes that are gone, and aborts."""
    for stream in (sys.stdout, sys.stderr):
        threading.Thread(target=stream.flush, daemon=True).start()
    time.sleep(0.05)
    os._exit(code)


def is_listening(address: tuple[str, int]) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return False
    return True
