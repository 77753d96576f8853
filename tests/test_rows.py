"""Rows of a batch that are local to processes: one, two and four of them come to the same."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from r2vpo_jax import rows, sharding
from tests.helpers.paths import ROOT, TINY_BASE
from tests.helpers.processes import free_port
from tests.helpers.records import assert_same, assert_same_lines
from tests.run_on_processes import CASES, GROUP, GROUPS


def test_one_process_has_everything(mesh):
    spread = rows.rows_of(mesh, 4, 2)
    assert spread.is_all
    assert spread.leads
    np.testing.assert_array_equal(spread.index, np.arange(8))
    batch = {"x": np.arange(24.0).reshape(8, 3), "row": np.arange(8)}
    assert spread.outline(batch) is batch
    assert spread.whole(batch) is batch
    assert spread.exchange(batch) == [batch]
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(spread.put(batch)), spread.fetch(spread.put(batch)))
    brought = spread.bring([batch, {name: x + 100 for name, x in batch.items()}], [[1, 3], [0, 0], [1, 0]])
    np.testing.assert_array_equal(brought["row"], [106, 107, 0, 1, 100, 101])


class Fleet:
    """What a number of processes made of every case."""

    def __init__(self, number, output):
        self.number, self.output = number, output

    def go(self):
        """Run them; what went wrong, by process and check."""
        flags = f"--xla_force_host_platform_device_count={4 // self.number}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        port = free_port()
        self.output.mkdir(exist_ok=True)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.run_on_processes"]
                + [str(x) for x in (self.number, i, port, TINY_BASE, self.output)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(self.number)
        ]
        try:
            outputs = [process.communicate(timeout=1800) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors[-4000:]
        found = [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]
        return {(i, name): text for i, checks in enumerate(found) for name, text in checks.items() if text}

    def seen(self, case):
        """Rows of all processes, in the order of the batch."""
        parts = [dict(np.load(self.output / f"{case}.{i}.npz")) for i in range(self.number)]
        return {
            name: value if name.endswith("signal") else np.concatenate([part[name] for part in parts])
            for name, value in parts[0].items()
        }, parts


@pytest.fixture(scope="module")
def fleets(tmp_path_factory):
    """By their number; those of one are continued by four, and those of both by two."""
    made = {}
    for number in (1, 4, 2):
        fleet = Fleet(number, tmp_path_factory.mktemp("processes") / str(number))
        for other in made.values():
            shutil.copytree(other.output / "stopped", fleet.output / "elastic" / str(other.number))
        wrong = fleet.go()
        assert not wrong, "\n\n".join(f"{name} of {number}: {text}" for name, text in wrong.items())
        made[number] = fleet
    return made


@pytest.mark.slow  # seven processes, each of which compiles what it runs
def test_processes_do_what_one_does(fleets):
    """Tokens, rewards, draws of the replay, V and every metric; each process holds its own rows and no others."""
    one = fleets[1]
    for number in (2, 4):
        for case in CASES:
            what = f"{case} on {number} processes:"
            found, parts = fleets[number].seen(case)
            assert_same(found, one.seen(case)[0], what)
            for part in parts:
                sizes = {len(x) for name, x in part.items() if "/drawn/" in name}
                assert sizes == {GROUPS * GROUP // number}, what
            for file in ("metrics", "samples"):
                path = fleets[number].output / case / f"{file}.jsonl"
                assert_same_lines(path, one.output / case / path.name)
        names = {path.name for path in (fleets[number].output / "mixed" / "replay").iterdir()}
        assert names == {f"rollout_{i:08d}.p{p}-of-{number}.npz" for i in range(4) for p in range(number)}
    moved = [
        case for case in CASES if not np.array_equal(*(rollout_ids(one, case, name) for name in ("sampled", "drawn")))
    ]
    assert moved == ["mixed", "resample"], "groups are trained on elsewhere than they were sampled"


def rollout_ids(fleet, case, name):
    found = [value for key, value in fleet.seen(case)[0].items() if f"/{name}/" in key and key.endswith("rollout_id")]
    return np.concatenate(found)


@pytest.mark.slow  # as above
def test_a_run_goes_on_with_other_processes_and_another_mesh(fleets):
    """From the checkpoint after two iterations; the replay's files of those processes are read by these."""
    expected, _ = fleets[1].seen("mixed")
    expected = {name: value for name, value in expected.items() if name[0] in "34"}
    for number, before in ((4, 1), (2, 1), (2, 4)):
        found, _ = fleets[number].seen(f"elastic.{before}")
        assert_same(found, expected, f"from {before} to {number}:")
