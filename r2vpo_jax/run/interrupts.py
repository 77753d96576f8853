"""Stopping a run between two iterations, on all processes together."""

import contextlib
import signal
import sys

import jax
import numpy as np


class StopRequest:
    """Whether somebody asked the run to stop."""

    requested = False


@contextlib.contextmanager
def graceful_stop():
    """Ctrl-C and SIGTERM end the run after the iteration at hand, with a checkpoint; a second one at once."""
    stop = StopRequest()

    def handle(signum, _):
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print(
            f"\n{signal.Signals(signum).name}: stopping after the iteration or batch in hand (again: at once)",
            file=sys.stderr,
        )

    try:
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def any_process(flag: bool) -> bool:
    """True on every process as soon as it is true on one, so that all leave the loop together."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
