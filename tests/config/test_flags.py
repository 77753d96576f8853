"""Between flags, plain values and a configuration: nothing is lost, and what has no effect is neither kept nor shown."""

import dataclasses
import json
import sys
import textwrap

import pytest
from absl import flags
from ml_collections import config_flags

from r2vpo_jax import config, losses, tasks
from r2vpo_jax.config import Config, make_objective, shipped
from r2vpo_jax.config.fields import default_of
from r2vpo_jax.config.objective import ObjectiveConfig
from r2vpo_jax.config.run import FLOAT32_SWITCHES
from tests.helpers.paths import ROOT
from tests.helpers.trees import leaves, nested

OWN_LOSS = "tests.helpers.own_losses:tempered_loss"
OWN_TASK = "tests.helpers.own_tasks:Echo"


def through_json(made):
    return config.from_dict(json.loads(json.dumps(config.to_dict(made))))


def shown(text):
    """{field: (mark, value, help)} of `describe`."""
    lines = [line for line in text.splitlines() if line and not line.startswith("* differs")]
    split = [line[2:].split(None, 1) for line in lines]
    return {name: (line[0], *rest.split(None, 1)) for line, (name, rest) in zip(lines, split, strict=True)}


def parsed(file, *arguments):
    """The ConfigDict behind --config of a file, with flags on top, as the binaries parse it."""
    values, argv = flags.FlagValues(), ["program", f"--config={file}", *arguments]
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for fields
        values(argv)
    return holder.value


# ---- there and back ----

CASES = {
    **{name: {"objective": {"name": name, "loss": {"entropy_coef": 0.25}}} for name in config.PRESETS},
    "sections": {
        "seed": 3,
        "sampler": {"group_size": 8, "prompt_buckets": (16, 32)},
        "replay": {"capacity": 4, "draw": "mixed", "stale_fraction": 0.25, "max_age": 7},
        "objective": {"name": "ppo", "kl": {"coef": 0.1, "target": 0.02}, "correction": {"mode": "mask"}},
        "evaluation": {"temperature": 0.0, "top_k": 5},
        "alarms": {"stop": True},
    },
    "text": {
        "task": {
            "name": "text",
            "text": {"train": "gsm8k", "validation": "gsm8k?rows=:8", "test": "aime24", "max_response_length": 64},
            "prompt": {"template": "plain", "text": "{question}="},
            "verifier": {"num_workers": 1},
            "reward": {"format": 0.1},
        }
    },
    "bfloat16": {"model": {"compute_dtype": "bfloat16"}, "objective": {"dual": {"budget": 0.01}}},
    "own loss": {"objective": {"loss": {"name": OWN_LOSS, "options": {"power": 0.25, "cap": 2.0}}}},
    "own task": {"task": {"name": OWN_TASK, "options": {"length": 3, "words": "ab"}}},
}


@pytest.mark.parametrize("case", CASES)
def test_through_json_and_flags_and_back(case):
    made = config.from_dict(CASES[case])
    assert made != Config() or case == config.presets.DEFAULT
    assert through_json(made) == made
    assert config.from_flags(config.to_config_dict(made)) == made
    assert config.from_flags(config.make(**CASES[case])) == made
    # What is given is what is in force.
    for path, value in leaves(CASES[case]):
        assert dict(leaves(config.to_dict(made)))[path] == value


def test_the_defaults_come_through_unchanged():
    assert config.from_dict({}) == config.from_flags(config.make()) == through_json(Config()) == Config()


def test_a_saved_configuration_has_no_null_that_means_a_number():
    """Every option of a loss has its number; a null is a limit or a switch that is off."""
    for name in config.PRESETS:
        saved = dict(leaves(config.to_dict(config.from_dict({"objective": {"name": name}}))))
        nulls = {path for path, value in saved.items() if value is None}
        off = {"replay.capacity_bytes", "replay.max_age", "replay.max_uses"}
        assert nulls - off <= {"objective.loss.options.dual_clip", "objective.kl.target"}, name


