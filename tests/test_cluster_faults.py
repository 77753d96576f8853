"""Processes of one run that are killed, stopped, told to save, or do not belong: the others end in time, with one line.

Two processes over the loopback. `python -m tests.kill_processes` does more of it: any number, at random moments.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file, save_file

from r2vpo_jax import cluster
from r2vpo_jax.run import files
from tests.helpers import processes
from tests.helpers.paths import ROOT, TINY_BASE
from tests.helpers.processes import HEARTBEAT, Processes

pytestmark = pytest.mark.slow

SLACK = 30  # seconds more than the heartbeat, on a machine with few cores; JAX by itself would take longer
FLAGS = ("--config.mesh.data=-1", "--config.trainer.num_iterations=12", "--initialization_timeout_seconds=120")
ENDLESS = (*FLAGS, "--config.trainer.num_iterations=100000", "--config.trainer.checkpoint_every=1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def whole(config_file, cache, tmp_path_factory):
    """Runs that nothing happens to, by the number of their processes."""
    made = {}

    def of(count):
        if count not in made:
            made[count] = tmp_path_factory.mktemp("whole") / "run"
            processes.run(config_file, made[count], count, *FLAGS, **cache)
        return made[count]

    return of


@pytest.mark.parametrize(("count", "victim"), [(2, 0)])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(count, victim, config_file, cache, whole, tmp_path):
    with Processes(config_file, tmp_path / "run", count, *FLAGS, **cache) as run:
        run.wait_for_rows(7)
        run.send(victim, signal.SIGKILL)
        ended = run.ended(*(i for i in range(count) if i != victim))
    for process in ended.values():
        assert process.code == cluster.LOST, process.output
        assert process.seconds < HEARTBEAT + SLACK
        assert "Traceback" not in process.output
        assert process.last_line.startswith("error: iteration "), "the step is named"
        assert f": process {victim} on " in process.last_line
        assert "the same command on all processes goes on from checkpoint " in process.last_line
    processes.run(config_file, tmp_path / "run", count, *FLAGS, **cache)
    processes.assert_same_outcome(tmp_path / "run", whole(count))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_ends_the_others_and_then_itself(victim, config_file, cache, tmp_path):
    with Processes(config_file, tmp_path / "run", 2, *ENDLESS, **cache) as run:
        run.wait_for_rows(5)
        run.send(victim, signal.SIGSTOP)
        (other,) = run.ended(1 - victim).values()
        assert other.code == cluster.LOST
        assert 0.5 * HEARTBEAT < other.seconds < HEARTBEAT + SLACK
        assert f": process {victim} on " in other.last_line
        assert "is gone or stopped: no sign of life" in other.last_line
        run.send(victim, signal.SIGCONT)
        (stopped,) = run.ended(victim).values()
        assert stopped.code == cluster.LOST
        assert stopped.seconds < HEARTBEAT + SLACK
        assert stopped.last_line.startswith("error: ")


def test_a_process_that_fails_is_named_with_its_reason(config_file, cache, tmp_path):
    """Its code raises in the middle of the run; the others are not left to wait for it."""
    (tmp_path / "broken.py").write_text(
        "import sys\n"
        "from absl import flags\n"
        "from experiments import train\n"
        "from r2vpo_jax import cli\n"
        "from r2vpo_jax.training import trainer\n"
        "def main():\n"
        "    def fail(iteration):\n"
        "        if iteration.number == 2 and '--process_id=1' in sys.argv:\n"
        "            raise KeyError('a bug')\n"
        "    go = trainer.train\n"
        "    trainer.train = lambda *args, **more: go(*args, on_iteration=fail, **more)\n"
        "    train.main()\n"
        "cli.run(main)\n"
    )
    with Processes(config_file, tmp_path / "run", 2, *FLAGS, script=tmp_path / "broken.py", **cache) as run:
        ended = run.ended()
    assert (ended[0].code, ended[1].code) == (cluster.LOST, 1)
    assert "Traceback" in ended[1].output
    assert "KeyError: 'a bug'" in ended[1].output
    assert "ended: KeyError: 'a bug'" in ended[0].last_line
    assert ended[0].seconds - ended[1].seconds < SLACK


@pytest.mark.parametrize(("during", "victim"), [("start", 1), ("rows", 0)])
def test_sigterm_to_one_saves_the_same_iteration_on_all(during, victim, config_file, cache, tmp_path):
    with Processes(config_file, tmp_path / "run", 2, *ENDLESS, **cache) as run:
        if during == "rows":
            run.wait_for_rows(6)
        else:
            run.wait_for_text(0, "noise floor:")  # then comes the first test
        run.send(victim, signal.SIGTERM)
        ended = run.ended()
    number = max(row["iteration"] for row in files.read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    for process in ended.values():
        assert process.code == 0, process.output
        assert process.last_line == f"stopped after iteration {number} of 100000; the same command goes on from there"
    manifests = sorted(int(p.stem) for p in (tmp_path / "run" / "checkpoints" / "manifests").glob("*.json"))
    assert manifests[-1] == number


def test_other_weights_are_refused_before_any_is_read(config_file, cache, tmp_path):
    shutil.copytree(TINY_BASE, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name: value * (1.01 if value.ndim > 1 else 1) for name, value in weights.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    own = {0: [f"--config.model.path={TINY_BASE}"], 1: [f"--config.model.path={tmp_path / 'base'}"]}
    with Processes(config_file, tmp_path / "run", 2, *FLAGS, own=own, **cache) as run:
        ended = run.ended()
    for process in ended.values():
        assert process.code == 2
        assert "the processes of this run differ (the base model's weights: " in process.last_line
        assert "mesh {" not in process.output


def test_another_configuration_is_refused_at_once(config_file, tmp_path):
    own = {1: ["--config.optimizer.learning_rate=0.5", "--config.seed=1"]}
    with Processes(config_file, tmp_path / "run", 2, *FLAGS, own=own) as run:
        ended = run.ended()
    for process in ended.values():
        assert process.code == 2
        assert (
            "differ (optimizer.learning_rate: 0.001 on process 0, 0.5 on process 1; seed: 0 on process 0, 1 on process 1)"
            in (process.last_line)
        )
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_come_is_named(config_file, tmp_path):
    flags = (*FLAGS, "--initialization_timeout_seconds=8")
    with Processes(config_file, tmp_path / "run", 3, *flags, own={1: None}) as run:
        ended = run.ended()
    assert "waiting for 1 of 3 hosts: process 1 (" in ended[0].output
    for process in ended.values():
        assert process.code == cluster.LOST
        assert "in vain for 1 of 3 hosts: process 1" in process.last_line or "process 0 went away" in process.last_line


def test_sigterm_ends_a_process_of_many_while_it_starts(tmp_path):
    """JAX's own preemption service would swallow it there, and the run would go on to its end."""
    code = (
        "import sys, time\n"
        "from absl import flags\n"
        "from r2vpo_jax import cli\n"
        "flags.FLAGS(sys.argv)\n"
        "cli.start_devices()\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    address = f"--coordinator_address=127.0.0.1:{processes.free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, "--num_processes=2", f"--process_id={i}"],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in started:
            assert process.stdout.readline() == "started\n"
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == -signal.SIGTERM
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
