"""Every setting of a run, of an evaluation and of a sweep."""

from r2vpo_jax.config.evaluation import EvaluationConfig
from r2vpo_jax.config.flags import describe, from_dict, from_flags, make, to_config_dict
from r2vpo_jax.config.objective import PRESETS, ObjectiveConfig
from r2vpo_jax.config.run import (
    AlarmConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ReplayConfig,
    SamplerConfig,
    SweepConfig,
    TrainerConfig,
)
from r2vpo_jax.config.task import PromptConfig, RewardConfig, TaskConfig, VerifierConfig

__all__ = [
    "PRESETS",
    "AlarmConfig",
    "Config",
    "EvaluationConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PromptConfig",
    "ReplayConfig",
    "RewardConfig",
    "SamplerConfig",
    "SweepConfig",
    "TaskConfig",
    "TrainerConfig",
    "VerifierConfig",
    "describe",
    "from_dict",
    "from_flags",
    "make",
    "to_config_dict",
]