def test_overrides_leave_the_other_fields_open_to_flags():
    values = config.make(
        sampler={"group_size": 8}, objective={"name": "ppo_clip", "loss": {"options": {"clip_low": 0.1}}}
    )
    values.sampler.temperature = 0.5
    values.objective.loss.options.clip_high = 0.3
    made = config.from_flags(values)
    assert (made.sampler.group_size, made.sampler.temperature) == (8, 0.5)
    assert made.objective.loss.options == {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": None}
    for section, kind in (("sampler", config.SamplerConfig), ("objective", ObjectiveConfig)):
        assert set(values[section]) == {field.name for field in dataclasses.fields(kind)}
    every_option = {name for loss in losses.names() for name in losses.hyperparameters(loss)}
    assert set(values.objective.loss.options) == every_option, "each can be given by a flag"


def test_a_preset_chosen_by_a_flag_fills_the_rest():
    """The config file leaves the preset's fields open; what it sets stays."""
    values = config.make(objective={"dual": {"normalize": True}})
    values.objective.name = "r2vpo_fixed"
    objective = config.from_flags(values).objective
    assert (objective.dual.adaptive, objective.dual.coef, objective.dual.normalize) == (False, 2.5, True)


def test_flags_have_types():
    """A field that is None may be set to a value of its type only."""
    values = config.make()
    values.objective.dual.budget = 0.1
    values.objective.kl.target = 0.1
    values.trainer.max_noise_floor = 0.1
    values.model.path = "somewhere"
    for node, field in ((values.objective.dual, "budget"), (values.objective.loss.options, "clip_low")):
        with pytest.raises(TypeError):
            node[field] = "much"
    with pytest.raises((TypeError, ValueError)):
        values.trainer.num_iterations = "many"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nonsense": 1}, "unknown config field nonsense; known: .*objective.*trainer"),
        ({"trainer": {"nonsense": 1}}, r"unknown config field trainer\.nonsense; known: .*num_iterations"),
        ({"task": {"text": {"nonsense": 1}}}, r"unknown config field task\.text\.nonsense; known: .*max_response"),
    ],
)
def test_unknown_fields_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(values)


# ---- what depends on other fields ----


@pytest.mark.parametrize(
    ("sections", "floor"),
    [
        ({}, 1e-6),
        ({"model": {"compute_dtype": "bfloat16"}}, 0.01),  # a budget of 0.04
        ({"model": {"compute_dtype": "bfloat16"}, "objective": {"dual": {"budget": 0.002}}}, 0.0005),
        ({"model": {"compute_dtype": "bfloat16"}, "trainer": {"max_noise_floor": 1e-3}}, 1e-3),
        ({"model": {"compute_dtype": "bfloat16"}, "objective": {"name": "ppo_clip"}}, 0.01),
        ({"model": {"param_dtype": "bfloat16"}}, 1e-6),
    ],
)
def test_the_limit_of_the_noise_floor_follows_the_arithmetic(sections, floor):
    for made in (config.from_dict(sections), config.from_flags(config.make(**sections))):
        assert made.trainer.max_noise_floor == floor
        assert through_json(made) == made


# ---- fields without effect ----

