"""Interruptions that change nothing, refusals before anything is overwritten, and updates that are not finite."""

import math
import shutil
import signal

import jax
import numpy as np
import pytest

from r2vpo_jax.errors import NonFiniteUpdateError, UsageError
from r2vpo_jax.training import credit, noise_floor, update
from r2vpo_jax.training.learner import Learner, settings_of
from r2vpo_jax.training.trainer import train
from tests.helpers.runs import assert_same_run, final_state, rows, snapshot, stop

NUM_ITERATIONS, ROWS, UPDATES = 4, 16, 4  # of the tiny run


def fail_in_iteration(monkeypatch, number, error):
    """Raise in the middle of an iteration (counted from 1), after its updates."""
    learn = Learner.train_on_rollout

    def failing(learner, state, rollout, key):
        iteration = 1 + int(state.version) // UPDATES
        result = learn(learner, state, rollout, key)
        if iteration == number:
            error()
        return result

    monkeypatch.setattr(Learner, "train_on_rollout", failing)


class Killed(Exception):
    pass


def killed():
    raise Killed


def test_a_run_that_is_interrupted_ends_like_one_that_is_not(
    finished_run, tiny_config, tiny_model, mesh, tmp_path, monkeypatch, capfd
):
    """Stopped after 1, Ctrl-C in 2, killed in 4 (the last checkpoint is 2, row 3 is written), then to the end."""
    workdir = tmp_path / "run"
    assert stop(tiny_config(), workdir, 1) == ("stopped after iteration 1 of 4; the same command goes on from there")
    assert [row["iteration"] for row in rows(workdir) if row["kind"] == "train"] == [1]

    with monkeypatch.context() as patch:
        fail_in_iteration(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        before = signal.getsignal(signal.SIGINT)
        assert stop(tiny_config(), workdir, None).startswith("stopped after iteration 2 of 4")
        assert signal.getsignal(signal.SIGINT) is before
    assert "SIGINT: stopping after the iteration" in capfd.readouterr().err
    assert not (workdir / "report").exists()

    with monkeypatch.context() as patch:
        fail_in_iteration(patch, 4, killed)
        with pytest.raises(Killed):
            train(tiny_config(), workdir)
    assert [row["iteration"] for row in rows(workdir) if row["kind"] == "train"] == [1, 2, 3]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iter')  # torn by the kill

    assert train(tiny_config(), workdir)["num_updates"] == NUM_ITERATIONS * UPDATES
    assert "from iteration 2" in capfd.readouterr().out
    assert_same_run(workdir, finished_run[0], tiny_config(), tiny_model, mesh)
    events = [(row["event"], row["iteration"]) for row in rows(workdir, "events")]
    assert events == [("start", 0), ("resume", 1), ("resume", 2), ("resume", 2)]


@pytest.mark.slow
def test_a_run_with_a_reference_goes_on_with_the_same_one(tiny_config, tiny_model, mesh, tmp_path):
    """The KL is measured against the base model, not against what was being trained when the run stopped."""
    config = tiny_config(
        objective={"kl": {"coef": 0.5}, "loss": {"reduction": "sequence_mean"}}, trainer={"trackers": ("tensorboard",)}
    )
    train(config, tmp_path / "whole")
    stop(config, tmp_path / "parts", 3)
    train(config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", config, tiny_model, mesh)
    kl = [row["kl/mean"] for row in rows(tmp_path / "whole") if row["kind"] == "train"]
    assert kl[-1] > kl[0] > 0
    assert list((tmp_path / "whole" / "tensorboard").iterdir())


def test_a_finished_run_shows_its_result_and_changes_nothing(finished_run, tiny_config, capsys):
    workdir, summary, _ = finished_run
    before = snapshot(workdir)
    assert train(tiny_config(), workdir) == summary
    assert snapshot(workdir) == before
    out = capsys.readouterr().out
    assert "finished run" in out
    assert f"{summary['final_pass_at_1']:.3f}" in out


def test_a_directory_of_another_run_is_refused(finished_run, tiny_config):
    before = snapshot(finished_run[0])
    other = tiny_config(seed=1, optimizer={"learning_rate": 0.5})
    with pytest.raises(UsageError, match=r"optimizer\.learning_rate: 0\.001 there, 0\.5 here; seed: 0 there, 1 here"):
        train(other, finished_run[0])
    assert snapshot(finished_run[0]) == before


def test_rows_that_a_checkpoint_counts_on_must_be_there(finished_run, tiny_config, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"metrics\.jsonl has 3 bytes, but the checkpoint was written at"):
        train(tiny_config(), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


# ---- refusals and alarms ----


def test_a_noisy_set_up_is_refused_before_training(tiny_config, tmp_path, monkeypatch):
    """Scores that are off by 1e-3: the ratio's second moment is 1e-6."""
    measure = noise_floor.measure
    monkeypatch.setattr(noise_floor, "measure", lambda logp, rollout: measure(logp + 1e-3, rollout))
    config = tiny_config(trainer={"max_noise_floor": 1e-7})
    with pytest.raises(UsageError, match="the constraint would act on numerical noise"):
        train(config, tmp_path / "run")
    assert rows(tmp_path / "run") == []
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_noise_floor_that_rises_later_ends_no_run(tiny_config, tmp_path, monkeypatch):
    """A run that is continued is measured again, on the weights that it has now: said and written, not refused."""
    stop(tiny_config(), tmp_path / "run", 1)
    said = []
    monkeypatch.setattr(noise_floor, "measure", lambda *_: (float("nan"), 1.0))
    stop(tiny_config(), tmp_path / "run", 2, say=said.append)
    assert any("the noise floor has risen" in line for line in said)
    events = [event for event in rows(tmp_path / "run", "events") if event["event"] == "noise_floor"]
    assert [(event["iteration"], event["floor"]) for event in events] == [(1, "nan")]


def spoil_iteration(monkeypatch, config, number):
    """NaN at the first response token of one row of the last minibatch of an iteration (counted from 1)."""
    fill, settings = credit.fill_advantages, settings_of(config)

    def spoiling(rollout, *args):
        rollout = fill(rollout, *args)
        iteration = int(rollout.version[0]) // settings.num_updates
        if iteration + 1 == number:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), iteration), 1)
            last = update.take_minibatch(rollout, key, settings.num_updates - 1, settings)
            row = int(last.rollout_id[0]) - int(rollout.rollout_id[0])
            logp = rollout.behavior_logp.copy()
            logp[row, 0] = np.nan
            rollout = rollout.replace(behavior_logp=logp)
        return rollout

    monkeypatch.setattr(credit, "fill_advantages", spoiling)


