"""A run of several processes on this machine that talk over the loopback, and what can be done to them."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from r2vpo_jax.run import files
from tests.helpers.paths import ROOT

HEARTBEAT = 8  # seconds; short, for a test's sake: processes that share two cores may be slow to show a sign of life


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    output: str
    seconds: float  # since `Processes.ended` was called

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Processes:
    """`experiments.train` as several processes; kills what is left at the end of the `with` block.

    Args:
      config_file: for --config.
      workdir: of the run; what processes print goes to files beside it.
      count: of processes.
      *flags: for all.
      own: flags by process, for some; None: it is not started.
      script: to be run in place of experiments.train, with the same flags.
      heartbeat: seconds.
      environment: variables for all.
    """

    def __init__(
        self, config_file, workdir, count: int, *flags, own=None, script=None, heartbeat=HEARTBEAT, **environment
    ):
        self.workdir, self.count = pathlib.Path(workdir), count
        address, own = f"127.0.0.1:{free_port()}", own or {}
        self._outputs = [self.workdir.parent / f"{self.workdir.name}_process_{i}.txt" for i in range(count)]
        self._processes: dict[int, subprocess.Popen] = {}
        for i in range(count):
            mine = own.get(i, ())
            if mine is None:
                continue
            command = [
                sys.executable, *(("-m", "experiments.train") if script is None else (str(script),)), f"--config={config_file}", f"--workdir={workdir}",
                f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={i}",
                f"--heartbeat_timeout_seconds={heartbeat}", *flags, *mine,
            ]  # fmt: skip
            with self._outputs[i].open("w") as output:
                self._processes[i] = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)} | environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes.values():
            process.kill()
            process.wait()

    def output(self, process: int) -> str:
        return self._outputs[process].read_text()

    def send(self, process: int, number: signal.Signals) -> None:
        """Send a signal; nothing happens to a process that has ended."""
        self._processes[process].send_signal(number)

    def wait_for_rows(self, number: int) -> None:
        """Until the run has written so many rows of metrics."""
        file = self.workdir / "metrics.jsonl"
        self._wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") >= number)

    def wait_for_text(self, process: int, text: str) -> None:
        """Until the process has printed it."""
        self._wait_for(lambda: text in self.output(process))

    def _wait_for(self, happened, timeout: float = 900) -> None:
        until = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < until, [self.output(i)[-2000:] for i in self._processes]
            assert all(p.poll() is None for p in self._processes.values()), [self.output(i) for i in self._processes]
            time.sleep(0.01)

    def ended(self, *of: int, timeout: float = 900) -> dict[int, Ended]:
        """How these processes (default: all) ended, once they have."""
        start = time.monotonic()
        seconds = {}
        while waiting := [i for i in of or self._processes if i not in seconds]:
            assert time.monotonic() - start < timeout, [self.output(i)[-2000:] for i in waiting]
            for i in waiting:
                if self._processes[i].poll() is not None:
                    seconds[i] = time.monotonic() - start
            time.sleep(0.02)
        return {i: Ended(self._processes[i].returncode, self.output(i), seconds[i]) for i in seconds}


def run(config_file, workdir, count: int, *flags, **options) -> dict[int, Ended]:
    """The whole run, or the rest of it, which must end well. Any number of processes may go on with the run of another."""
    with Processes(config_file, workdir, count, *flags, **options) as processes:
        ended = processes.ended()
    for process in ended.values():
        assert process.code == 0, process.output[-4000:]
    return ended


def assert_same_outcome(workdir, expected) -> None:
    """The two runs have the same metrics and weights, bit for bit."""
    mine, theirs = ([_without_time(row) for row in _rows(folder)] for folder in (workdir, expected))
    assert mine == theirs
    weights = [(pathlib.Path(folder) / "hf" / "model.safetensors").read_bytes() for folder in (workdir, expected)]
    assert weights[0] == weights[1]


def _rows(workdir):
    return files.read_jsonl(pathlib.Path(workdir) / "metrics.jsonl")


def _without_time(row: dict) -> dict:
    return {name: repr(value) for name, value in row.items() if not name.startswith(files.TIME_PREFIXES)}