# Fields that have an effect only if the settings hold; each with a value that is not its default.
CONDITIONAL = [
    ({"objective.dual.adaptive": True}, {"objective.dual.budget": 0.1, "objective.dual.step": 0.1}),
    ({"objective.dual.adaptive": True}, {"objective.dual.max_step": 2.0, "objective.dual.max_coef": 7.0}),
    (
        {"objective.dual.adaptive": True},
        {"objective.dual.rule": "multiplicative", "objective.dual.signal": "excess"},
    ),
    (
        {"objective.dual.adaptive": True},
        {"objective.dual.smoothing": 0.5, "objective.dual.carry": 4.0, "objective.dual.proportional": 0.5},
    ),
    ({"objective.dual.adaptive": True}, {"objective.dual.measure": "corrected", "objective.dual.carry": float("inf")}),
    ({"objective.loss.name": "r2vpo"}, {"objective.dual.coef": 3.0, "objective.dual.normalize": True}),
    ({"objective.advantage.estimator": "group_relative"}, {"objective.advantage.scale": "none"}),
    ({"objective.advantage.estimator": "gae"}, {"objective.advantage.discount": 0.5}),
    ({"objective.advantage.estimator": "reinforce_pp"}, {"objective.advantage.discount": 0.5}),
    (
        {"objective.advantage.estimator": "gae"},
        {
            "objective.advantage.trace_decay": 0.5,
            "objective.advantage.whiten": False,
            "objective.advantage.value_coef": 1.0,
            "objective.advantage.value_clip": 0.0,
        },
    ),
    ({"mesh.sampler_devices": 4}, {"mesh.sampler_tensor": 2}),
    ({"trainer.trackers": ("tensorboard", "wandb")}, {"trainer.tracker_project": "mine"}),
    ({"replay.lag": 1, "replay.overlap": True}, {"replay.wait_limit": 60.0}),
    (
        {"sampler.engine": "own"},
        {"sampler.weights": "int8", "sampler.segment_length": 8, "sampler.prompt_buckets": (4,)},
    ),
    ({"sampler.engine": "endpoint"}, {"sampler.endpoint.publish_every": 2, "sampler.endpoint.seeds": False}),
    ({"objective.groups.zero_variance": "resample"}, {"objective.groups.max_resamples": 3}),
    ({"objective.groups.overlong_penalty": 0.5}, {"objective.groups.overlong_buffer": 0.5}),
    (
        {"objective.kl.coef": 0.1},
        {"objective.kl.estimator": "k1", "objective.kl.corrected": True},
    ),
    ({"objective.kl.coef": 0.1}, {"objective.kl.where": "reward"}),
    ({"objective.kl.coef": 0.1}, {"objective.kl.to": "behavior"}),
    (
        {"objective.correction.mode": "truncate"},
        {"objective.correction.scope": "sequence", "objective.correction.max_weight": 3.0},
    ),
    ({"objective.correction.mode": "mask"}, {"objective.correction.min_weight": 0.5}),
    (
        {"objective.correction.filter": "geometric"},
        {"objective.correction.filter_low": 0.5, "objective.correction.filter_high": 2.0},
    ),
    ({"objective.correction.step_scaling": "sqrt"}, {"objective.correction.step_reference": 0.5}),
    ({"replay.draw": "mixed", "replay.capacity": 2}, {"replay.stale_fraction": 0.25}),
    ({"model.compute_dtype": "bfloat16"}, {f"model.{name}": True for name in FLOAT32_SWITCHES}),
    (
        {"model.lora.rank": 4},
        {
            "model.lora.alpha": 8.0,
            "model.lora.target_modules": ("q_proj", "down_proj"),
            "model.lora.use_rslora": True,
            "model.lora.base_dtype": "bfloat16",
        },
    ),
    ({"task.name": "arithmetic"}, {"task.arithmetic.max_operands": 3}),
    (
        {"task.name": "text", **{f"task.text.{split}": "gsm8k" for split in ("train", "validation", "test")}},
        {"task.prompt.max_length": 9, "task.verifier.num_workers": 1, "task.reward.format": 0.5},
    ),
    ({"task.name": OWN_TASK}, {"task.options.length": 3}),
]
# Under these nothing of CONDITIONAL has an effect, apart from what its settings say.
PLAIN = {
    "objective.name": "ppo_clip",
    "objective.advantage.estimator": "leave_one_out",
    "task.name": "tests.helpers.own_tasks:Echo",
}


@pytest.mark.parametrize(("settings", "fields"), CONDITIONAL, ids=lambda x: ",".join(x))
def test_a_field_without_effect_is_neither_kept_nor_shown_nor_saved(settings, fields):
    base = {"objective.loss.name": "r2vpo"} if "objective.dual.adaptive" in settings else {}
    plain = PLAIN | ({"sampler.engine": "endpoint"} if settings == {"sampler.engine": "own"} else {})
    with_effect = nested(PLAIN | base | settings | fields)
    assert config.without_effect(with_effect) == []
    made = config.from_dict(with_effect)
    assert {path: value for path, value in leaves(config.to_dict(made)) if path in fields} == fields
    assert fields.keys() <= shown(config.describe(made)).keys()
    assert through_json(made) == made

    if "task.options.length" in fields:
        return  # options of a shipped task are refused
    off = nested(plain | fields)
    made = config.from_dict(off)
    assert config.without_effect(off) == list(fields)
    assert made == config.from_dict(nested(plain)), "as if it had not been given"
    assert not fields.keys() & dict(leaves(config.to_dict(made))).keys()
    assert not fields.keys() & shown(config.describe(made)).keys()


