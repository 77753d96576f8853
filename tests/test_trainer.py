"""The training loop, through the real train(): what it leaves behind, and that no interruption changes it."""

import json
import math
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from r2vpo_jax import metrics, models, sharding, trainer
from r2vpo_jax.checkpoints import Checkpointer
from r2vpo_jax.collector import train_problem_index
from r2vpo_jax.learner import Learner, NonFiniteUpdateError
from r2vpo_jax.run_directory import UsageError
from r2vpo_jax.tasks.arithmetic import SYMBOLS
from r2vpo_jax.trainer import train
from tests.conftest import ROOT

NUM_ITERATIONS, ROWS, UPDATES = 4, 16, 4  # of the tiny run


def rows(workdir, file="metrics"):
    """All rows without the fields that measure the machine."""
    return [
        {k: v for k, v in row.items() if not k.startswith(metrics.TIME_PREFIXES)}
        for row in metrics.read_jsonl(workdir / f"{file}.jsonl")
    ]


def snapshot(directory):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def final_state(workdir, config, tiny_model, mesh):
    """What the last checkpoint holds, on the host, and the progress saved with it."""
    learner = Learner(tiny_model[0], config, mesh)
    checkpointer = Checkpointer(workdir / "checkpoints", max_to_keep=2)
    state, progress = checkpointer.restore(checkpointer.latest(), learner.abstract_state, learner.state_shardings)
    checkpointer.close()
    return sharding.to_host(state), progress


