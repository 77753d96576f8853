"""A run that goes on: whose score is whose, what may have changed since it stopped, and that nobody else works there."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import model_source
from r2vpo_jax.evaluation.validation import Evaluation
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import checkpoints, instruments
from r2vpo_jax.training.trainer import train
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same_run, rows, snapshot, stop, train_rows


def score_of(folder, iteration):
    return json.loads(checkpoints.manifest(folder, iteration).read_text())["score"]


# ---- scores ----


@pytest.fixture
def scores(monkeypatch):
    """Validation scores that are given out in this order, whatever the policy does."""
    left, average = [], Evaluation.average_at
    monkeypatch.setattr(
        Evaluation, "average_at", lambda self, k: left.pop(0) if self.split == "validation" else average(self, k)
    )
    return left


def test_a_score_belongs_to_the_weights_that_it_was_measured_on(tiny_config, tmp_path, scores):
    """Validated after 0, 3 and 4; saved after 2 and 4, after 1 as it is stopped there, and after 3, the best."""
    unaligned = {"eval_every": 3, "checkpoint_every": 2, "max_checkpoints": 9}
    config, run = tiny_config(trainer=unaligned), tmp_path / "run"
    folder = run / "checkpoints"
    scores.extend([0.9, 0.5, 0.25])
    stop(config, run, 1)
    assert score_of(folder, 1) is None, "0.9 is the base model's"
    assert checkpoints.best(folder) is None
    with pytest.raises(ValueError, match=r"no checkpoint of .* has a validation score of its own.*--checkpoint=last"):
        model_source.find(str(run), "best")
    stop(config, run, 3)
    assert [score_of(folder, step) for step in (1, 2, 3)] == [None, None, 0.5]
    summary = train(config, run)
    assert [score_of(folder, step) for step in (3, 4)] == [0.5, 0.25]
    assert model_source.find(str(run), "best").iteration == 3
    assert (summary["best_pass_at_1"], summary["final_validation_pass_at_1"]) == (0.5, 0.25)


@pytest.mark.slow
def test_the_best_is_kept_from_deletion(tiny_config, tmp_path, scores):
    """The checkpoint of iteration 1, which no interval asks for."""
    config = tiny_config(trainer={"eval_every": 1, "checkpoint_every": 3, "max_checkpoints": 1})
    scores.extend([0.9, 0.5, 0.1, 0.25, 0.4])
    summary = train(config, tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [4, 1]
    assert summary["best_pass_at_1"] == 0.5
    assert model_source.find(str(tmp_path / "run"), "best").iteration == 1


# ---- other settings ----


def test_a_run_goes_on_with_settings_that_change_nothing(finished_run, tiny_config, tmp_path):
    """Bit for bit as if it had had them from the beginning; the rest is refused by name, and nothing is written."""
    run, said = tmp_path / "run", []
    stop(tiny_config(), run, 2)
    before = snapshot(run)
    for changed, named in (
        ({"optimizer": {"learning_rate": 0.5}}, r"optimizer\.learning_rate: 0\.001 there, 0\.5 here"),
        ({"trainer": {"num_iterations": 3}}, "num_iterations: 4 there, 3 here, fewer than it was started for"),
        ({"trainer": {"checkpoint_every": 1, "eval_problems": 8}}, "eval_problems: 16 there, 8 here"),
    ):
        with pytest.raises(UsageError, match=named):
            train(tiny_config(**changed), run)
        assert snapshot(run) == before
    changed = {"checkpoint_every": 1, "max_nonfinite_updates": 3, "trackers": ("tensorboard",)}
    config = tiny_config(trainer=changed, alarms={"patience": 3})
    train(config, run, say=said.append)
    assert rows(run) == rows(finished_run[0])
    (event,) = (row for row in rows(run, "events") if row["event"] == "settings_changed")
    assert event["iteration"] == 2
    assert event["settings"] == [
        "alarms.patience: 10 there, 3 here", "trainer.checkpoint_every: 2 there, 1 here",
        "trainer.max_nonfinite_updates: 0 there, 3 here", "trainer.trackers: [] there, ['tensorboard'] here",
    ]  # fmt: skip
    assert f"going on with other settings: {'; '.join(event['settings'])}" in said
    assert not any("last digits" in line for line in said)
    assert json.loads((run / "config.json").read_text())["trainer"]["checkpoint_every"] == 1
    assert list((run / "tensorboard").iterdir())
    before = snapshot(run)
    assert train(tiny_config(), run) == json.loads((run / "report" / "summary.json").read_text())
    assert snapshot(run) == before, "a finished run shows its result"


@pytest.mark.slow
def test_a_finished_run_gets_more_iterations(finished_run, tiny_config, tiny_model, mesh, tmp_path):
    """And ends as one that was started for so many; without a checkpoint to go on from it is left as it is."""
    run, longer = tmp_path / "run", tiny_config(trainer={"num_iterations": 6})
    shutil.copytree(finished_run[0], run)
    shutil.copytree(finished_run[0], tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    assert stop(longer, run, 5) == "stopped after iteration 5 of 6; the same command goes on from there"
    assert model_source.find(str(run)).iteration == 5, "hf/ is of an earlier end"
    train(longer, run)
    train(longer, tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole", longer, tiny_model, mesh)
    with pytest.raises(UsageError, match="holds a finished run without an intact checkpoint"):
        train(longer, tmp_path / "bare")
    assert (tmp_path / "bare" / "report" / "summary.json").exists()
    assert len(rows(tmp_path / "bare")) == len(rows(finished_run[0]))


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"model": {"param_dtype": "bfloat16"}}, {"trainer": {"packing": True}}], ids=str)
def test_a_run_with_other_programs_ends_the_same_after_a_stop(changed, tiny_config, tmp_path, mesh):
    """The optimizer's moments are restored in the dtype that they are computed in; packs are a function of the batch."""
    config = tiny_config(**changed)
    model = open_base_model(config.model).model
    train(config, tmp_path / "whole")
    stop(config, tmp_path / "parts", 2)
    train(config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", config, (model, None), mesh)


@pytest.mark.slow
def test_a_run_goes_on_with_sums_in_other_pieces(finished_run, tiny_config, tmp_path):
    """Other micro-batches, packed ones too, are the same result but for its last digits, and that is said."""
    said = []
    stop(tiny_config(), tmp_path / "run", 2)
    config = tiny_config(trainer={"micro_batch_size": 8, "scoring_chunk_size": 7, "packing": True})
    train(config, tmp_path / "run", say=said.append)
    (note,) = (line for line in said if "last digits" in line)
    assert note.startswith("note: trainer.micro_batch_size, trainer.packing, trainer.scoring_chunk_size take")
    for row, expected in zip(train_rows(tmp_path / "run"), train_rows(finished_run[0]), strict=True):
        for name in ("reward/mean", "ratio/variance", "optimizer/grad_norm", "dual/variance_coef"):
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(finished_run, config_file, tiny_config, tmp_path):
    """From one device to two, and what has changed is said: settings, devices."""
    stop(tiny_config(), tmp_path / "run", 2)
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}",
            "--config.mesh.data=2",
        ],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on with other settings: mesh.data: 1 there, 2 here" in done.stdout
    assert "devices 1 there, 2 here: from here on the last digits may differ" in done.stdout
    for row, expected in zip(train_rows(tmp_path / "run"), train_rows(finished_run[0]), strict=True):
        for name in ("reward/mean", "ratio/variance", "optimizer/grad_norm"):
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_another_number_of_cores_is_said(tiny_config, tmp_path, monkeypatch):
    """XLA shares sums out over as many threads."""
    config, run, said = tiny_config(), tmp_path / "run", []
    stop(config, run, 1)
    here = instruments.machine()
    assert here["cores"] >= 1
    stop(config, run, 1, say=said.append)
    assert not any("last digits" in line for line in said)
    monkeypatch.setattr(instruments, "machine", lambda: here | {"cores": 64})
    stop(config, run, 1, say=said.append)
    (line,) = (line for line in said if "last digits" in line)
    assert f"goes on with cores {here['cores']} there, 64 here: from here on" in line
    events = {row["event"]: row for row in rows(run, "events")}
    assert events["start"]["machine"] == here
    assert (events["machine_changed"]["before"], events["machine_changed"]["now"]) == (here, here | {"cores": 64})


# ---- one at a time ----


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_lives(tiny_config, tmp_path):
    config, run, refusals = tiny_config(), tmp_path / "run", []

    def another(_):
        before = snapshot(run)
        with pytest.raises(UsageError, match=f"run is in use by process {os.getpid()} on") as refused:
            train(config, run)
        assert snapshot(run) == before
        refusals.append(str(refused.value))

    stop(config, run, 1, on_iteration=another)
    stop(config, run, 2)
    assert len(refusals) == 1