def test_every_conditional_field_is_in_the_table():
    conditional = set()

    def visit(kind, prefix, always):
        for field in dataclasses.fields(kind):
            effective = always and field.metadata.get("when") is None
            value = default_of(field)
            if dataclasses.is_dataclass(value):
                visit(type(value), f"{prefix}{field.name}.", effective)
            elif not effective:
                conditional.add(prefix + field.name)

    visit(Config, "", True)
    tried = {path for settings, fields in CONDITIONAL for path in (*settings, *fields)} | {"task.options"}
    # Of a section that comes or goes as a whole, some fields are enough.
    whole = ("sampler.endpoint.", "task.prompt.", "task.verifier.", "task.reward.", "task.arithmetic.", "task.text.")
    assert {path for path in conditional - tried if not path.startswith(whole)} == {"objective.kl.target"}


def test_a_target_of_a_divergence_that_is_off_is_refused():
    with pytest.raises(ValueError, match="objective.kl.target adapts objective.kl.coef"):
        config.from_dict({"objective": {"kl": {"target": 0.1}}})


def test_what_is_out_of_range_is_refused_even_without_effect():
    with pytest.raises(ValueError, match="objective.dual.step must be > 0"):
        config.from_dict({"objective": {"name": "ppo_clip", "dual": {"step": -1.0}}})


def test_defaults_of_other_sections_are_not_called_without_effect():
    """A config file lists them all; what it sets for an objective it means."""
    assert config.without_effect(config.make().to_dict()) == []
    given = {"replay": {"stale_fraction": 0.5}, "objective": {"name": "ppo_clip", "dual": {"budget": 0.04}}}
    assert config.without_effect(given) == ["objective.dual.budget"]


# ---- what is shown ----


def test_every_field_in_force_is_shown_with_its_help():
    for case in CASES.values():
        made = config.from_dict(case)
        lines = shown(config.describe(made))
        assert list(lines) == [path for path, _ in leaves(config.to_dict(made))] or set(lines) == {
            path for path, _ in leaves(config.to_dict(made))
        }
        assert all(help for _, _, help in lines.values())


def test_what_differs_from_the_preset_is_marked():
    assert not [name for name, (mark, *_) in shown(config.describe(Config())).items() if mark != " "]
    made = config.from_dict(
        {
            "objective": {"name": "dapo", "loss": {"options": {"clip_high": 0.3}}, "kl": {"coef": 0.1}},
            "sampler": {"group_size": 8},
        }
    )
    marked = {name for name, (mark, *_) in shown(config.describe(made)).items() if mark == "*"}
    assert {"objective.loss.options.clip_high", "objective.kl.coef", "sampler.group_size"} <= marked
    # What has an effect only because of that is not part of the preset either.
    assert marked - {name for name in marked if name.startswith("objective.kl.")} == {
        "objective.loss.options.clip_high",
        "sampler.group_size",
    }
    assert config.describe(made).endswith("\n* differs from the defaults of its preset")
    other = config.describe(made, made)
    assert not [name for name, (mark, *_) in shown(other).items() if mark != " "]


def test_a_clip_shows_its_bounds_and_no_multiplier():
    lines = shown(config.describe(config.from_dict({"objective": {"name": "ppo_clip"}})))
    bounds = {name: lines[f"objective.loss.options.{name}"][1] for name in ("clip_low", "clip_high", "dual_clip")}
    assert bounds == {"clip_low": "0.2", "clip_high": "0.2", "dual_clip": "None"}
    assert not [name for name in lines if "dual." in name or "budget" in name]


@pytest.mark.parametrize("loss", [loss for loss in losses.names() if losses.hyperparameters(loss)])
def test_the_help_of_an_option_is_in_the_docstring_of_its_loss(loss):
    made = config.from_dict({"objective": {"name": "policy_gradient", "loss": {"name": loss}}})
    lines = shown(config.describe(made))
    for name, default in losses.hyperparameters(loss).items():
        mark, value, help = lines[f"objective.loss.options.{name}"]
        assert (mark, value) == ("*", str(default))
        assert "explained in its docstring" not in help, name


# ---- names of before ----


