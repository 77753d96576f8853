"""Runs side by side: one program for all of them, none depends on another, and what stopped goes on.

Batches of three runs of one structure, wherever it does not matter how many there are: their program is compiled once.
"""

import contextlib
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest

from r2vpo_jax.errors import Stopped
from r2vpo_jax.run import checkpoints
from r2vpo_jax.sweeps import batch, fused, group, sharing, workers
from r2vpo_jax.sweeps.group import Group
from tests.helpers.compilations import compilations
from tests.helpers.fused import STEADY, SharedGroup, assert_same, parted, side_by_side
from tests.helpers.runs import snapshot
from tests.helpers.trees import merged

SIZE = 3
BOUNDARIES = (2, 4, 5)  # of chunks
SPLITS = {"train": "word_problems", "validation": "word_problems", "test": "word_problems"}
CLOCK = {"train_seconds"}


@pytest.fixture(scope="module")
def make(tiny_config):
    """The Config of a run of five iterations in three chunks, the last of one."""

    def config(**sections):
        trainer = {"num_iterations": 5, "eval_every": 2, "eval_samples": 4, "test_samples": 8}
        trainer |= {"max_nonfinite_updates": 5} | sections.pop("trainer", {})
        return tiny_config(trainer=trainer, **merged(STEADY, sections))

    return config


@pytest.fixture(scope="module")
def configs(make):
    """Three runs that differ in their numbers."""
    return {
        "plain": make(),
        "other": make(
            seed=1,
            objective={"dual": {"budget": 0.02, "step": 0.3}},
            optimizer={"learning_rate": 2e-3},
            sampler={"temperature": 0.9},
        ),
        "third": make(seed=2, objective={"dual": {"coef": 2.0}}),
    }


