"""The sections besides the objective: what is out of range, or does not fit the rest, is refused by its name."""

import dataclasses

import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax.config import (
    AlarmConfig,
    ArithmeticConfig,
    Config,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PromptConfig,
    ReplayConfig,
    RewardConfig,
    SamplerConfig,
    ScoreSamplingConfig,
    TaskConfig,
    TextConfig,
    TrainerConfig,
    VerifierConfig,
)

ALLOWED = {"allow_single_update": True}
NAN = float("nan")
SPLITS = {"train": "word_problems", "validation": "word_problems", "test": "word_problems"}


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (TrainerConfig, {"num_iterations": 0}, "trainer.num_iterations must be at least 1, got 0"),
        (TrainerConfig, {"micro_batch_size": -2}, "trainer.micro_batch_size must be at least 1"),
        (TrainerConfig, {"eval_samples": 0}, "trainer.eval_samples must be at least 1"),
        (TrainerConfig, {"samples_per_iteration": -1}, "trainer.samples_per_iteration must be at least 0"),
        (TrainerConfig, {"max_nonfinite_updates": -1}, "trainer.max_nonfinite_updates must be at least 0"),
        (TrainerConfig, {"max_noise_floor": 0.0}, "trainer.max_noise_floor must be > 0"),
        (TrainerConfig, {"max_noise_floor": NAN}, "trainer.max_noise_floor must be > 0"),
        (TrainerConfig, {"prompts_per_rollout": 10}, "groups are not torn"),
        (ReplayConfig, {"lag": -1}, "replay.lag must be at least 0"),
        (ReplayConfig, {"capacity": 2, "draw": "oldest"}, "replay.draw='oldest' is unknown; one of newest"),
        (ReplayConfig, {"draw": "mixed"}, "needs older batches: set replay.capacity to at least 2"),
        (ReplayConfig, {"max_uses": 0}, "replay.max_uses must be at least 1"),
        (ReplayConfig, {"stale_fraction": 1.5}, r"replay.stale_fraction must be in \[0, 1\]"),
        (AlarmConfig, {"patience": 0}, "alarms.patience must be at least 1"),
        (SamplerConfig, {"group_size": 1}, "sampler.group_size must be at least 2"),
        (SamplerConfig, {"temperature": 0.0}, "sampler.temperature must be > 0"),
        (SamplerConfig, {"batch_size": 15}, "sampler.batch_size=15 counts responses: it must hold a group"),
        (SamplerConfig, {"segment_length": -1}, "sampler.segment_length must be >= 0"),
        (ScoreSamplingConfig, {"temperature": -0.1}, "evaluation.temperature must be >= 0"),
        (ScoreSamplingConfig, {"top_p": 0.0}, r"evaluation.top_p must be in \(0, 1\]"),
        (ScoreSamplingConfig, {"top_p": 1.1}, r"evaluation.top_p must be in \(0, 1\]"),
        (ScoreSamplingConfig, {"top_k": -1}, "evaluation.top_k must be >= 0"),
        (ScoreSamplingConfig, {"batch_size": 0}, "evaluation.batch_size must be >= 1"),
        (ScoreSamplingConfig, {"segment_length": -1}, "evaluation.segment_length must be >= 0"),
        (OptimizerConfig, {"learning_rate": 0.0}, "optimizer.learning_rate must be > 0"),
        (OptimizerConfig, {"value_learning_rate": 0.0}, "optimizer.value_learning_rate must be > 0"),
        (OptimizerConfig, {"warmup_updates": -1}, "optimizer.warmup_updates must be >= 0"),
        (OptimizerConfig, {"schedule": "step"}, "optimizer.schedule='step' is unknown"),
        (OptimizerConfig, {"final_fraction": 1.5}, "optimizer.final_fraction must be in"),
        (OptimizerConfig, {"max_grad_norm": 0.0}, "optimizer.max_grad_norm must be > 0"),
        (
            TaskConfig,
            {"name": "chess"},
            "task.name='chess' is unknown; one of arithmetic, countdown, eureka, text, or module:Class",
        ),
        (TaskConfig, {"name": "my tasks:Chess"}, "task.name='my tasks:Chess' is unknown"),
        (
            TaskConfig,
            {"options": {"size": 8}},
            "task.options is for countdown, eureka, or a task of your own, task.name=module:Class",
        ),
        (TaskConfig, {"name": "text"}, "task.name=text needs task.text.train, for example"),
        (TextConfig, {"max_response_length": 0}, "task.text.max_response_length must be at least 1"),
        (PromptConfig, {"template": "xml"}, "task.prompt.template='xml' is unknown; one of chat, plain"),
        (PromptConfig, {"text": "Q:"}, "task.prompt.text must contain {question}"),
        (PromptConfig, {"max_length": 0}, "task.prompt.max_length must be at least 1"),
        (PromptConfig, {"template": "plain", "system": "Hi"}, "task.prompt.system needs task.prompt.template=chat"),
        (PromptConfig, {"template": "plain", "thinking": True}, "task.prompt.thinking needs"),
        (VerifierConfig, {"num_workers": 0}, "task.verifier.num_workers must be at least 1"),
        (VerifierConfig, {"time_limit": 0.0}, "task.verifier.time_limit must be > 0"),
        (VerifierConfig, {"tolerance": -1.0}, "task.verifier.tolerance must be >= 0"),
        (VerifierConfig, {"answer": "tag"}, "task.verifier.answer='tag' is unknown; one of final, boxed"),
        (VerifierConfig, {"bad_gold": "ignore"}, "task.verifier.bad_gold='ignore' is unknown; one of refuse, drop"),
        (RewardConfig, {"correct": 0.0}, "task.reward.correct=0 leaves nothing to learn from"),
        (RewardConfig, {"correct": -1.0, "function": "a:b"}, "task.reward.correct must be >= 0"),
        (RewardConfig, {"function": "a.b"}, "task.reward.function='a.b' must be module:function"),
        (RewardConfig, {"format_pattern": "("}, "task.reward.format_pattern is not a regular expression"),
        (ModelConfig, {"compute_dtype": "float16"}, "model.compute_dtype='float16'"),
        (ModelConfig, {"param_dtype": "int8"}, "model.param_dtype='int8'"),
        (ModelConfig, {"export_dtype": "int8"}, "model.export_dtype='int8'"),
        (ModelConfig, {"attention_block_size": -1}, "model.attention_block_size must be at least 0"),
        (LoraConfig, {"rank": -1}, "model.lora.rank must be at least 0"),
        (LoraConfig, {"alpha": 0.0}, "model.lora.alpha must be a number > 0"),
        (
            LoraConfig,
            {"base_dtype": "int8"},
            "model.lora.base_dtype='int8' is unknown; one of compute, float32, bfloat16",
        ),
        (LoraConfig, {"target_modules": ()}, "model.lora.target_modules is empty: nothing would be trained"),
        (
            LoraConfig,
            {"target_modules": ("q_proj", "lm_head")},
            r"model.lora.target_modules has \['lm_head'\], .* there are for q_proj, k_proj, .*, down_proj",
        ),
    ],
)
def test_values_out_of_range_name_their_field(section, fields, message):
    section()  # the defaults are fine
    with pytest.raises(ValueError, match=message):
        section(**fields)