class Watched:
    """Counts compilations by iteration while it is entered, and keeps the noise floors that were measured."""

    def __init__(self):
        self.by_iteration, self.floors, self.learner = [], [], None

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        iterate, count = trainer._Run._iterate, [0]
        measure = trainer.noise_floor.measure

        def listener(event, _, **__):
            count[0] += event == "/jax/core/compile/backend_compile_duration"

        def counted(run):
            before, self.learner = count[0], run.learner
            row = iterate(run)
            self.by_iteration.append(count[0] - before)
            return row

        def measured(*args):
            self.floors.append(measure(*args)[0])
            return measure(*args)

        jax.monitoring.register_event_duration_secs_listener(listener)
        self._patch.setattr(trainer._Run, "_iterate", counted)
        self._patch.setattr(trainer.noise_floor, "measure", measured)
        self._patch.setattr(trainer, "Learner", Learner)  # one that has compiled nothing yet
        return self

    def __exit__(self, *_):
        self._patch.undo()


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """(workdir, summary, Watched) of a run from start to end."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with Watched() as watched:
        summary = train(tiny_config(), workdir)
    return workdir, summary, watched


# ---- what a run leaves behind ----


def test_the_summary_has_what_comparisons_need(finished, tiny_config):
    workdir, summary, watched = finished
    assert json.loads((workdir / "report" / "summary.json").read_text()) == summary
    expected = {
        "objective": "r2vpo",
        "seed": 0,
        "num_eval_problems": 16,
        "num_rollouts": NUM_ITERATIONS * ROWS,
        "num_updates": NUM_ITERATIONS * UPDATES,
        "variance_budget": tiny_config().objective.variance_budget,
    }
    assert expected.items() <= summary.items()
    scores = ["base_pass_at_1", "final_pass_at_1", "best_pass_at_1", "final_validation_pass_at_1"]
    scores += ["base_pass_at_16", "final_pass_at_16"]
    assert all(0 <= summary[name] <= 1 for name in scores)
    for which in ("base", "final"):
        low, high = summary[f"{which}_pass_at_1_interval"]
        assert low <= summary[f"{which}_pass_at_1"] <= high
    for name in ("train_seconds", "rollout_tokens_per_second", "update_tokens_per_second", "final_variance_coef"):
        assert summary[name] > 0
    assert [summary["noise_floor_ratio_second_moment"]] == watched.floors
    assert watched.floors[0] < 1e-6  # 0 where sampling and scoring round alike
    assert summary["second_half_ratio_second_moment"] > 1e-5
    train_rows = [row for row in rows(workdir) if row["kind"] == "train"]
    mean = np.mean([row["ratio/second_moment"] for row in train_rows[2:]])
    np.testing.assert_allclose(summary["second_half_ratio_second_moment"], mean)
    assert summary["final_variance_coef"] == train_rows[-1]["dual/variance_coef"]
    assert summary["num_rollout_tokens"] == train_rows[-1]["rollout_tokens"]
    assert summary["best_pass_at_1"] >= summary["final_validation_pass_at_1"]


def test_the_directory_holds_nothing_else(finished):
    names = {path.name for path in finished[0].iterdir()}
    assert names == {"config.json", "metrics.jsonl", "events.jsonl", "samples.jsonl", "checkpoints", "report", "hf"}
    assert [row["event"] for row in rows(finished[0], "events")] == ["start"]


def test_rows_come_one_an_iteration_and_one_an_evaluation(finished):
    order = [(row["kind"], row["iteration"], row.get("split")) for row in rows(finished[0])]
    assert order == [
        ("evaluation", 0, "test"),
        ("evaluation", 0, "validation"),
        ("train", 1, None),
        ("train", 2, None),
        ("evaluation", 2, "validation"),
        ("train", 3, None),
        ("train", 4, None),
        ("evaluation", 4, "validation"),
        ("evaluation", 4, "test"),
    ]


def test_metrics_have_fixed_names_and_are_numbers(finished):
    train_rows = [row for row in metrics.read_jsonl(finished[0] / "metrics.jsonl") if row["kind"] == "train"]
    assert len({tuple(row) for row in train_rows}) == 1
    for row in train_rows:
        for name, value in row.items():
            # Where a clip would cut nothing, there is no share of it to retain.
            assert name == "kind" or isinstance(value, (int, float)) or (name.startswith("keeps/re") and value == "nan")
            assert value in ("train", "nan") or math.isfinite(value), (name, value)
    assert [row["version"] for row in train_rows] == [UPDATES * i for i in range(1, NUM_ITERATIONS + 1)]
    assert [row["rollouts"] for row in train_rows] == [ROWS * i for i in range(1, NUM_ITERATIONS + 1)]
    # The first minibatch of each iteration is on-policy, up to the noise floor; the last is not.
    assert all(row["ratio/second_moment_first"] < 1e-6 < row["ratio/second_moment"] for row in train_rows)
    assert len({row["dual/variance_coef"] for row in train_rows}) == NUM_ITERATIONS, "the multiplier moves"
    for row in train_rows:
        assert row["dual/constraint_violation"] == row["ratio/second_moment"] - 0.01


def test_samples_are_readable(finished, task):
    written = rows(finished[0], "samples")
    assert [row["iteration"] for row in written] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [row["version"] for row in written] == [0, 0, 4, 4, 8, 8, 12, 12]
    for half in (written[::2], written[1::2]):
        problems = task.problems("train", np.array([row["problem"] for row in half]))
        prompts = [task.decode(tokens[-n:]) for tokens, n in zip(problems.tokens, problems.length, strict=True)]
        assert [row["prompt"] for row in half] == prompts
    for row in written:
        assert set(row["response"].removesuffix("<eos>")) <= set("0123456789+=c-;<pad>")
        assert row["reward"] == (row["outcome"] == "right")


def test_the_exported_directory_opens(finished, tiny_config, tiny_model, mesh):
    path = finished[0] / "hf"
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert len(tokenizer) == len(SYMBOLS)
    assert tokenizer("12+3=", add_special_tokens=False)["input_ids"] == [3, 4, 12, 5, 13]
    model, params = models.from_pretrained(path, num_tokens=len(tokenizer))
    assert model.config == tiny_model[0].config
    state, _ = final_state(finished[0], tiny_config(), tiny_model, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert np.any(params["embed"] != tiny_model[1]["embed"]), "nothing was learned"


def test_nothing_compiles_after_the_first_iteration(finished):
    """Prompts and responses are ragged, the shapes are not."""
    workdir, _, watched = finished
    lengths = {row["response/length"] for row in rows(workdir) if row["kind"] == "train"}
    assert len(lengths) > 1
    assert watched.by_iteration[0] > 0, "the count does not count"
    assert watched.by_iteration[1:] == [0] * (NUM_ITERATIONS - 1)
    learner = watched.learner
    for function in (
        learner.update,
        learner._minibatch,
        learner._step_multipliers,
        learner._score,
        learner._sampler_params,
    ):
        assert function._cache_size() == 1


# ---- interruptions ----


def fail_in_iteration(monkeypatch, number, error):
    """Raise in the middle of an iteration (counted from 1), after its updates."""
    learn = trainer._Run._learn

    def failing(run, *args):
        result = learn(run, *args)
        if run.iteration + 1 == number:
            error()
        return result

    monkeypatch.setattr(trainer._Run, "_learn", failing)


class Killed(Exception):
    pass


def killed():
    raise Killed


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


def test_a_run_that_is_interrupted_ends_like_one_that_is_not(
    finished, tiny_config, tiny_model, mesh, tmp_path, monkeypatch, capfd
):
    """Stopped after 1, Ctrl-C in 2, killed in 4 (the last checkpoint is 2, row 3 is written), then to the end."""
    workdir = tmp_path / "run"
    assert train(tiny_config(), workdir, stop_after_iteration=1) is None
    assert [row["iteration"] for row in rows(workdir) if row["kind"] == "train"] == [1]

    with monkeypatch.context() as patch:
        fail_in_iteration(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        before = signal.getsignal(signal.SIGINT)
        assert train(tiny_config(), workdir) is None
        assert signal.getsignal(signal.SIGINT) is before
    captured = capfd.readouterr()
    assert "SIGINT: stopping after the iteration" in captured.err
    assert "stopped after iteration 2 of 4" in captured.out
    assert not (workdir / "report").exists()

    with monkeypatch.context() as patch:
        fail_in_iteration(patch, 4, killed)
        with pytest.raises(Killed):
            train(tiny_config(), workdir)
    assert [row["iteration"] for row in rows(workdir) if row["kind"] == "train"] == [1, 2, 3]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iter')  # torn by the kill

    assert train(tiny_config(), workdir) is not None
    assert "from iteration 2" in capfd.readouterr().out
    assert_same_run(workdir, finished[0], tiny_config(), tiny_model, mesh)
    events = [(row["event"], row["iteration"]) for row in rows(workdir, "events")]
    assert events == [("start", 0), ("resume", 1), ("resume", 2), ("resume", 2)]


@pytest.mark.slow
def test_a_run_with_a_reference_goes_on_with_the_same_one(tiny_config, tiny_model, mesh, tmp_path):
    """The KL is measured against the base model, not against what was being trained when the run stopped."""
    config = tiny_config(objective={"kl_coef": 0.5, "reduction": "sequence_mean"}, trainer={"tensorboard": True})
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop_after_iteration=3)
    train(config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", config, tiny_model, mesh)
    kl = [row["kl/mean"] for row in rows(tmp_path / "whole") if row["kind"] == "train"]
    assert kl[-1] > kl[0] > 0
    assert list((tmp_path / "whole" / "tensorboard").iterdir())


def test_a_finished_run_shows_its_result_and_changes_nothing(finished, tiny_config, capsys):
    workdir, summary, _ = finished
    before = snapshot(workdir)
    assert train(tiny_config(), workdir) == summary
    assert snapshot(workdir) == before
    out = capsys.readouterr().out
    assert "finished run" in out
    assert f"{summary['final_pass_at_1']:.3f}" in out


def test_a_directory_of_another_run_is_refused(finished, tiny_config):
    before = snapshot(finished[0])
    other = tiny_config(seed=1, optimizer={"learning_rate": 0.5})
    with pytest.raises(UsageError, match=r"optimizer\.learning_rate: 0\.001 there, 0\.5 here; seed: 0 there, 1 here"):
        train(other, finished[0])
    assert snapshot(finished[0]) == before


def test_rows_that_a_checkpoint_counts_on_must_be_there(finished, tiny_config, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"metrics\.jsonl has 3 bytes, but the checkpoint was written at"):
        train(tiny_config(), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


# ---- refusals and alarms ----


def test_a_noisy_set_up_is_refused_before_training(tiny_config, tmp_path, monkeypatch):
    """Scores that are off by 1e-3: the ratio's second moment is 1e-6."""
    measure = trainer.noise_floor.measure
    monkeypatch.setattr(trainer.noise_floor, "measure", lambda logp, rollout: measure(logp + 1e-3, rollout))
    config = tiny_config(trainer={"max_noise_floor": 1e-7})
    with pytest.raises(UsageError, match="the constraint would act on numerical noise"):
        train(config, tmp_path / "run")
    assert rows(tmp_path / "run") == []
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_noise_floor_that_rises_later_ends_no_run(tiny_config, tmp_path, monkeypatch):
    """A run that is continued is measured again, on the weights that it has now: said and written, not refused."""
    assert train(tiny_config(), tmp_path / "run", stop_after_iteration=1) is None
    said = []
    monkeypatch.setattr(trainer.noise_floor, "measure", lambda *_: (float("nan"), 1.0))
    assert train(tiny_config(), tmp_path / "run", stop_after_iteration=2, say=said.append) is None
    assert any("the noise floor has risen" in line for line in said)
    events = [event for event in rows(tmp_path / "run", "events") if event["event"] == "noise_floor"]
    assert [(event["iteration"], event["floor"]) for event in events] == [(1, "nan")]