ONE_EPOCH = {"num_epochs": 1, "num_iterations": 3, "test_samples": 16}


def test_a_non_finite_update_stops_the_run_and_saves_its_batch(tiny_config, tiny_model, mesh, tmp_path, monkeypatch):
    config, workdir = tiny_config(trainer=ONE_EPOCH | {"checkpoint_every": 1}), tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil_iteration(patch, config, 2)
        with pytest.raises(NonFiniteUpdateError, match=r"update 1 of iteration 1 .*nonfinite_1_1\.npz"):
            train(config, workdir)
    saved = np.load(workdir / "nonfinite_1_1.npz")
    assert saved["tokens"].shape == (ROWS // 2, 20)
    mask = np.arange(14) < saved["response_length"][:, None]
    assert np.isnan(saved["behavior_logp"][mask]).sum() == 1
    assert rows(workdir, "events")[-1] == {
        "event": "nonfinite", "iteration": 1, "update": 1, "file": "nonfinite_1_1.npz"
    }  # fmt: skip
    # The last checkpoint is that of the iteration before, and the run can go on from it.
    state, progress = final_state(workdir, config, tiny_model, mesh)
    assert progress["rollouts"] == ROWS
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    assert train(config, workdir)["num_rollouts"] == 3 * ROWS


def test_a_run_may_survive_a_non_finite_update(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(trainer=ONE_EPOCH | {"max_nonfinite_updates": 1})
    spoil_iteration(monkeypatch, config, 2)
    summary = train(config, tmp_path / "run")
    assert (tmp_path / "run" / "nonfinite_1_1.npz").exists()
    train_rows = [row for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row["optimizer/nonfinite_updates"] for row in train_rows] == [0, 1, 0]
    assert all(math.isfinite(row["dual/variance_coef"]) for row in train_rows)
    assert math.isfinite(summary["final_variance_coef"])
    assert summary["num_updates"] == 6


def test_profiling_stops_what_it_started_and_nothing_else(tiny_config, tmp_path, monkeypatch):
    """Iterations 2 and 3 are asked for, and the run is stopped between them."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    config = tiny_config()
    stop(config, tmp_path / "run", 1, profile_steps=(2, 3))
    assert calls == []
    stop(config, tmp_path / "run", 2, profile_steps=(2, 3))
    assert calls == ["start", "stop"]
    train(config, tmp_path / "run", profile_steps=(2, 3))
    assert calls == ["start", "stop"] * 2