def test_fields_that_must_fit_each_other():
    with pytest.raises(ValueError, match=r"a minibatch has 128 rows .*trainer\.micro_batch_size=48"):
        Config(trainer=TrainerConfig(micro_batch_size=48))
    with pytest.raises(ValueError, match="seed must be >= 0"):
        Config(seed=-1)
    single = {"num_minibatches": 1, "num_epochs": 1}
    with pytest.raises(ValueError, match=r"with one update a rollout on fresh data .*num_minibatches or .*replay\.lag"):
        Config(trainer=TrainerConfig(**single))
    Config(trainer=TrainerConfig(**single, **ALLOWED))
    Config(trainer=TrainerConfig(**single), replay=ReplayConfig(lag=1))
    assert TrainerConfig(num_minibatches=1, num_epochs=1, **ALLOWED).updates_per_rollout == 1
    assert TrainerConfig(num_minibatches=4, num_epochs=3).updates_per_rollout == 12


def test_batches_are_counted_in_responses():
    """A sampling batch holds whole groups, and no more of them than there are."""
    default = Config()
    assert (default.sampler.group_size, default.sampler.batch_size, default.trainer.prompts_per_rollout) == (
        16,
        1024,
        64,
    )
    assert default.prompts_at_once == 64
    assert Config(sampler=SamplerConfig(batch_size=100)).prompts_at_once == 6
    assert Config(sampler=SamplerConfig(batch_size=16)).prompts_at_once == 1
    assert Config(sampler=SamplerConfig(batch_size=10**6)).prompts_at_once == 64


