"""scripts/benchmark.py, as a user starts it, on tiny sweeps."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

GRID = """
from ml_collections import config_dict

from r2vpo_jax import config
from r2vpo_jax.config import grid


def get_config(budgets):
    base = config.make({sections})
    cells = grid.values("objective.dual.budget", [float(budget) for budget in budgets.split("-")])
    sweep = config.SweepConfig(cells=cells, seeds=(0,))
    return config_dict.ConfigDict({{"base": base, "sweep": config.to_config_dict(sweep)}})
"""


@pytest.fixture(scope="module")
def config_file(tiny_sections, tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "tiny_sweep.py"
    path.write_text(GRID.format(sections=", ".join(f"{name}={fields!r}" for name, fields in tiny_sections.items())))
    return path


def benchmark(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmark.py", "sweep", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_both_modes_and_the_cost_by_size(config_file):
    done = benchmark(f"--config={config_file}:0.01-0.02", "--runs=3", "--iterations=2", "--process_runs=2", "--sizes=2")
    assert done.returncode == 0, done.stdout + done.stderr
    # Two cells: three runs are rounded up to two whole seeds.
    assert "4 runs (2 cells), 2 iterations each, validation every 2" in done.stdout
    assert "processes: 2 runs, 2 at a time" in done.stdout
    assert "program 1 of 1: 4 runs like budget=0.01_seed=0" in done.stdout
    cores = int(re.search(r"runs at a time on (\d+) x cpu", done.stdout)[1])  # each is a device
    rates = {
        name: (float(rate), float(ratio))
        for name, rate, ratio in re.findall(r"^(\w[\w ,]*?) +(\d+)   x ([\d.]+)$", done.stdout, flags=re.MULTILINE)
    }
    assert list(rates) == ["processes", "fused", "fused, compilation left out"]
    assert rates["processes"][1] == 1
    assert rates["fused"][0] < rates["fused, compilation left out"][0]
    # Rates are rounded to whole runs, ratios to hundredths.
    assert rates["fused"][1] == pytest.approx(rates["fused"][0] / rates["processes"][0], abs=0.02)
    table = [line.split() for line in done.stdout.partition("MiB/run")[2].splitlines()[1:]]
    assert [row[0] for row in table] == [str(max(2, cores))]
    assert all(float(cell) > 0 for row in table for cell in row)


def test_modes_that_do_not_exist_are_refused():
    done = benchmark("--modes=fused,threads")
    assert done.returncode == 1
    assert done.stderr.strip() == "--modes: threads is none of fused, processes"
