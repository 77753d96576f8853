"""What a run that has begun may go on with."""

import dataclasses
import json

import pytest

from r2vpo_jax import config
from r2vpo_jax.config import continuing

TEXT = {
    "name": "text",
    "text": {"train": "gsm8k", "validation": "gsm8k", "test": "gsm8k"},
}
IN_16_BITS = {"compute_dtype": "bfloat16"}
OVERLAPPED = {"lag": 1, "overlap": True}


def compared(here, there=None):
    def values(sections):
        return json.loads(json.dumps(config.to_dict(config.from_flags(config.make(**sections)))))

    return continuing.compare(values(there or {}), values(here))


def test_every_name_on_the_lists_is_a_field_or_a_section():
    shared = {"task": TEXT, "model": IN_16_BITS, "replay": OVERLAPPED, "trainer": {"trackers": ("wandb",)}}
    made = [config.make(**shared, sampler={"engine": engine}) for engine in ("own", "endpoint")]
    fields = {path for each in made for path, _ in config.leaves(config.to_dict(config.from_flags(each)))}
    sections = {path.partition(".")[0] for path in fields}
    assert not {*continuing.FREE, *continuing.ROUNDING} - fields - sections


def test_what_stays_in_float32_may_be_changed_where_16_bits_compute():
    found = compared({"model": IN_16_BITS | {"float32_scores": True}}, {"model": IN_16_BITS})
    assert found.accepted == found.rounding == ("model.float32_scores: False there, True here",)


def test_a_run_may_sample_beside_learning_from_now_on():
    found = compared({"replay": OVERLAPPED}, {"replay": {"lag": 1}})
    assert found.accepted == found.free
    assert found.free[0] == "replay.overlap: False there, True here"


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"trainer": {"micro_batch_size": 16}}, "rounding"),
        ({"trainer": {"scoring_chunk_size": 64}}, "rounding"),
        ({"trainer": {"packing": True}}, "rounding"),
        ({"mesh": {"data": 2}}, "rounding"),
        ({"model": {"remat": True}}, "rounding"),
        ({"evaluation": {"batch_size": 512}}, "rounding"),
        ({"sampler": {"batch_size": 512}}, "rounding"),
        ({"sampler": {"segment_length": 0}}, "rounding"),
        ({"evaluation": {"segment_length": 0}}, "rounding"),
        ({"trainer": {"checkpoint_every": 3}}, "free"),
        ({"trainer": {"eval_every": 3}}, "free"),
        ({"trainer": {"trackers": ("tensorboard",)}}, "free"),
        ({"trainer": {"max_nonfinite_updates": 2}}, "free"),
        ({"alarms": {"stop": True}}, "free"),
        ({"trainer": {"num_iterations": 101}}, "longer"),
        ({"trainer": {"num_iterations": 99}}, "refused"),
        ({"trainer": {"eval_problems": 10}}, "refused"),
        ({"trainer": {"num_minibatches": 4}}, "refused"),
        ({"seed": 1}, "refused"),
        ({"evaluation": {"temperature": 0.5}}, "refused"),
        ({"model": {"compute_dtype": "bfloat16"}, "trainer": {"max_noise_floor": 1e-6}}, "refused"),
        ({"objective": {"name": "grpo"}}, "refused"),
        ({"sampler": {"temperature": 0.9}}, "refused"),
        ({"model": {"lora": {"rank": 2}}}, "refused"),
    ],
)  # fmt: skip
def test_a_change_of_one_field(changed, kind):
    found = compared(changed)
    # A dtype of 16 bits brings switches that one of 32 does not have, which alone would only round.
    brought = [text for text in found.rounding if text.startswith("model.float32_")]
    assert len(brought) == (3 if "model.compute_dtype" in str(found.refused) else 0)
    found = dataclasses.replace(found, rounding=tuple(text for text in found.rounding if text not in brought))
    assert getattr(found, kind), found
    assert sum(map(bool, (found.refused, found.free, found.rounding, found.longer))) == 1
    assert bool(found.accepted) == (kind != "refused")
    assert not compared(changed, changed).accepted


def test_verifiers_may_change_in_what_the_machine_decides():
    limits = {"num_workers": 5, "time_limit": 9.0, "memory_limit_mb": 999}
    assert len(compared({"task": TEXT | {"verifier": limits}}, {"task": TEXT}).free) == 3
    assert compared({"task": TEXT | {"verifier": {"tolerance": 0.1}}}, {"task": TEXT}).refused


def test_more_iterations_need_a_schedule_that_does_not_know_how_many():
    for schedule in ("linear", "cosine"):
        both = {"optimizer": {"schedule": schedule}}
        (text,) = compared(both | {"trainer": {"num_iterations": 200}}, both).refused
        assert text == (
            f"trainer.num_iterations: 100 there, 200 here, and optimizer.schedule={schedule} is over all of them"
        )
    assert compared({"trainer": {"num_iterations": 200}}).longer == ("trainer.num_iterations: 100 there, 200 here",)
    assert compared({"trainer": {"num_iterations": 9}}).refused == (
        "trainer.num_iterations: 100 there, 9 here, fewer than it was started for",
    )


@pytest.mark.parametrize(
    ("section", "name", "kind"),
    [("trainer", "packing", "rounding"), ("trainer", "eval_every", "free"), ("sampler", "group_size", "refused")],
)
def test_a_field_that_the_run_was_started_without(section, name, kind):
    """By a version of this code that did not have it."""
    now = config.to_dict(config.from_flags(config.make()))
    before = {**now, section: {key: value for key, value in now[section].items() if key != name}}
    found = continuing.compare(before, now)
    assert len(getattr(found, kind)) == 1
    assert "absent there" in getattr(found, kind)[0]


def test_a_run_of_a_version_that_had_a_switch_for_tensorboard_goes_on():
    now = config.to_dict(config.from_flags(config.make()))
    found = continuing.compare({**now, "trainer": {**now["trainer"], "tensorboard": False}}, now)
    assert found == continuing.Changes(free=("trainer.tensorboard: False there, absent here",))