def spoil_iteration(monkeypatch, number):
    """NaN at the first response token of one row of the last minibatch of an iteration (counted from 1)."""
    fill = trainer._Run._fill_advantages

    def spoiling(run, rollout):
        rollout = fill(run, rollout)
        if run.iteration + 1 == number:
            key = jax.random.fold_in(jax.random.fold_in(run.key, run.iteration), 1)
            batch = sharding.put_batch(rollout, run.mesh)
            last = run.learner.minibatch(batch, key, run.learner.num_updates - 1)
            row = int(last.rollout_id[0]) - int(rollout.rollout_id[0])
            logp = rollout.behavior_logp.copy()
            logp[row, 0] = np.nan
            rollout = rollout.replace(behavior_logp=logp)
        return rollout

    monkeypatch.setattr(trainer._Run, "_fill_advantages", spoiling)


ONE_EPOCH = {"num_epochs": 1, "num_iterations": 3, "test_samples": 16}


def test_a_non_finite_update_stops_the_run_and_saves_its_batch(tiny_config, tiny_model, mesh, tmp_path, monkeypatch):
    config, workdir = tiny_config(trainer=ONE_EPOCH | {"checkpoint_every": 1}), tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil_iteration(patch, 2)
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
    spoil_iteration(monkeypatch, 2)
    summary = train(tiny_config(trainer=ONE_EPOCH | {"max_nonfinite_updates": 1}), tmp_path / "run")
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
    train(config, tmp_path / "run", stop_after_iteration=1, profile_steps=(2, 3))
    assert calls == []
    train(config, tmp_path / "run", stop_after_iteration=2, profile_steps=(2, 3))
    assert calls == ["start", "stop"]
    train(config, tmp_path / "run", profile_steps=(2, 3))
    assert calls == ["start", "stop"] * 2


# ---- the order of the problems ----


def test_problems_are_a_function_of_seed_and_position(tiny_config):
    config = tiny_config()
    seen = np.concatenate([train_problem_index(config, i) for i in range(0, 20, 4)])
    np.testing.assert_array_equal(seen, np.arange(20))
    others = [train_problem_index(tiny_config(seed=seed), 4 * i) for seed in (1, 2, 1023) for i in (0, 1, 10**6)]
    assert len(np.unique(np.concatenate([seen, *others]))) == 20 + 9 * 4
    assert max(o.max() for o in others) < 2**30, "indices fit into int32"


def test_every_metric_is_documented(finished):
    """docs/metrics.md abbreviates: `ratio/x_positive`, `_negative` and `time/rollout`, `verify`."""
    words = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    suffixes = tuple(w for w in words if w.startswith("_"))
    prefixes = {w.partition("/")[0] for w in words if "/" in w}
    names = {name for row in metrics.read_jsonl(finished[0] / "metrics.jsonl") for name in row} - {"kind"}
    undocumented = [
        name
        for name in sorted(names - words)
        if not name.endswith(suffixes) and not (name.partition("/")[0] in prefixes and name.partition("/")[2] in words)
    ]
    assert not undocumented
