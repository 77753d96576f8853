"""A profiler's trace of one call, and the operations that took the longest in it."""

import collections
from pathlib import Path

import jax

# On accelerators each operation is an event of a line of the device; on a CPU of the threads that compute.
_DEVICE, _HOST = "/device:", "/host:CPU"
_LINES_OF_OPERATIONS = ("XLA Ops", "Stream")
_THREADS = "XLAEigen"
_SHOWN = 10


def trace(step, folder) -> list[tuple[str, float, int]]:
    """Trace one call of `step` into a folder.

    Returns:
      (operation, seconds, calls) of the ten longest, summed over threads and over calls: on a CPU threads work side by
      side. Empty where this version of JAX cannot read its own traces.
    """
    folder = Path(folder)
    with jax.profiler.trace(str(folder)):
        step()
    if not hasattr(jax.profiler, "ProfileData"):
        return []
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    spent, calls = collections.Counter(), collections.Counter()
    planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
    on_device = any(plane.name.startswith(_DEVICE) for plane in planes)
    for plane in planes:
        if not plane.name.startswith(_DEVICE if on_device else _HOST):
            continue
        for line in plane.lines:
            if line.name.startswith(_LINES_OF_OPERATIONS) if on_device else _THREADS in line.name:
                for event in line.events:
                    if _is_operation(event.name):
                        spent[event.name] += event.duration_ns / 1e9
                        calls[event.name] += 1
    return [(name, seconds, calls[name]) for name, seconds in spent.most_common(_SHOWN)]


def _is_operation(name: str) -> bool:
    """Not one of the frames that hold operations."""
    return "::" not in name and not name.startswith(("while", "conditional", "call"))
