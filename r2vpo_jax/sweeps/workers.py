"""Whole runs by the ordinary trainer: one after another in this process, or several at once in processes of their own.

Each worker is a fresh interpreter that takes one run after another. Workers share the machine evenly: of C cores each of
N workers is given C / N, and of a GPU's memory each may take 0.9 / N, unless XLA_PYTHON_CLIENT_MEM_FRACTION says
otherwise. What a worker's run prints goes to log.txt in the run's directory.

A run that dies is a result (failed.json). So is one whose process was killed, from outside or for want of memory.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import jax

from r2vpo_jax.config import Config
from r2vpo_jax.errors import EngineError, NonFiniteUpdateError, Stopped, UsageError
from r2vpo_jax.run import directory, files
from r2vpo_jax.run.interrupts import graceful_stop
from r2vpo_jax.training import trainer

_POLL_SECONDS = 0.2  # how soon a signal is noticed
_CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be made."""

    name: str
    config: Config
    folder: pathlib.Path


def write_failure(folder, error: str, *, collapsed: bool, trace: str = "") -> None:
    """failed.json of a run: it is a result, and is not tried again while the file is there (`forget_failure`).

    Args:
      folder: of the run.
      error: what happened.
      collapsed: whether the run itself became non-finite, rather than the program or the machine.
      trace: of the exception.
    """
    content = {"error": error, "collapsed": collapsed} | ({"traceback": trace} if trace else {})
    files.write_atomically(pathlib.Path(folder) / "failed.json", json.dumps(content, indent=2) + "\n")


def forget_failure(folder) -> str:
    """Take failed.json away, so that the run is tried again, from its last checkpoint if it has one; what it said."""
    file = pathlib.Path(folder) / "failed.json"
    error = json.loads(file.read_text())["error"]
    file.unlink()
    return error