@pytest.fixture(scope="module")
def whole(configs, tmp_path_factory):
    """(directory, runs) of a batch from start to end."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, side_by_side(configs, workdir)


def left(workdir, name):
    """What a run has left, without what the clock has written."""
    folder = workdir / "runs" / name
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if (folder / "report").exists():
        summary = json.loads(contents["report/summary.json"])
        contents["report/summary.json"] = {key: value for key, value in summary.items() if key not in CLOCK}
    return contents


# ---- what they leave ----


def test_each_leaves_what_comparisons_need_and_nothing_else(whole, configs):
    workdir, runs = whole
    assert [path.name for path in workdir.iterdir()] == ["runs"], "nothing of the states in between"
    for name, run in runs.items():
        assert left(workdir, name).keys() == {"config.json", "metrics.jsonl", "report/summary.json"}
        assert run.summary["seed"] == configs[name].seed
        assert [(row["kind"], row["iteration"], row.get("split")) for row in run.rows] == [
            ("evaluation", 0, "test"),
            ("evaluation", 0, "validation"),
            ("train", 1, None),
            ("train", 2, None),
            ("evaluation", 2, "validation"),
            ("train", 3, None),
            ("train", 4, None),
            ("evaluation", 4, "validation"),
            ("train", 5, None),
            ("evaluation", 5, "validation"),
            ("evaluation", 5, "test"),
        ]
        assert run.rows[0] == runs["plain"].rows[0], "the base model's score is that of all"


# ---- no run depends on another ----


def test_curves_do_not_depend_on_the_order(whole, configs, tmp_path):
    """In the same program to the last bit."""
    side_by_side(dict(reversed(configs.items())), tmp_path)
    for name in configs:
        assert left(tmp_path, name) == left(whole[0], name)


def test_curves_do_not_depend_on_how_many_there_are(whole, configs, tmp_path):
    """To rounding: a program for another number of runs may add in another order."""
    (alone,) = side_by_side({"other": configs["other"]}, tmp_path).values()
    assert_same(alone, whole[1]["other"])


def test_runs_differ(whole):
    _, runs = whole
    assert parted(runs["plain"], runs["other"]).startswith("iteration 1, response 0, position ")
    assert parted(runs["plain"], runs["third"]) is not None


def test_a_run_that_collapses_is_a_result_and_harms_no_other(whole, configs, make, tmp_path):
    lost = make(seed=2, optimizer={"learning_rate": 1e10})  # of four updates an iteration the first has a rate of 0
    runs = side_by_side(configs | {"third": lost}, tmp_path)
    for name in ("plain", "other"):
        assert left(tmp_path, name) == left(whole[0], name)
    assert left(tmp_path, "third").keys() == {"config.json", "metrics.jsonl", "failed.json"}
    assert runs["third"].failure == {
        "error": "an update of iteration 2 had a non-finite loss or gradient and was not applied, more often in a row than "
        "trainer.max_nonfinite_updates allows",
        "collapsed": True,
    }
    assert [row["iteration"] for row in runs["third"].rows] == [0, 0, 1], "of what comes after nothing is kept"
    assert runs["third"].trained[0]["optimizer/nonfinite_updates"] in (2, 3)


# ---- one program ----


def test_nothing_compiles_once_the_programs_are_there(configs, make, tmp_path):
    """Other seeds, other numbers, other chunks, another batch, validation and test."""
    side_by_side(configs, tmp_path / "first")  # small programs that checkpoints need compile in here
    others = {f"{name}_2": make(seed=10 + i, objective={"dual": {"coef": 2.0 + i}}) for i, name in enumerate(configs)}
    made = Group.__init__

    def counted(self, *args):
        made(self, *args)
        counts.append(len(seen))

    with compilations() as seen, pytest.MonkeyPatch.context() as patch:
        jax.jit(lambda x: x + len(configs))(np.zeros(7))
        assert len(seen) == 1, "the count counts"
        counts = []
        patch.setattr(Group, "__init__", counted)
        side_by_side(configs | others, tmp_path / "second", runs_at_once=SIZE)
        assert counts == [len(seen)]


# ---- batches ----


@pytest.fixture
def advanced(monkeypatch):
    """(names, iterations done) after each chunk that is trained."""
    seen, write = [], batch.Batch._write_iterations

    def writing(self, measured, done, count):
        seen.append((" ".join(self._names), done + count))
        write(self, measured, done, count)

    monkeypatch.setattr(batch.Batch, "_write_iterations", writing)
    return seen


def test_a_grid_that_does_not_divide_is_filled_up_and_cut(whole, configs, make, tmp_path, advanced):
    runs = side_by_side(configs | {"fourth": make(seed=3)}, tmp_path, runs_at_once=SIZE)
    assert advanced == [(names, now) for names in ("plain other third", "fourth") for now in BOUNDARIES]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(runs)
    assert runs["fourth"].summary["seed"] == 3
    for name in configs:
        assert left(tmp_path, name) == left(whole[0], name)


@pytest.mark.parametrize(
    ("number", "devices", "there", "tried"),
    [
        (7, 1, None, [7]),
        (7, 1, 700, [7]),
        (7, 1, 699, [7, 4]),  # two batches of at most 6
        (7, 1, 250, [7, 2]),
        (7, 1, 50, [7, 1]),  # not even one fits: it is tried all the same
        (100, 1, 3000, [100, 25]),  # four batches of at most 30
        (7, 2, 400, [8]),  # four on each
        (3, 2, 150, [4, 2]),  # one and a half would fit on each
        (9, 4, 210, [12, 8]),
    ],
)
def test_batches_are_as_large_as_memory_allows_and_equal(number, devices, there, tried, monkeypatch):
    """Where n runs on a device need 100 n bytes."""
    sizes = []
    monkeypatch.setattr(Group, "_compile_for", lambda _, size: sizes.append(size))
    monkeypatch.setattr(Group, "_memory_needed", lambda _: 100 * sizes[-1] // devices)
    monkeypatch.setattr(group, "_device_memory", lambda: there)
    made = object.__new__(Group)
    made.family, made._devices = types.SimpleNamespace(configs=range(number)), types.SimpleNamespace(size=devices)
    assert made._compile(None) == 100 * tried[-1] // devices
    assert sizes == tried
    assert made.size == tried[-1]
    sizes.clear()
    made._compile(devices)
    assert sizes == [devices]


@pytest.mark.slow
def test_runs_that_do_not_fit_into_memory_are_cut_into_batches(whole, configs, make, tmp_path, monkeypatch, advanced):
    """By what the compiler says that the programs need."""
    with contextlib.closing(SharedGroup(sharing.Family(configs), None, lambda _: None)) as three:
        needed = three._memory_needed()
    monkeypatch.setattr(group, "_device_memory", lambda: int(1.2 * needed))
    more = {f"more {seed}": make(seed=seed) for seed in (3, 4, 5)}
    side_by_side(configs | more, tmp_path)
    assert [names for names, now in advanced if now == 2] == ["plain other third", "more 3 more 4 more 5"]
    for name in configs:
        assert left(tmp_path, name) == left(whole[0], name)


# ---- stopping and going on ----


def stopped(configs, workdir, **settings):
    with pytest.raises(Stopped) as error:
        side_by_side(configs, workdir, stop_after=1, **settings)
    return str(error.value)


def test_what_was_stopped_goes_on_to_the_same_files(whole, configs, tmp_path, advanced):
    assert stopped(configs, tmp_path) == (
        "stopped after iteration 2 of 5 of 3 runs; the same command goes on from there"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]
    assert "after iteration 4 of 5" in stopped(configs, tmp_path)
    side_by_side(configs, tmp_path)
    assert [now for _, now in advanced] == list(BOUNDARIES), "nothing is computed twice"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    for name in configs:
        assert left(tmp_path, name) == left(whole[0], name)


def test_what_has_ended_is_not_repeated(whole, configs, make, tmp_path, advanced, monkeypatch):
    more = configs | {"fourth": make(seed=3)}
    side_by_side(configs, tmp_path)
    before = snapshot(tmp_path / "runs")
    advanced.clear()
    stopped(more, tmp_path, runs_at_once=SIZE)
    side_by_side(more, tmp_path, runs_at_once=SIZE)
    assert advanced == [("fourth", now) for now in BOUNDARIES]
    after = snapshot(tmp_path / "runs")
    assert before.items() < after.items()
    monkeypatch.setattr(SharedGroup, "__init__", None)  # nothing is left to do
    side_by_side(more, tmp_path, runs_at_once=SIZE)
    assert snapshot(tmp_path / "runs") == after
    assert not (tmp_path / "fused").exists()


def test_what_is_tried_again_is_made_alone_and_the_same(whole, configs, tmp_path, advanced):
    """The runs beside it stay as they are, and are not made anew; stopped in between it goes on."""
    side_by_side(configs, tmp_path)
    before = snapshot(tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "other" / "report")
    workers.write_failure(tmp_path / "runs" / "other", "made up", collapsed=False)
    assert workers.forget_failure(tmp_path / "runs" / "other") == "made up"
    advanced.clear()
    stopped(configs, tmp_path)
    side_by_side(configs, tmp_path)
    assert advanced == [("other", now) for now in BOUNDARIES]
    after = snapshot(tmp_path / "runs")
    assert {path for path in after if after[path] != before.get(path)} <= set((tmp_path / "runs" / "other").rglob("*"))
    for name in configs:
        assert left(tmp_path, name) == left(whole[0], name)


def test_a_torn_checkpoint_is_not_gone_on_from(whole, configs, tmp_path, advanced):
    """The one before is; and if there is none, the beginning."""
    stopped(configs, tmp_path)
    (scratch,) = (tmp_path / "fused").iterdir()
    shutil.copytree(scratch / "checkpoints", tmp_path / "kept")
    stopped(configs, tmp_path)
    # As after a kill while the last one was written: the one before is there still.
    shutil.copytree(tmp_path / "kept", scratch / "checkpoints", dirs_exist_ok=True)
    checkpoints.manifest(scratch / "checkpoints", 4).unlink()
    advanced.clear()
    stopped(configs, tmp_path)
    assert [now for _, now in advanced] == [4]
    checkpoints.manifest(scratch / "checkpoints", 4).write_text("{")
    side_by_side(configs, tmp_path)
    assert [now for _, now in advanced] == [4, *BOUNDARIES]
    for name in configs:
        assert left(tmp_path, name) == left(whole[0], name)


def test_a_kill_while_results_are_written_is_made_good(whole, configs, tmp_path, monkeypatch, advanced):
    write, written = batch.Batch._write_run, []

    def killed(self, name, *args):
        if written:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(batch.Batch, "_write_run", killed)
        with pytest.raises(KeyboardInterrupt):
            side_by_side(configs, tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["plain"]
    side_by_side(configs, tmp_path)
    assert [now for _, now in advanced] == list(BOUNDARIES)
    for name in configs:
        assert left(tmp_path, name) == left(whole[0], name)


# ---- what cannot be done ----


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"task": {"name": "text", "text": SPLITS}}, "problems and verdicts of task text are not JAX"),
        ({"objective": {"name": "dapo"}}, "objective.groups.zero_variance=resample samples until the host says"),
        ({"alarms": {"stop": True}}, "alarms.stop is the host's, which sees a run only between chunks"),
        ({"trainer": {"trackers": ("tensorboard",)}}, "trainer.trackers is the host's"),
        ({"replay": {"lag": 1, "capacity_bytes": 10**9}}, "replay.capacity_bytes limits replay on the host only"),
        ({"mesh": {"fsdp": 2}}, "mesh.fsdp and mesh.tensor split a model"),
        ({"mesh": {"tensor": 2}}, "mesh.fsdp and mesh.tensor split a model"),
        ({"sampler": {"engine": "endpoint"}}, "sampler.engine=endpoint samples elsewhere"),
        ({"seed": 2**31}, "seed=2147483648: "),
        ({"model": {"lora": {"rank": 2}}}, "model.lora has frozen weights, which each run would hold a copy of"),
    ],
)
def test_what_only_a_host_can_do_is_refused(make, sections, reason):
    assert re.match(reason, fused.refusal(make(**sections)))


def test_what_can_be_done_is_not_refused(make):
    assert fused.refusal(make(objective={"name": "ppo"}, replay={"capacity": 3, "draw": "priority"})) is None


@pytest.mark.slow
def test_a_replay_buffer_that_runs_dry_is_a_failure_and_no_collapse(make, tmp_path):
    """Every group may be used once, and two batches an iteration use them twice."""
    replay = {"capacity": 2, "batches_per_iteration": 2, "max_uses": 1}
    (run,) = side_by_side({"dry": make(replay=replay)}, tmp_path).values()
    assert run.failure == {
        "error": "in iteration 1 too few groups were within replay.max_age and replay.max_uses; raise them, or "
        "replay.capacity",
        "collapsed": False,
    }
    assert run.trained == []
    assert run.summary is None
