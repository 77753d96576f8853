"""Who is measured: this tree in this process, and others in processes of their own that answer over pipes."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from references.environments import REFERENCES, EnvironmentFailedError, clean_environment, interpreter, reason

ROOT = REFERENCES.parents[1]
OURS = "this tree"
# name -> (whose environment, what it can do)
PEERS = {
    "torch": ("trl", ("rollout", "scoring", "update")),
    "trl": ("trl", ("rollout", "update")),
    "tunix": ("tunix", ("rollout", "update")),
}


def forget_compiled() -> None:
    """No program comes from a cache on disk: compilation is measured."""
    jax.config.update("jax_enable_compilation_cache", False)


def share_memory(number: int) -> None:
    """Before the first computation: let `number` processes share a GPU, unless the user has said how."""
    if number > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.92 / number:.2f}")


def revision() -> str | None:
    """The commit of this tree, marked if files have changed since; None outside a git repository."""
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or None


class Ours:
    """This tree."""

    name = OURS

    def __init__(self, programs):
        self.prepare, self.round, self.release = programs.prepare, programs.round, programs.release

    def can(self, program: str) -> bool:
        return True


class Worker:
    """A process that runs the programs of one workload; references/serving.py is its side."""

    def __init__(self, name, command, environment, programs=None):
        """Start it; it is not waited for.

        Args:
          programs: what it can run (None: everything).
        """
        self.name, self._can = name, programs
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 closed by close()
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def can(self, program: str) -> bool:
        return self._can is None or program in self._can

    def prepare(self, program: str) -> dict:
        return self._ask("prepare", program)

    def round(self) -> float:
        return self._ask("round")

    def release(self) -> None:
        return self._ask("release")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def _ask(self, call, *arguments):
        """An answer.

        Raises:
          EnvironmentFailedError: the process has ended, with the last line of what it said.
        """
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"call": call, "arguments": arguments}), file=self._process.stdin, flush=True)
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        raise EnvironmentFailedError(f"{self.name}, {call} {' '.join(arguments)}: {reason(self._said.read(), code)}")


@contextlib.contextmanager
def checkout(revision: str):
    """A worktree of a revision, while the context lasts; a folder that holds a tree already is taken as it is.

    Raises:
      EnvironmentFailedError: git does not know the revision.
    """
    if Path(revision, "r2vpo_jax").is_dir():
        yield str(Path(revision).resolve())
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = str(Path(folder) / "tree")
        done = subprocess.run([*git, "add", "--detach", tree, revision], capture_output=True, text=True)
        if done.returncode:
            raise EnvironmentFailedError(f"--against={revision}: {reason(done.stderr, done.returncode)}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True, capture_output=True)


@contextlib.contextmanager
def others(against, workload, programs, pythons):
    """Workers for the names of --against: peers, and else revisions of this repository, or folders of one.

    A peer that cannot be installed or started is left out, and it is said why.

    Args:
      workload: a `Workload`.
      programs: ours, which write the weights that peers read.
      pythons: interpreters to take for peers, by name, instead of environments of their own.

    Yields:
      The list of workers.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        described = folder / "workload.json"
        described.write_text(json.dumps(dataclasses.asdict(workload)), encoding="utf-8")
        if any(name in PEERS for name in against):
            programs.save(folder / "weights")
        environment = clean_environment() | ({"CUDA_VISIBLE_DEVICES": ""} if jax.default_backend() == "cpu" else {})
        started = []
        for name in against:
            if name in PEERS:
                home, can = PEERS[name]
                try:
                    python = pythons.get(name) or interpreter(home)
                except EnvironmentFailedError as error:
                    print(f"left out: {error}", file=sys.stderr)
                    continue
                script = REFERENCES / f"{name}_programs.py"
                worker = Worker(name, [python, script, described, folder / "weights"], environment, can)
            else:
                tree = stack.enter_context(checkout(name))
                command = [sys.executable, REFERENCES / "revision_worker.py", tree, described]
                worker = Worker(name, command, os.environ | {"PYTHONPATH": tree})
            stack.callback(worker.close)
            started.append(worker)
        yield started
