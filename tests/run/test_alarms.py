"""Alarms: every sign, how long it must last, that it is said once, and that a run may end on it."""

import dataclasses
import math

import pytest

from r2vpo_jax.config import AlarmConfig
from r2vpo_jax.run.alarms import Alarms
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.training.trainer import train
from tests.helpers.runs import rows, stop

LIMITS = {
    "min_entropy": 0.5,
    "min_effective_sample_size": 0.25,
    "max_ratio_variance": 2.0,
    "max_truncated": 0.75,
    "max_zero_variance_groups": 0.875,
    "min_judged": 0.5,
}
HEALTHY = {
    "reward/kept": 1.0,
    "policy/entropy": 0.6,
    "ratio/effective_sample_size": 0.9,
    "ratio/variance": 0.1,
    "response/truncated": 0.0,
    "reward/zero_variance_groups": 0.3,
    "outcome/judged": 1.0,
}
# Name, metric, its limit, which is healthy itself, and the first value that is not.
SIGNS = [
    ("entropy", "policy/entropy", 0.5, math.nextafter(0.5, 0)),
    ("effective_sample_size", "ratio/effective_sample_size", 0.25, math.nextafter(0.25, 0)),
    ("ratio_variance", "ratio/variance", 2.0, math.nextafter(2.0, 3)),
    ("truncation", "response/truncated", 0.75, math.nextafter(0.75, 1)),
    ("zero_variance", "reward/zero_variance_groups", 0.875, math.nextafter(0.875, 1)),
    ("verdicts", "outcome/judged", 0.5, math.nextafter(0.5, 0)),
]


def make(patience=1, **changes):
    return Alarms(AlarmConfig(patience=patience, **LIMITS | changes))


def names(raised):
    return [name for name, _ in raised]


def test_there_are_no_other_signs():
    assert list(make().state) == [name for name, *_ in SIGNS]
    limits = {field.name for field in dataclasses.fields(AlarmConfig)} - {"patience", "stop"}
    assert limits == LIMITS.keys()
    assert make().check(HEALTHY) == []


@pytest.mark.parametrize(("name", "metric", "limit", "bad"), SIGNS)
def test_each_sign_beyond_its_limit(name, metric, limit, bad):
    """A metric in a file may be a name instead of a number, and a NaN is no good sign."""
    assert make().check(HEALTHY | {metric: limit}) == []
    for value in (bad, math.nan, "nan"):
        ((raised, line),) = make().check(HEALTHY | {metric: value})
        assert raised == name
        assert line.startswith(f"{metric} = ")
        assert f"for 1 iterations (limit {limit:g}): " in line


def test_the_values_of_an_infinite_metric():
    assert names(make().check(HEALTHY | {"ratio/variance": math.inf})) == ["ratio_variance"]
    assert names(make().check(HEALTHY | {"policy/entropy": -math.inf})) == ["entropy"]


def test_a_sign_is_said_once_when_it_has_lasted():
    watch, bad = make(patience=3), HEALTHY | {"policy/entropy": 0.1}
    assert [names(watch.check(bad)) for _ in range(7)] == [[], [], ["entropy"], [], [], [], []]


def test_a_healthy_iteration_starts_the_count_again():
    watch, bad = make(patience=2), HEALTHY | {"response/truncated": 1.0}
    sequence = [bad, HEALTHY, bad, bad, bad, HEALTHY, bad, bad]
    raised = [names(watch.check(row)) for row in sequence]
    assert [i for i, found in enumerate(raised) if found] == [3, 7]
    assert {name for found in raised for name in found} == {"truncation"}


def test_signs_are_counted_apart():
    """Entropy from the first iteration on, truncation from the second."""
    watch = make(patience=2)
    first = HEALTHY | {"policy/entropy": math.nan}
    both = first | {"response/truncated": 1.0}
    assert [names(watch.check(row)) for row in (first, both, both)] == [[], ["entropy"], ["truncation"]]
    everything = HEALTHY | dict.fromkeys((metric for _, metric, *_ in SIGNS), math.nan)
    assert names(make().check(everything)) == [name for name, *_ in SIGNS]


