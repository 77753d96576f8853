"""Published methods by name: each is a row that says what differs from the defaults of the sections of `objective`.

Sources of the constants: the docstrings of the loss functions, and docs/algorithms/objectives.md.
"""

from collections.abc import Mapping
from typing import Any

from r2vpo_jax import losses
from r2vpo_jax.config.fields import Options, require

Tree = dict[str, Any]

_SEQUENCE_MEAN = {"reduction": "sequence_mean"}
_CONSTANT_LENGTH = {"reduction": "constant_length"}

PRESETS: dict[str, Tree] = {
    "r2vpo": {"loss": {"name": "r2vpo"}, "dual": {"adaptive": True, "coef": 1.0, "measure": "after", "carry": 4.0}},
    "r2vpo_before": {"loss": {"name": "r2vpo"}, "dual": {"adaptive": True, "coef": 1.0}},
    "r2vpo_fixed": {"loss": {"name": "r2vpo"}, "dual": {"coef": 2.5}},
    "policy_gradient": {"loss": {"name": "policy_gradient"}},
    "ppo_clip": {"loss": {"name": "ppo_clip"}},
    "grpo": {"loss": {"name": "ppo_clip", **_SEQUENCE_MEAN}, "kl": {"coef": 0.04}},
    "dr_grpo": {"loss": {"name": "ppo_clip", **_CONSTANT_LENGTH}, "advantage": {"scale": "none"}},
    "dapo": {
        "loss": {"name": "ppo_clip", "options": {"clip_high": 0.28}},
        # The source's penalty of 1 is half the range of its rewards of -1 and 1; here they are 0 and 1.
        "groups": {"zero_variance": "resample", "overlong_penalty": 0.5},
    },
    "rloo": {
        "loss": {"name": "policy_gradient", **_CONSTANT_LENGTH},
        "advantage": {"estimator": "leave_one_out"},
        "kl": {"coef": 0.05, "where": "reward", "estimator": "k1"},
    },
    "reinforce_pp": {
        "loss": {"name": "ppo_clip"},
        "advantage": {"estimator": "reinforce_pp"},
        "kl": {"coef": 0.01, "where": "reward", "estimator": "k1"},
    },
    "reinforce_pp_baseline": {
        "loss": {"name": "ppo_clip"},
        "advantage": {"estimator": "reinforce_pp_baseline"},
        "kl": {"coef": 0.01, "estimator": "k2"},
    },
    "ppo": {"loss": {"name": "ppo_clip"}, "advantage": {"estimator": "gae"}},
    "ppo_kl": {"loss": {"name": "policy_gradient"}, "kl": {"coef": 1.0, "to": "behavior", "target": 0.01}},
    "cispo": {"loss": {"name": "cispo"}},
    "gspo": {"loss": {"name": "gspo", **_SEQUENCE_MEAN}},
    "spo": {"loss": {"name": "spo"}},
    "m2po": {"loss": {"name": "m2po"}},
    "gmpo": {"loss": {"name": "gmpo", **_SEQUENCE_MEAN}},
    "sapo": {"loss": {"name": "sapo", **_SEQUENCE_MEAN}},
    "vespo": {"loss": {"name": "vespo"}},
    "topr": {"loss": {"name": "topr", **_CONSTANT_LENGTH}},
    "drpo": {"loss": {"name": "drpo", **_CONSTANT_LENGTH}, "advantage": {"scale": "none"}},
    "dro": {"loss": {"name": "dro"}},
    "prime_rl": {
        # max_ratio is beyond the numerical guard on log r: there is no cap.
        "loss": {
            "name": "dppo_tv",
            "options": {"divergence_low": 0.2, "divergence_high": 0.2, "max_ratio": 5e8, "beta": 2e-3},
        },
        "advantage": {"scale": "none"},
    },
    "dppo_tv": {
        "loss": {"name": "dppo_tv", **_CONSTANT_LENGTH, "options": {"max_ratio": 1e4}},
        "advantage": {"scale": "none"},
    },
    "dppo_kl": {
        "loss": {"name": "dppo_kl", **_CONSTANT_LENGTH, "options": {"max_ratio": 1e4}},
        "advantage": {"scale": "none"},
    },
    "gppo": {"loss": {"name": "gppo", "imitation_coef": 0.1, "options": {"dual_clip": 10.0}}},
    "ce_gppo": {
        "loss": {
            "name": "gppo",
            "imitation_coef": 0.1,
            "options": {"clip_high": 0.2, "keep_low": 0.5, "dual_clip": 10.0},
        }
    },
    "aspo": {"loss": {"name": "aspo"}, "kl": {"coef": 0.001}},
    "luspo": {"loss": {"name": "luspo", **_SEQUENCE_MEAN}},
    "max_rl": {"loss": {"name": "ppo_clip"}, "advantage": {"scale": "mean"}},
    "vcpo": {
        "loss": {"name": "policy_gradient", **_SEQUENCE_MEAN},
        "advantage": {"baseline": "minimum_variance"},
        "correction": {"mode": "truncate", "scope": "sequence", "max_weight": 8.0, "step_scaling": "sqrt"},
    },
}
DEFAULT = "r2vpo"


def resolve(given: Mapping[str, Any]) -> Tree:
    """What is in force of `objective`: the preset that `given` names, under what `given` sets itself.

    Another loss on top of a preset leaves behind those constants of the preset that it does not have. Every keyword
    argument of the loss gets a number: its own default where neither says anything else.

    Args:
      given: nested values of `ObjectiveConfig`; what is None, or absent, is not given.

    Raises:
      ValueError: an unknown preset or loss, or an option that the loss does not take.
    """
    given = without_none(given)
    name = given.get("name", DEFAULT)
    require(name in PRESETS, f"objective.name={name!r} is not a preset; one of {', '.join(sorted(PRESETS))}")
    preset = PRESETS[name]
    loss = given.get("loss", {}).get("name", preset["loss"]["name"])
    try:
        taken, computed = losses.hyperparameters(loss), losses.computed(loss)
    except ValueError as error:
        raise ValueError(f"objective.loss.name={loss!r}: {error}") from error
    if "variance_coef" not in computed:
        preset = {section: value for section, value in preset.items() if section != "dual"}
    tree = merged(preset, given) | {"name": name}
    wanted = given.get("loss", {}).get("options", {})
    foreign = sorted(set(wanted) - set(taken))
    if foreign:
        known = f"it takes {', '.join(taken)}" if taken else "it takes none"
        raise ValueError(f"objective.loss.options.{foreign[0]} is not a hyper-parameter of loss {loss}; {known}")
    constants = {k: v for k, v in preset["loss"].get("options", {}).items() if k in taken}
    tree["loss"]["options"] = Options({**taken, **constants, **wanted})
    return tree


def without_none(tree: Mapping) -> Tree:
    """Nested values without what is None."""
    nested = {k: without_none(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    return {k: v for k, v in nested.items() if v is not None}


def merged(below: Mapping, above: Mapping) -> Tree:
    """Nested values of both; where both say something, `above` holds."""
    result = {k: merged(v, {}) if isinstance(v, Mapping) else v for k, v in below.items()}
    for key, value in above.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, Mapping) else value
    return result
