"""The fused mode as a command: stopped and gone on with, and on two devices as on one."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers.fused import STEADY, Run, assert_same
from tests.helpers.paths import ROOT
from tests.helpers.trees import merged

BUDGETS = (0.005, 0.01, 0.02)
NAMES = [f"budget={budget:g}_seed=0" for budget in BUDGETS]
CONFIG = """
from ml_collections import config_dict

from r2vpo_jax import config
from r2vpo_jax.config import grid


def get_config():
    sweep = config.SweepConfig(cells=grid.values("objective.dual.budget", {budgets!r}), seeds=(0,))
    base = config.make(**{sections!r})
    return config_dict.ConfigDict({{"base": base, "sweep": config.to_config_dict(sweep)}})
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tiny_sections, tmp_path_factory):
    """Starts the command; `start(workdir, **environment)` is the process."""
    trainer = {"num_iterations": 20, "eval_every": 2, "eval_samples": 4, "test_samples": 8}
    path = tmp_path_factory.mktemp("config") / "sweep.py"
    path.write_text(CONFIG.format(budgets=BUDGETS, sections=merged(tiny_sections, STEADY | {"trainer": trainer})))
    processes = []

    def popen(workdir, **environment):
        command = [sys.executable, "-u", "-m", "experiments.sweep", f"--config={path}", f"--workdir={workdir}"]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return processes[-1]

    yield popen
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(directory, what it said) of a sweep from start to end."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, ended(start(workdir))


def ended(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def test_what_was_stopped_goes_on_to_the_same_results(whole, start, tmp_path):
    process, said = start(tmp_path), []
    for line in process.stdout:
        said.append(line)
        if line.startswith("iteration 2/20"):
            process.send_signal(signal.SIGTERM)
            break
    output = "".join(said) + ended(process)
    assert "3 runs: 3 cells × 1 seeds; mode fused" in output
    assert re.search(r"stopped after iteration \d+ of 20 of 3 runs; the same command goes on from there", output)
    assert not (tmp_path / "table.md").exists()
    done = int(re.search(r"stopped after iteration (\d+)", output)[1])
    output = ended(start(tmp_path))
    assert f"iteration {done}/20" not in output
    assert f"iteration {done + 2}/20" in output
    for name in ("table.md", "results.json", "results.parquet", "curves.parquet", "curves.png", "sweep.png"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name
    assert (whole[0] / "table.md").read_text() in whole[1]


def test_runs_on_two_devices_are_those_on_one(whole, start, tmp_path):
    """Three runs, two of them on one device and one on the other, which is filled up."""
    output = ended(start(tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu"))
    assert "4 runs at a time on 2 x cpu" in output
    for name in NAMES:
        one, two = (Run(workdir / "runs" / name, []) for workdir in (whole[0], tmp_path))
        assert_same(two, one)
