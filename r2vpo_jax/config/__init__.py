"""Every setting of a run, of an evaluation and of a sweep."""

from r2vpo_jax.config import grid
from r2vpo_jax.config.evaluation import EvaluationConfig
from r2vpo_jax.config.fields import is_on
from r2vpo_jax.config.flags import (
    describe,
    from_dict,
    from_flags,
    leaves,
    make,
    to_config_dict,
    to_dict,
    to_open_config_dict,
    without_effect,
)
from r2vpo_jax.config.lora import LoraConfig
from r2vpo_jax.config.objective import (
    AdvantageConfig,
    CorrectionConfig,
    DualConfig,
    GroupsConfig,
    KLConfig,
    LossConfig,
    ObjectiveConfig,
)
from r2vpo_jax.config.presets import PRESETS
from r2vpo_jax.config.renamed import new_name
from r2vpo_jax.config.run import (
    AlarmConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ReplayConfig,
    RunMeshConfig,
    SweepConfig,
    TrainerConfig,
    make_objective,
)
from r2vpo_jax.config.sampling import EndpointConfig, SamplerConfig, ScoreSamplingConfig
from r2vpo_jax.config.shipped import named
from r2vpo_jax.config.task import ArithmeticConfig, PromptConfig, RewardConfig, TaskConfig, TextConfig, VerifierConfig
from r2vpo_jax.config.traced import numbers, structure, with_numbers

__all__ = [
    "PRESETS",
    "AdvantageConfig",
    "AlarmConfig",
    "ArithmeticConfig",
    "Config",
    "CorrectionConfig",
    "DualConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "GroupsConfig",
    "KLConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PromptConfig",
    "ReplayConfig",
    "RewardConfig",
    "RunMeshConfig",
    "SamplerConfig",
    "ScoreSamplingConfig",
    "SweepConfig",
    "TaskConfig",
    "TextConfig",
    "TrainerConfig",
    "VerifierConfig",
    "describe",
    "from_dict",
    "from_flags",
    "grid",
    "is_on",
    "leaves",
    "make",
    "make_objective",
    "named",
    "new_name",
    "numbers",
    "structure",
    "to_config_dict",
    "to_dict",
    "to_open_config_dict",
    "with_numbers",
    "without_effect",
]