def train_here(jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    """One run after another in this process.

    Raises:
      Stopped: a run was stopped before its end (Ctrl-C); it goes on from there when it is given again.
      UsageError: something the user can put right, for this run and probably for all.
      EngineError: the server that samples does not answer, this run and probably all.
    """
    for number, job in enumerate(jobs, 1):
        say(f"[{number}/{len(jobs)}] {job.name}")
        if error := attempt(job):
            say(f"{job.name} failed: {error}")


def attempt(job: Job) -> str | None:
    """Train; returns what went wrong with this run and no other, if anything did (failed.json says it too).

    Raises:
      Stopped: before its end, and saved.
      UsageError, EngineError: as of `trainer.train`.
    """
    try:
        with directory.resolving(job.folder.parents[1]):  # as the sweep has
            trainer.train(job.config, job.folder, say=lambda _: None, started=time.perf_counter())
    except (UsageError, EngineError, Stopped):
        raise
    except Exception as error:
        collapsed = isinstance(error, NonFiniteUpdateError)
        write_failure(job.folder, repr(error), collapsed=collapsed, trace=traceback.format_exc())
        return str(error) or repr(error)
    return None


# In the main process ---------------------------------------------------------------------------------------------


def train_in_processes(
    jobs: Sequence[Job],
    processes: int,
    say: Callable[[str], None],
    attempt: Callable[[Job], str | None] = attempt,
) -> None:
    """Several runs at once, each in a process of its own.

    Args:
      jobs: taken in this order.
      processes: workers at one time.
      say: where progress lines go.
      attempt: what a worker does with a job.

    Raises:
      Stopped: Ctrl-C or SIGTERM; every run was stopped and saved, and goes on when it is given again. A second signal
        ends all at once.
      UsageError: what a run said that the user can put right; the others are stopped and saved.
      RuntimeError: a worker could not even start.
    """
    with graceful_stop() as stop:
        pool = _Pool(jobs, min(processes, len(jobs)), say, attempt)
        try:
            pool.work(stop)
        finally:
            pool.close()


class _Pool:
    def __init__(self, jobs: Sequence[Job], processes: int, say, attempt):
        self._queue, self._total, self._say = list(jobs), len(jobs), say
        self._processes, self._attempt = processes, attempt
        self._done, self._workers, self._refusal = 0, [], None
        for share in range(processes):
            self._start(share)

    def _start(self, share: int) -> None:
        self._workers.append(_Worker(share, self._processes, self._attempt))

    def work(self, stop) -> None:
        stopping = False
        while self._workers:
            if (stop.requested or self._refusal) and not stopping:
                stopping = True
                self._queue.clear()
                for worker in self._workers:
                    worker.stop()
            connections = {worker.connection: worker for worker in self._workers}
            # A signal handler does not end a wait without a limit.
            for connection in multiprocessing.connection.wait(list(connections), _POLL_SECONDS):
                self._hear(connections[connection], stopping)
        if self._refusal:
            raise UsageError(self._refusal)
        if self._done < self._total:
            raise Stopped(f"stopped with {self._done} of {self._total} runs ended; the same command goes on from there")

    def _hear(self, worker: "_Worker", stopping: bool) -> None:
        """A worker is free, has ended a run, or is gone."""
        try:
            kind, text = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._workers.remove(worker)
            self._bury(worker, stopping)
            return
        if kind == "done":
            self._done += 1
            self._say(f"[{self._done}/{self._total}] {worker.job.name}" + (f" failed: {text}" if text else " finished"))
        elif kind == "refused":
            self._refusal = self._refusal or f"{worker.job.name}: {text}"
        worker.take(self._queue.pop(0) if self._queue else None)

    def _bury(self, worker: "_Worker", stopping: bool) -> None:
        code = worker.exit_code()
        if stopping or worker.dismissed:
            return
        if not worker.ready:
            raise RuntimeError(f"a worker process could not start (exit code {code}); its output is above")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = "; the machine may have run out of memory: use fewer --processes" if code == -signal.SIGKILL else ""
        error = f"its process ended {how}{hint}; its output is in log.txt"
        write_failure(worker.job.folder, error, collapsed=False)
        self._done += 1
        self._say(f"[{self._done}/{self._total}] {worker.job.name} failed: {error}")
        if self._queue:
            self._start(worker.share)

    def close(self) -> None:
        """End what is left of the workers."""
        for worker in self._workers:
            worker.kill()


class _Worker:
    """A process, and what it is doing."""

    def __init__(self, share: int, processes: int, attempt):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.share, self.job, self.ready, self.dismissed = share, None, False, False
        settings = {name: getattr(jax.config, name) for name in _CACHE_SETTINGS}
        self._process = context.Process(target=_serve, args=(theirs, share, processes, settings, attempt), daemon=True)
        # A terminal sends Ctrl-C to all of its processes; here the main one alone decides. A mask is inherited, but
        # the first process that is spawned starts the resource tracker too, which unblocks SIGINT when it is done.
        multiprocessing.resource_tracker.ensure_running()
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        theirs.close()  # so that the end of the process is the end of the connection

    def take(self, job: Job | None) -> None:
        """Begin a run, or with None leave."""
        self.ready, self.job, self.dismissed = True, job, job is None
        with contextlib.suppress(BrokenPipeError):  # it is gone: the next thing heard from it is its end
            self.connection.send(job)

    def stop(self) -> None:
        """Stop the run in hand after its iteration, saved."""
        self._process.terminate()

    def exit_code(self) -> int:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


# In a worker process ---------------------------------------------------------------------------------------------


def _serve(connection, share: int, processes: int, settings: dict, attempt) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _share_machine(share, processes)
    for name, value in settings.items():
        jax.config.update(name, value)
    connection.send(("free", None))
    while (job := connection.recv()) is not None:
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "log.txt", "a") as log:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(log.fileno(), stream.fileno())
        try:
            answer = ("done", attempt(job))
        except Stopped as stopped:
            answer = ("stopped", str(stopped))
        except UsageError as error:
            answer = ("refused", str(error))
        connection.send(answer)


def _end_with_parent() -> None:
    """An orphan would go on writing where the next call of the same command writes too."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _share_machine(share: int, processes: int) -> None:
    """Before JAX makes its threads: as many as there are cores that this process may use."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / processes:.3f}")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[share * len(cores) // processes : (share + 1) * len(cores) // processes]
        os.sched_setaffinity(0, mine or {cores[share % len(cores)]})