def test_a_text_task_needs_every_split():
    for missing in SPLITS:
        given = TextConfig(**{name: spec for name, spec in SPLITS.items() if name != missing})
        with pytest.raises(ValueError, match=f"needs task.text.{missing}, for example --config.task.text.{missing}="):
            TaskConfig(name="text", text=given)
    assert TaskConfig(name="text", text=TextConfig(**SPLITS)).text.train == "word_problems"


def test_every_field_has_help():
    sections, number = [Config], 0
    for section in sections:
        for field in dataclasses.fields(section):
            if field.metadata.get("help"):
                number += 1
                assert not field.metadata["help"].startswith("of "), (section, field.name)
                assert "\n" not in field.metadata["help"]
            else:  # what has no line of help is a section, which has a docstring
                value = field.default_factory()
                assert dataclasses.is_dataclass(value), (section, field.name)
                assert type(value).__doc__
                sections.append(type(value))
    assert {ObjectiveConfig, ReplayConfig, AlarmConfig, PromptConfig, VerifierConfig, RewardConfig} < set(sections)
    assert {ArithmeticConfig, TextConfig, ScoreSamplingConfig} < set(sections)
    assert number > 120


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_reward_functions_and_their_weights():
    """One has `function_weight`, several have `function_weights`; the other field is not in force."""
    from r2vpo_jax.config.fields import build, in_force
    from r2vpo_jax.config.task import RewardConfig

    cases = [
        ({}, (), "function_weight"),
        ({"function": "a:f", "function_weight": 0.2}, (("a:f", 0.2),), "function_weight"),
        ({"function": "a:f, b.c:G.h"}, (("a:f", 1.0), ("b.c:G.h", 1.0)), "function_weights"),
        ({"function": "a:f,b:g", "function_weights": [0.5, -1]}, (("a:f", 0.5), ("b:g", -1.0)), "function_weights"),
    ]
    for given, functions, field in cases:
        made = build(RewardConfig, given)
        assert made.functions == functions
        assert [name for f, _ in in_force(made) if (name := f.name).startswith("function_weight")] == [field]
    for given, message in (
        ({"function": "a:f,"}, "must be module:function, or several with commas between them"),
        ({"function": "a:f,a:f"}, "names a function twice"),
        ({"function": "a:f,b:g", "function_weights": (1.0,)}, "has 1 weights for 2 functions"),
        ({"function": "a:f,b:g", "function_weights": (1.0, "x")}, "must be numbers"),
        ({"function": "a:f", "function_weight": 0.0, "correct": 0.0}, "leaves nothing to learn from"),
    ):
        with pytest.raises(ValueError, match=message):
            build(RewardConfig, given)


_FILES = {"train": "a.jsonl", "validation": "b.jsonl", "test": "c.jsonl"}


@pytest.mark.parametrize(
    ("task", "refused"),
    [
        ({"name": "eureka"}, True),
        ({"name": "text", "text": _FILES}, True),
        ({"name": "text", "text": _FILES, "reward": {"format": 0.5}}, False),
        (
            {"name": "text", "text": _FILES, "reward": {"function": "mine:f"}},
            False,
        ),
        ({"name": "mine:Task"}, False),
    ],
)
def test_normalizing_each_part_of_a_reward_needs_several(task, refused):
    def make():
        return config_lib.from_flags(config_lib.make(task=task, objective={"advantage": {"estimator": "gdpo"}}))

    if refused:
        with pytest.raises(ValueError, match="has one part only"):
            make()
    else:
        make()
