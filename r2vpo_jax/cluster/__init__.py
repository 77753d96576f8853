"""The processes of a run on several hosts: how they come together, what they must have in common, and who of them is gone.

A process that is alone has no part in it: `start` finds so, and everything else returns at once.
"""

import re
import sys
import time
import traceback
from collections.abc import Mapping

import jax

from r2vpo_jax import waits
from r2vpo_jax.cluster import watch as watch_lib
from r2vpo_jax.cluster.agreement import agree, agree_on_folder, of_first
from r2vpo_jax.cluster.checkin import check_in
from r2vpo_jax.cluster.facts import versions
from r2vpo_jax.cluster.place import PORT, Place, find
from r2vpo_jax.cluster.store import Store
from r2vpo_jax.cluster.watch import LOST, Watch, phase, where

__all__ = [
    "LOST", "PORT", "Place", "agree", "agree_on_folder", "fail", "find", "finish", "of_first", "phase", "start", "versions", "where",
]  # fmt: skip

_watch: Watch | None = None
# How texts of XLA's errors begin; some are ValueErrors ("UNKNOWN: Gloo AllGather failed: … Connection closed by peer").
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


def start(
    place: Place | None,
    facts: Mapping[str, object],
    *,
    initialization_timeout: float = 300,
    heartbeat_timeout: float = 100,
) -> None:
    """Wait for the other processes, compare facts with them, start `jax.distributed`, and watch over them from then on.

    Args:
      place: of this process; None: it is alone, and nothing is done.
      facts: what must be alike on all processes, by name.
      initialization_timeout: seconds until it is given up to wait for the others.
      heartbeat_timeout: seconds without a sign of life after which a process counts as gone.

    Raises:
      UsageError: facts differ, or the processes were not started as they should be.
      ClusterError: a process has not come in time.
    """
    global _watch
    if place is None:
        return
    if place.process_id > 0:
        waits.silence()
    began = time.monotonic()
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    hosts = check_in(place, {**facts, **versions()}, timeout=initialization_timeout, say=say)
    # It would take SIGTERM away from the process, also while it starts: a run listens to that itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(max(60, initialization_timeout - (time.monotonic() - began))),
        heartbeat_timeout_seconds=int(2 * heartbeat_timeout + 30),
    )
    _watch = Watch(
        Store(),
        place.process_id,
        hosts,
        timeout=heartbeat_timeout,
        reachable=lambda: watch_lib.is_listening(place.address),
    )
    _watch.start()


def _is_of_runtime(error: BaseException | None) -> bool:
    """Whether an operation of JAX has failed, by this error or one behind it; the type alone does not say it."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def finish(code: int | None) -> None:
    """The program has done its work: wait until the other processes have too, and end. Returns only if it is alone.

    Args:
      code: exit code; None: 0.
    """
    if _watch is not None:
        _watch.finish(code or 0)


def fail(error: BaseException, code: int, text: str) -> None:
    """The program ends with an error: tell the other processes, and end. Returns only if it is alone.

    What ended an operation between processes may be that one of them is gone. That is found out first, and if so is all
    that is said.

    Args:
      error: the exception.
      code: exit code.
      text: what to print; "": the traceback.
    """
    if _watch is None:
        return
    if _is_of_runtime(error):
        _watch.failed()
    if text:
        print(text, file=sys.stderr)
    else:
        traceback.print_exception(error)
    _watch.end(code, text.removeprefix("error: ") or f"{type(error).__name__}: {error}")
