"""Long waits, told: what is waited for, how far it has come, and how long it may still take.

A wait of less than ten seconds says nothing. A longer one has one line on a terminal, which is rewritten, and elsewhere a few
plain lines, each after twice as long as the one before. They go to stderr, of process 0 alone.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

FIRST = 10.0  # seconds until a wait is told
LONGEST = 120.0  # between two plain lines
_REWRITTEN = 1.0  # between two states of a terminal's line
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))

_silent = False


def silence() -> None:
    """Tell nothing from now on: this is not process 0."""
    global _silent
    _silent = True


class Wait:
    """How far something has come. Threads may share it.

    Attributes:
      what: what is waited for, such as "reading weights".
      total: how much there is to do; None: nobody knows.
      unit: "B" for bytes, or what is counted, as "problems"; "": nothing is counted.
    """

    def __init__(self, what: str, total: float | None = None, unit: str = ""):
        self.what, self.total, self.unit = what, total, unit
        self._done, self._lock, self._start = 0.0, threading.Lock(), time.monotonic()

    def add(self, number: float) -> None:
        """So much more is done."""
        with self._lock:
            self._done += number

    def reach(self, number: float, total: float | None = None) -> None:
        """So much is done altogether, of so much; what is less than before is not heard."""
        with self._lock:
            self._done, self.total = max(self._done, number), max(self.total or 0, total or 0) or None

    @property
    def seconds(self) -> float:
        """Since its beginning."""
        return time.monotonic() - self._start

    def text(self) -> str:
        """ "reading weights, 1.2 of 3.1 GB, 40 s so far, about 60 s left" """
        parts, seconds, done = [self.what], self.seconds, self._done
        if self.unit and self.total:
            parts.append(_amount(done, self.total, self.unit))
        elif self.unit and done:
            parts.append(_amount(done, None, self.unit))
        parts.append(f"{seconds:.0f} s so far")
        if self.total and 0 < done < self.total:
            parts.append(f"about {seconds * (self.total - done) / done:.0f} s left")
        return ", ".join(parts)


@contextlib.contextmanager
def told(what: str, total: float | None = None, unit: str = "") -> Iterator[Wait]:
    """Inside, a wait goes on. Arguments are those of `Wait`."""
    wait = Wait(what, total, unit)
    end = start(wait)
    try:
        yield wait
    except BaseException:
        end(False)
        raise
    end()


def each(items: Iterable, what: str, total: int | None, unit: str) -> Iterator:
    """The items, one after the other; the wait lasts until all were taken."""
    with told(what, total, unit) as wait:
        for item in items:
            yield item
            wait._done += 1  # by this thread alone


def start(wait: Wait) -> Callable[[bool], None]:
    """Begin to tell a wait that does not begin and end in one place. What is returned ends it; False: in vain."""
    if _silent:
        return lambda done=True: None
    ended, rewritten, told_of = threading.Event(), _screen().isatty(), threading.Event()

    def tick():
        pause = FIRST
        while not ended.wait(pause):
            told_of.set()
            pause = _REWRITTEN if rewritten else min(max(wait.seconds, FIRST), LONGEST)
            _write(f"\r\033[K{wait.text()}" if rewritten else f"{wait.text()}\n")

    ticker = threading.Thread(target=tick, name="waits", daemon=True)
    ticker.start()

    def end(done: bool = True) -> None:
        ended.set()
        ticker.join()
        if told_of.is_set():
            _write("\r\033[K" if rewritten else f"{wait.what}: done in {wait.seconds:.0f} s\n" if done else "")

    return end


def _screen():
    return sys.stderr


def _write(text: str) -> None:
    _screen().write(text)
    _screen().flush()


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit != "B":
        return f"{done:.0f} {unit}" if total is None else f"{done:.0f} of {total:.0f} {unit}"
    name, size = next(((n, s) for n, s in _UNITS if (total or done) >= s), ("bytes", 1))
    digits = 0 if size == 1 else 1
    return (
        f"{done / size:.{digits}f} {name}"
        if total is None
        else f"{done / size:.{digits}f} of {total / size:.{digits}f} {name}"
    )
