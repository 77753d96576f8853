"""What a worker of a sweep may be given to do instead of training; imported in its process."""

import os
import pathlib
import signal
import sys
import time

from r2vpo_jax.config import Config
from r2vpo_jax.errors import Stopped, UsageError
from r2vpo_jax.run.interrupts import graceful_stop
from r2vpo_jax.sweeps.workers import Job, write_failure


def jobs(folder: pathlib.Path, *names: str) -> list[Job]:
    return [Job(name, Config(), folder / name) for name in names]


def act(job: Job) -> str | None:
    """What the job's name says, up to its number; its environment goes to a file."""
    what = job.name.rpartition("_")[0]
    print(f"this is {job.name}")
    cores = len(os.sched_getaffinity(0))
    (job.folder / "ran").write_text(f"{os.getpid()} {cores} {os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION']}")
    if what == "fail":
        write_failure(job.folder, "it failed", collapsed=False)
        return "it failed"
    if what == "refuse":
        raise UsageError("the disk is full")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        print("last words", file=sys.stderr)
        os._exit(7)
    if what == "wait":
        with graceful_stop() as stop:
            (job.folder / "waiting").touch()
            while not stop.requested:
                time.sleep(0.05)
        (job.folder / "saved").touch()
        raise Stopped("stopped")
    (job.folder / "finished").touch()
    return None