def test_every_old_name_is_refused_with_the_new_one():
    from r2vpo_jax.config import renamed

    known = {path for case in CASES.values() for path, _ in leaves(config.to_dict(config.from_dict(case)))}
    known |= {path for path, _ in leaves(dataclasses.asdict(Config()))}
    assert len(renamed.NEW_NAMES) > 60
    for old, new in renamed.NEW_NAMES.items():
        assert config.new_name(old) == new
        assert config.new_name(new) is None, "today's names are not refused"
        every_option = {
            f"objective.loss.options.{name}" for loss in losses.names() for name in losses.hyperparameters(loss)
        }
        assert new in known | every_option, new
        with pytest.raises(ValueError, match=f"^config field {old} is now {new}$"):
            config.from_dict(nested({old: 1.0}))


# ---- what a user brings along ----


def own_config_file(path, **sections):
    arguments = ", ".join(f"{name}={value!r}" for name, value in sections.items())
    path.write_text(
        textwrap.dedent(f"""
        from r2vpo_jax import config

        def get_config():
            return config.make({arguments})
        """)
    )
    return path


def test_a_loss_of_ones_own_takes_its_options_from_a_file_and_from_flags(tmp_path):
    objective = {"loss": {"name": OWN_LOSS, "options": {"power": 0.25}}}
    file = own_config_file(tmp_path / "own.py", objective=objective)
    made = config.from_flags(parsed(file))
    assert made.objective.loss.name == OWN_LOSS
    assert made.objective.loss.options == {"power": 0.25, "cap": None, "scope": "token"}
    # It takes a variance coefficient, so that it has a multiplier.
    assert made.objective.has_multiplier
    assert made.objective.variance_budget == 0.04
    made = config.from_flags(
        parsed(file, "--config.objective.loss.options.cap=2.0", "--config.objective.loss.options.power=0.75")
    )
    assert made.objective.loss.options == {"power": 0.75, "cap": 2.0, "scope": "token"}
    for options, message in (
        ({"strength": 1.0}, "strength is not a hyper-parameter of loss .*; it takes power, cap, scope"),
        ({"power": -1.0}, r"objective\.loss: .*power must be > 0, got -1.0"),
        ({"power": "much"}, "power must be of the type of its default 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make_objective(loss={"name": OWN_LOSS, "options": options})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:loss", "there is no module 'nowhere'"),
        ("tests.helpers.own_losses:nothing", "has no function or class 'nothing'"),
        ("tests.helpers.own_losses:without_weights_loss", "does not take weights"),
        ("tests.helpers.own_losses:without_a_default_loss", "has no default for power"),
    ],
)
def test_a_loss_that_is_not_there_or_does_not_fit_is_refused(name, message):
    with pytest.raises(ValueError, match=rf"^objective\.loss\.name='{name}': .*{message}"):
        make_objective(loss={"name": name})


def test_a_task_of_ones_own_takes_its_options_from_a_file_and_from_flags(tmp_path):
    file = own_config_file(tmp_path / "own.py", task={"name": OWN_TASK, "options": {"length": 3}})
    made = config.from_flags(parsed(file))
    assert (made.task.name, made.task.options) == (OWN_TASK, {"length": 3})
    task = tasks.make(made.task)
    assert (task.length, task.words, task.eos_ids) == (3, "abc", ())
    made = config.from_flags(parsed(file, "--config.task.options.length=4"))
    assert tasks.make(made.task, tokenizer="the model's", eos_ids=(7,)).length == 4
    assert tasks.make(made.task, tokenizer="the model's", eos_ids=(7,)).eos_ids == (7,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere:Task", {}, "there is no module 'nowhere'"),
        ("tests.helpers.own_tasks:Nothing", {}, "has no function or class 'Nothing'"),
        ("tests.helpers.own_tasks:Unfinished", {}, "Unfinished has no problems, num_problems, verify, answers"),
        (OWN_TASK, {"size": 3}, "got an unexpected keyword argument 'size'; it takes eos_ids, length, words"),
        (OWN_TASK, {"length": 0}, "length must be at least 1"),
    ],
)
def test_a_task_that_is_not_there_or_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(config.TaskConfig(name=name, options=options))


def test_a_module_that_lacks_something_itself_keeps_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_task.py").write_text("import there_is_no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_thing"):
        tasks.make(config.TaskConfig(name="broken_task:Task"))


def test_the_shipped_files_set_nothing_without_effect():
    assert len(shipped.names()) > 3
    for name in shipped.names():
        file = ROOT / "experiments" / "configs" / f"{name}.py"
        values = parsed(file)
        if "base" in values:
            values = values.base
        assert config.without_effect(values.to_dict()) == [], file
