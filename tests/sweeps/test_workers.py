"""Runs in processes of their own: all are made, a dead one is a result, Ctrl-C stops them all, and none is left behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from r2vpo_jax.errors import UsageError
from r2vpo_jax.sweeps import workers
from tests.helpers.jobs import act, jobs
from tests.helpers.paths import ROOT


def files(folder, name):
    return sorted(str(path.parent.name) for path in folder.glob(f"*/{name}"))


def test_all_are_made_and_the_dead_are_results(tmp_path):
    said = []
    names = ("good_0", "killed_1", "good_2", "exit_3", "fail_4", "good_5")
    workers.train_in_processes(jobs(tmp_path, *names), 2, said.append, act)
    assert files(tmp_path, "finished") == ["good_0", "good_2", "good_5"]
    errors = {
        name: json.loads((tmp_path / name / "failed.json").read_text()) for name in files(tmp_path, "failed.json")
    }
    assert errors.keys() == {"killed_1", "exit_3", "fail_4"}
    assert "by SIGKILL; the machine may have run out of memory" in errors["killed_1"]["error"]
    assert "with exit code 7" in errors["exit_3"]["error"]
    assert not any(error["collapsed"] for error in errors.values())
    assert (tmp_path / "good_2" / "log.txt").read_text() == "this is good_2\n"
    assert "last words" in (tmp_path / "exit_3" / "log.txt").read_text()
    assert len(said) == 6
    assert said[-1].startswith("[6/6] ")
    who = {name: (tmp_path / name / "ran").read_text().split() for name in names}
    assert len({pid for pid, *_ in who.values()}) > 2, "others in the place of the dead"
    share = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert all(abs(int(cores) - share) <= 1 and memory == "0.450" for _, cores, memory in who.values())
    assert not multiprocessing.active_children()


def test_what_a_user_can_put_right_stops_all(tmp_path):
    with pytest.raises(UsageError, match="^refuse_1: the disk is full$"):
        workers.train_in_processes(jobs(tmp_path, "wait_0", "refuse_1", "good_2"), 2, lambda _: None, act)
    assert files(tmp_path, "failed.json") == files(tmp_path, "finished") == []
    assert not multiprocessing.active_children()


PROGRAM = """
import pathlib, sys
from r2vpo_jax.sweeps import workers
from tests.helpers.jobs import act, jobs
if __name__ == "__main__":
    workers.train_in_processes(jobs(pathlib.Path(sys.argv[1]), "good_0", "wait_1", "wait_2", "good_3"), 2, print, act)
"""


@pytest.fixture
def program(tmp_path):
    """A sweep with two endless runs in a process group of its own; (process, directory), once both are under way."""
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(files(tmp_path, "waiting")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(files(tmp_path, "waiting")) == 2
    yield process, tmp_path
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_ctrl_c_stops_all_and_what_was_done_is_kept(program):
    """A terminal sends the signal to every process of the group; each worker is stopped once, not killed."""
    process, folder = program
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert files(folder, "saved") == ["wait_1", "wait_2"]
    assert not (folder / "good_3").exists()
    assert files(folder, "failed.json") == []
    assert "stopped with 1 of 4 runs ended" in output
    assert "KeyboardInterrupt" not in output


def test_no_worker_outlives_the_sweep(program):
    process, folder = program
    process.kill()
    process.wait()
    pids = [int((folder / name / "ran").read_text().split()[0]) for name in ("wait_1", "wait_2")]
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
    assert files(folder, "saved") == []


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
