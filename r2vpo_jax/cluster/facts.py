"""What must be alike on all processes of a run, and how a difference is told."""

import importlib.metadata
import platform
from collections.abc import Mapping

_PACKAGES = ("jax", "jaxlib", "libtpu")  # programs of other versions differ, and wait for each other
_SHOWN = 4


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def names(processes) -> str:
    """ "process 1", "processes 1, 2"; of many, the first ten."""
    numbers = sorted(processes)
    listed = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {listed}"


def differences(
    facts: Mapping[int, Mapping[str, object]],
    how: str = "differ",
    advice: str = "give all of them the same, and start again",
) -> str:
    """One line about facts that are not those of process 0; "" where there are none.

    Args:
      facts: by process, values by name.
      how: what the processes do.
      advice: what to do about it.
    """
    others: dict[str, dict[str, list[int]]] = {}  # name -> value -> processes
    mine = facts[0]
    for process in sorted(facts.keys() - {0}):
        theirs = facts[process]
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                others.setdefault(name, {}).setdefault(_text(theirs, name), []).append(process)
    if not others:
        return ""
    lines = []
    for name, values in list(others.items())[:_SHOWN]:
        there = ", ".join(f"{text} on {names(processes)}" for text, processes in values.items())
        lines.append(f"{name}: {_text(mine, name)} on process 0, {there}")
    more = f"; and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return f"the processes of this run {how} ({'; '.join(lines)}{more}); {advice}"


def _text(facts: Mapping[str, object], name: str) -> str:
    return str(facts[name]) if name in facts else "absent"