@pytest.mark.parametrize("stop", range(1, 6))
def test_the_count_survives_a_resume(stop):
    """Interrupted after any iteration, the alarm is still said in the third, and never again."""
    bad = HEALTHY | {"ratio/effective_sample_size": 0.0}
    watch, said = make(patience=3), []
    for iteration in range(1, 7):
        said += [iteration] * len(watch.check(bad))
        if iteration == stop:
            other = make(patience=3)
            other.state = dict(watch.state)
            watch = other
    assert said == [3]


def test_where_nothing_was_judged_only_the_verdicts_are_blamed():
    """All is as bad as can be, for there is nothing to measure: neither entropy nor groups are to blame."""
    nothing = dict.fromkeys(HEALTHY, math.nan) | {"reward/kept": 0.0, "outcome/judged": 0.0, "response/truncated": 0.0}
    watch = make(patience=2)
    assert [names(watch.check(nothing)) for _ in range(3)] == [[], ["verdicts"], []]
    assert watch.is_in_vain(nothing)
    assert not watch.is_in_vain(nothing | {"outcome/judged": 0.1}), "a few verdicts may teach something"
    watch.check(HEALTHY)
    assert not watch.is_in_vain(nothing), "for one iteration"
    # Verdicts, but no group that differs: the groups are blamed, and the entropy of no token is not.
    flat = nothing | {"outcome/judged": 1.0, "reward/zero_variance_groups": 1.0}
    assert names(make().check(flat)) == ["zero_variance"]


def test_patience_must_be_positive():
    with pytest.raises(ValueError, match="alarms.patience must be at least 1, got 0"):
        AlarmConfig(patience=0)


# ---- in a run ----

# An entropy that nothing reaches: the sign is there from the first iteration that trains.
ALARMED = {"min_entropy": 100.0, "patience": 2, "max_zero_variance_groups": 1.0, "max_truncated": 1.0}
QUICK = {
    "num_iterations": 4,
    "checkpoint_every": 9,
    "eval_every": 3,
    "eval_problems": 4,
    "eval_samples": 4,
    "test_problems": 4,
    "test_samples": 4,
}
SMALL = {"batch_size": 64}


def alarms_of(workdir):
    return [(row["alarm"], row["iteration"]) for row in rows(workdir, "events") if row["event"] == "alarm"]


def test_an_alarm_is_said_and_the_run_goes_on(tiny_config, tmp_path):
    """With lag 1 there is nothing to look at in iteration 1: the second bad iteration is the third."""
    said = []
    config = tiny_config(evaluation=SMALL, trainer=QUICK, alarms=ALARMED, replay={"lag": 1})
    assert train(config, tmp_path / "run", say=said.append) is not None
    (line,) = [line for line in said if line.startswith("ALARM")]
    assert line.startswith("ALARM entropy: policy/entropy = ")
    assert "for 2 iterations (limit 100)" in line
    assert alarms_of(tmp_path / "run") == [("entropy", 3)]
    (event,) = [row for row in rows(tmp_path / "run", "events") if row["event"] == "alarm"]
    assert line == f"ALARM entropy: {event['message']}"


def test_an_alarm_may_end_the_run_after_a_checkpoint(tiny_config, tmp_path):
    """In iteration 2; resumed, it does not end it again: the count went into the checkpoint."""
    workdir, said = tmp_path / "run", []
    config = tiny_config(evaluation=SMALL, trainer=QUICK, alarms=ALARMED | {"stop": True})
    assert stop(config, workdir, None, say=said.append).startswith("stopped after iteration 2 of 4")
    assert alarms_of(workdir) == [("entropy", 2)]
    assert Checkpointer(workdir / "checkpoints", max_to_keep=2).latest() == 2
    assert not (workdir / "report").exists()
    assert sum(line.startswith("ALARM") for line in said) == 1
    said.clear()
    assert train(config, workdir, say=said.append) is not None
    assert any(line.endswith("from iteration 2") for line in said)
    assert alarms_of(workdir) == [("entropy", 2)]


def test_an_alarm_in_the_last_iteration_leaves_the_validation_in_place(tiny_config, tmp_path):
    """The run ends there anyway: with a report, whose last validation is that of the last iteration."""
    config = tiny_config(evaluation=SMALL, trainer=QUICK | {"num_iterations": 2}, alarms=ALARMED | {"stop": True})
    assert train(config, tmp_path / "run") is not None
    assert alarms_of(tmp_path / "run") == [("entropy", 2)]
    validated = [row["iteration"] for row in rows(tmp_path / "run") if row.get("split") == "validation"]
    assert validated == [0, 2]
