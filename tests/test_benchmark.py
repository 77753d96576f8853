"""scripts/benchmark.py, as a user starts it, on tiny sweeps and tiny workloads."""

import itertools
import json
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
        [sys.executable, ROOT / "scripts" / "benchmark.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_both_modes_and_the_cost_by_size(config_file):
    done = benchmark(
        "sweep", f"--config={config_file}:0.01-0.02", "--runs=3", "--iterations=2", "--process_runs=2", "--sizes=2"
    )
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
    done = benchmark("sweep", "--modes=fused,threads")
    assert done.returncode == 1
    assert done.stderr.strip() == "--modes: threads is none of fused, processes"


def table(text):
    """{(program, who): the cells} of the Markdown table at the end."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


@pytest.mark.slow
def test_an_update_of_adapters():
    done = benchmark("cpu-reference", "--tiny", "--rounds=1", "--programs=update", "--set=model.lora.rank=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model.lora.rank=2" in done.stdout
    (cells,) = table(done.stdout).values()
    assert float(cells[0]) > 0


@pytest.mark.slow
def test_all_programs_of_a_workload(tmp_path):
    names = ("rollout", "scoring", "update", "iteration")
    outputs = ("--json=results.json", "--markdown=results.md", "--profile=traces")
    outputs = [f"{option}={tmp_path / name}" for option, name in (text.split("=") for text in outputs)]
    done = benchmark("long-tail", "--tiny", "--rounds=2", "--set=model.remat=True", *outputs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model.remat=True" in done.stdout
    stored = json.loads((tmp_path / "results.json").read_text())
    lines = {line["program"]: line for line in stored["results"]}
    assert tuple(lines) == names
    assert stored["configuration"]["model.remat"] is True
    for line in lines.values():
        assert len(line["rounds"]) == 2
        assert 1 < line["mean_length"] < line["max_length"] <= 16
        assert line["speed"] == 1
    assert lines["update"]["program_bytes"] > lines["scoring"]["program_bytes"] > 0
    assert 0 < lines["update"]["mfu"] < 1
    assert 0 < lines["rollout"]["bandwidth_share"] < 1
    assert lines["rollout"]["tokens"] == lines["iteration"]["tokens"]
    assert (tmp_path / "results.md").read_text() in done.stdout
    assert list(table(done.stdout)) == [(name, "this tree") for name in names]
    for name in names:
        assert len(list((tmp_path / "traces" / f"long-tail-{name}").rglob("*.xplane.pb"))) == 1
    assert done.stdout.count(" calls  ") == 40  # ten operations for each


@pytest.mark.slow
@pytest.mark.parametrize(
    ("revision", "programs"), [("HEAD", ("scoring",)), ("4d68057", ("rollout", "scoring", "update", "iteration"))]
)
def test_an_older_revision_on_the_same_work(revision, programs, tmp_path, monkeypatch):
    git = ["git", "-C", ROOT]
    if subprocess.run([*git, "cat-file", "-e", f"{revision}^{{commit}}"], capture_output=True).returncode:
        pytest.skip("the history does not go back that far")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = benchmark("long-tail", "--tiny", "--rounds=2", f"--against={revision}", f"--programs={','.join(programs)}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(table(done.stdout)) == [(name, who) for name in programs for who in ("this tree", revision)]
    listed = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


@pytest.mark.slow
def test_a_budget_ends_it_early():
    done = benchmark("cpu-reference", "--tiny", "--budget_seconds=1", "--programs=scoring,update", "--rounds=50")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not begun, --budget_seconds is spent" in done.stdout


@pytest.mark.slow
def test_sampling_beside_learning_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    files = f"--json={tmp_path / 'overlap.json'}", f"--png={tmp_path / 'overlap.png'}"
    done = benchmark("overlap", "--iterations=2", "--rounds=1", "--prompts=4", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu: 1 sample, the others learn" in done.stdout
    assert "the same rows, bit for bit; in the last one age 8 updates" in done.stdout
    assert (tmp_path / "overlap.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "overlap.json").read_text())["runs"]
    verified, updates = ([s for s in runs["beside"]["spans"] if s["phase"] == name] for name in ("verify", "update"))
    assert any(a["start"] < b["end"] and b["start"] < a["end"] for a in verified for b in updates)
    spans = sorted((s["start"], s["end"]) for s in runs["in turns"]["spans"])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
