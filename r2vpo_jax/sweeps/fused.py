"""Many runs at a time: fused programs on the devices, and what a host has to do around them.

Runs of one family (sharing.py) share a program and are trained side by side, as many as fit into the memory
of the devices. After each chunk of iterations the states of a batch of runs are saved, so that a sweep that was stopped
goes on there. Each run leaves what an ordinary one leaves for comparisons: metrics.jsonl and report/summary.json; or
failed.json, if it collapsed.
"""

import collections
import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping

import jax

from r2vpo_jax.config import Config
from r2vpo_jax.errors import Stopped
from r2vpo_jax.run import console, files, report
from r2vpo_jax.run.instruments import code_identity
from r2vpo_jax.run.interrupts import graceful_stop
from r2vpo_jax.sweeps import sharing
from r2vpo_jax.sweeps.batch import Batch
from r2vpo_jax.sweeps.group import Group
from r2vpo_jax.sweeps.program import refusal

__all__ = ["refusal", "run"]


def run(
    configs: Mapping[str, Config],
    folder: Callable[[str], pathlib.Path],
    scratch: pathlib.Path,
    *,
    say=console.say,
    runs_at_once: int | None = None,
    all_cores: bool = False,
) -> dict[str, float]:
    """Train all of these runs, or go on with them.

    Args:
      configs: name -> configuration, all without a `refusal`.
      folder: where the results of the run of that name go.
      scratch: where states are saved in between; deleted at the end.
      say: where lines for people go.
      runs_at_once: most runs in one batch; by default as many as fit into memory.
      all_cores: on processors, make a device of each core and share the runs out. It stays so in this process, and
        does nothing where JAX has started already.

    Returns:
      Seconds by phase: compile; start (opening the model); train; evaluation; rows (numbers of each iteration, on the
      host); checkpoint.

    Raises:
      Stopped: asked to stop; the same call goes on from the last chunk.
      UsageError: the base model or the task cannot be used, or the disk is full.
    """
    if all_cores:
        _use_all_cores(len(configs))
    families = sharing.families(configs)
    seconds = collections.Counter()
    with graceful_stop() as stop, files.disk_errors(scratch, "the last chunk"):
        for number, family in enumerate(families, 1):
            names = list(family.configs)
            if all(_is_done(folder(name)) for name in names):
                continue
            if stop.requested:
                raise Stopped(
                    f"stopped before program {number} of {len(families)}; the same command goes on from there"
                )
            say(f"program {number} of {len(families)}: {len(names)} runs like {names[0]}")
            with contextlib.closing(Group(family, runs_at_once, say)) as group:
                for first in range(0, len(names), group.size):
                    batch = names[first : first + group.size]
                    left = [name for name in batch if not _is_done(folder(name))]
                    if left and (scratch / _identity(batch, group.size)).exists():
                        left = batch  # it was stopped, perhaps while results were written
                    if left:
                        Batch(group, left, folder, scratch / _identity(left, group.size), stop).go()
            seconds.update(group.timers.seconds)
    shutil.rmtree(scratch, ignore_errors=True)
    return dict(seconds)


def _use_all_cores(num_runs: int) -> None:
    """A device for each core, or for each run if these are fewer."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # "must be set before backends are initialized"
        jax.config.update("jax_num_cpu_devices", min(cores, num_runs))


def _is_done(folder: pathlib.Path) -> bool:
    return report.is_finished(folder) or (folder / "failed.json").exists()


def _identity(names: list[str], size: int) -> str:
    """A name for the directory of a batch of runs: states belong to their number, and to the code that made them."""
    return files.sha256_of("\n".join([*names, str(size), code_identity()]).encode())[:16]
