"""Runs of the trainer: what they leave behind, and whether two left the same."""

import json
import re

import jax
import numpy as np
import pytest

from r2vpo_jax import sharding
from r2vpo_jax.errors import Stopped
from r2vpo_jax.run import files
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.learner_state import without_frozen
from r2vpo_jax.training.trainer import train
from tests.helpers.paths import ROOT


def stop(config, workdir, after, **settings):
    """Train until an iteration has been done (None: until the run stops of itself), and what the run says then."""
    with pytest.raises(Stopped) as stopped:
        train(config, workdir, stop_after_iteration=after, **settings)
    return str(stopped.value)


def rows(workdir, file="metrics"):
    """All rows without the fields that measure the machine."""
    return [
        {k: v for k, v in row.items() if not k.startswith(files.TIME_PREFIXES)}
        for row in files.read_jsonl(workdir / f"{file}.jsonl")
    ]


def train_rows(workdir):
    """The rows of iterations that trained, complete."""
    return [row for row in files.read_jsonl(workdir / "metrics.jsonl") if row["kind"] == "train"]


def snapshot(directory):
    """Every file with its time and contents."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def final_state(workdir, config, tiny_model, mesh):
    """What the last checkpoint holds, on the host, and the progress saved with it."""
    learner = Learner(tiny_model[0], config, mesh)
    checkpointer = Checkpointer(workdir / "checkpoints", max_to_keep=2)
    there = map(without_frozen, (learner.abstract_state, learner.state_shardings))
    state, progress = checkpointer.restore(checkpointer.latest(), *there)
    checkpointer.close()
    return sharding.to_host(state), progress


def assert_same_run(workdir, other, config, tiny_model, mesh):
    """Bit for bit, wherever the clock has no part in it."""
    (state, progress), (other_state, other_progress) = (
        final_state(path, config, tiny_model, mesh) for path in (workdir, other)
    )
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other_state), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected, err_msg=jax.tree_util.keystr(path))
    for name in progress.keys() - {"seconds", "positions"}:
        assert progress[name] == other_progress[name], name
    for file in ("metrics", "samples"):
        assert rows(workdir, file) == rows(other, file)
    assert (workdir / "hf" / "model.safetensors").read_bytes() == (other / "hf" / "model.safetensors").read_bytes()
    clock = {"train_seconds", "phase_seconds", "peak_memory_bytes"}
    clock |= {"rollout_tokens_per_second", "update_tokens_per_second"}
    summary, other_summary = (
        {k: v for k, v in json.loads((path / "report" / "summary.json").read_text()).items() if k not in clock}
        for path in (workdir, other)
    )
    assert summary == other_summary


def undocumented(names):
    """Those metrics that docs/metrics.md lacks; it abbreviates: `ratio/x_positive`, `_negative`; `time/a`, `b`."""
    words = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    suffixes = tuple(w for w in words if w.startswith("_"))
    prefixes = {w.partition("/")[0] for w in words if "/" in w}
    names = set(names) - {"kind"} - words
    short = {name for name in names if name.partition("/")[0] in prefixes and name.partition("/")[2] in words}
    return sorted(name for name in names - short if not name.endswith(suffixes))
