"""What all processes of a run must have in common, told through the key-value store: a difference cannot make anybody wait."""

import json
import secrets
import time
from collections.abc import Mapping

from r2vpo_jax.cluster import watch
from r2vpo_jax.cluster.facts import differences, names
from r2vpo_jax.cluster.store import Store, processes
from r2vpo_jax.errors import ClusterError, UsageError

_PATIENCE = 1800.0  # seconds: others may read more slowly; that one is gone, the watch finds out
_POLL = 0.05, 1.0  # seconds between two looks: the first, and the longest
_counts: dict[str, int] = {}  # how often each question was asked: all processes ask in the same order


def _folder(question: str) -> str:
    _counts[question] = number = _counts.get(question, 0) + 1
    return f"{question.replace('/', ' ')}/{number}"  # the store would take it for a path


def _all(store: Store, folder: str, total: int, deadline: float) -> dict[int, str]:
    """Everybody's answer, once all are there; what there is at the deadline."""
    pause = _POLL[0]
    while True:
        answers = {int(process): value for process, value in store.under(folder).items()}
        if len(answers) == total or time.monotonic() > deadline:
            return answers
        time.sleep(pause)
        pause = min(2 * pause, _POLL[1])


def agree(question: str, facts: Mapping[str, object], *, timeout: float = _PATIENCE, **words: str) -> None:
    """Refuse to go on where another process has other facts. Nothing to do for a process that is alone.

    Args:
      question: what it is about; every process asks the same ones in the same order.
      facts: JSON-compatible values by name.
      timeout: seconds for all to have answered.
      **words: how and advice, of `facts.differences`.

    Raises:
      UsageError: on all processes alike; the message names facts and processes.
      ClusterError: somebody has not answered in time.
    """
    number, total = processes()
    if total == 1:
        return
    with watch.phase(f"comparing {question}"):
        store, folder = Store(), _folder(question)
        store.set(f"{folder}/{number}", json.dumps(dict(facts)))
        answers = _all(store, folder, total, time.monotonic() + timeout)
        if missing := set(range(total)) - answers.keys():
            raise ClusterError(f"{names(missing)} did not say for {timeout:.0f} s what {question} it has")
        if differ := differences({process: json.loads(answer) for process, answer in answers.items()}, **words):
            raise UsageError(differ)


def of_first(question: str, value):
    """Process 0's value, on all processes: for what they might see differently, as files on a network disk.

    Args:
      question: what it is about; every process asks the same ones in the same order.
      value: JSON-compatible; the one of process 0 counts.

    Raises:
      ClusterError: process 0 has not said it in time.
    """
    number, total = processes()
    if total == 1:
        return value
    with watch.phase(f"hearing of process 0: {question}"):
        store, folder = Store(), _folder(question)
        if number == 0:
            store.set(f"{folder}/0", json.dumps(value))
            return value
        return json.loads(_wait_for(store, folder, question))


def agree_on_folder(path, *, flag: str = "--workdir", timeout: float = 90) -> None:
    """Refuse to go on where the folder is not the same one on all processes. Nothing to do for a process that is alone.

    Process 0 leaves a file of a fresh name there, the others look for it, and it is taken away again.

    Args:
      path: a pathlib.Path of the folder, or what has its methods; made by process 0 if needed.
      flag: the one that names it.
      timeout: seconds to look: network disks remember for up to a minute that something was not there.

    Raises:
      UsageError: on all processes alike; the message names those that do not see it.
    """
    number, total = processes()
    if total == 1:
        return
    with watch.phase("comparing the run directory"):
        store, folder = Store(), _folder("run directory")
        if number == 0:
            path.mkdir(parents=True, exist_ok=True)
            token = path / f".seen_by_all_{secrets.token_hex(8)}"
            token.write_text("")
            try:
                store.set(f"{folder}/0", token.name)
                answers = _all(store, folder, total, time.monotonic() + timeout + _PATIENCE)
            finally:
                token.unlink(missing_ok=True)
            blind = [process for process in range(1, total) if answers.get(process) != "seen"]
            store.set(f"{folder} verdict/0", json.dumps(blind))
        else:
            name = _wait_for(store, folder, "the run directory")
            seen = _look_for(path / name, time.monotonic() + timeout)
            store.set(f"{folder}/{number}", "seen" if seen else "not seen")
            blind = json.loads(_wait_for(store, f"{folder} verdict", "the run directory"))
        if blind:
            raise UsageError(
                f"{flag}={path} is not the same folder on all hosts: {names(blind)} did not see within {timeout:.0f} s what process 0 "
                "wrote there; it must be on a disk that all of them share"
            )


def _wait_for(store: Store, folder: str, question: str) -> str:
    """What process 0 writes there."""
    deadline, pause = time.monotonic() + _PATIENCE, _POLL[0]
    while (value := store.under(folder).get("0")) is None:
        if time.monotonic() > deadline:
            raise ClusterError(f"process 0 said nothing about {question} for {_PATIENCE:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, _POLL[1])
    return value


def _look_for(path, deadline: float) -> bool:
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
