"""The configuration of what is optimized, and the presets that `objective.name` picks.

A preset sets loss, advantage, reduction and constants together, as its source does. Fields that are left None
take the preset's value, then the common default; a hyper-parameter that is then still None has the default of the
loss function itself. A hyper-parameter that the chosen loss does not have is refused.
"""

import dataclasses
from typing import Any

from r2vpo_jax import advantages, corrections, dual, kl, losses

ADVANTAGES = ("group_relative", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline", "gae")
# Estimators whose baseline is the group: a group of equal rewards has no gradient.
GROUP_ADVANTAGES = ("group_relative", "leave_one_out", "reinforce_pp_baseline")
_FIELD_OF = {"budget": "m2_budget"}  # the field of a hyper-parameter, where the names differ

_DEFAULTS = {
    "reduction": "token_mean",
    "adaptive": False,
    "variance_coef": 0.0,
    "variance_budget": 0.04,
    "dual_step": 0.5,
    "dual_max_step": 1.0,
    "dual_rule": "projected",
    "dual_signal": "auto",
    "max_variance_coef": 50.0,
    "normalize_variance_coef": False,
    "m2_budget": 0.04,
    "advantage": "group_relative",
    "advantage_scale": "std",
    "discount": 1.0,
    "trace_decay": 0.95,
    "whiten_advantages": True,
    "value_coef": 0.5,
    "value_clip": 0.2,
    "zero_variance": "keep",
    "max_resamples": 10,
    "verifier_errors": "abstain",
    "truncated": "keep",
    "overlong_buffer": 0.2,
    "overlong_penalty": 0.0,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "kl_to": "reference",
    "kl_in": "loss",
    "kl_estimator": "k3",
    "kl_corrected": False,
    "correction": "none",
    "correction_scope": "token",
    "max_weight": 2.0,
    "min_weight": 0.0,
}
# Sources of the constants: the docstrings of the loss functions, and docs/algorithms/objectives.md.
PRESETS: dict[str, dict[str, Any]] = {
    "r2vpo": {"loss": "r2vpo", "adaptive": True, "variance_coef": 1.0},
    "r2vpo_fixed": {"loss": "r2vpo", "variance_coef": 2.5},
    "policy_gradient": {"loss": "policy_gradient"},
    "ppo_clip": {"loss": "ppo_clip"},
    "grpo": {"loss": "ppo_clip", "reduction": "sequence_mean", "kl_coef": 0.04},
    "dr_grpo": {"loss": "ppo_clip", "reduction": "constant_length", "advantage_scale": "none"},
    "dapo": {"loss": "ppo_clip", "clip_high": 0.28, "zero_variance": "resample", "overlong_penalty": 1.0},
    "rloo": {
        "loss": "policy_gradient",
        "reduction": "constant_length",
        "advantage": "leave_one_out",
        "kl_coef": 0.05,
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
    "reinforce_pp": {
        "loss": "ppo_clip",
        "advantage": "reinforce_pp",
        "kl_coef": 0.01,
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
    "reinforce_pp_baseline": {
        "loss": "ppo_clip",
        "advantage": "reinforce_pp_baseline",
        "kl_coef": 0.01,
        "kl_estimator": "k2",
    },
    "ppo": {"loss": "ppo_clip", "advantage": "gae"},
    "ppo_kl": {"loss": "policy_gradient", "kl_coef": 1.0, "kl_to": "behavior", "kl_target": 0.01},
    "cispo": {"loss": "cispo"},
    "gspo": {"loss": "gspo", "reduction": "sequence_mean"},
    "spo": {"loss": "spo"},
    "m2po": {"loss": "m2po"},
    "gmpo": {"loss": "gmpo", "reduction": "sequence_mean"},
    "sapo": {"loss": "sapo", "reduction": "sequence_mean"},
    "vespo": {"loss": "vespo"},
    "topr": {"loss": "topr", "reduction": "constant_length"},
    "drpo": {"loss": "drpo"},
    "dro": {"loss": "dro"},
    "prime_rl": {
        "loss": "dppo_tv",
        "advantage_scale": "none",
        "divergence_low": 0.2,
        "divergence_high": 0.2,
        "max_ratio": 5e8,  # beyond the numerical guard on log r: none
        "beta": 2e-3,
    },
    "dppo_tv": {"loss": "dppo_tv", "reduction": "constant_length"},
    "dppo_kl": {"loss": "dppo_kl", "reduction": "constant_length"},
    "gppo": {"loss": "gppo"},
    "ce_gppo": {"loss": "gppo", "keep_low": 0.5},
    "aspo": {"loss": "aspo"},
    "luspo": {"loss": "luspo", "reduction": "sequence_mean"},
}


def option(default, help):
    """A dataclass field with its line of help."""
    return dataclasses.field(default=default, metadata={"help": help})


def require(condition, message):
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimized. `name` picks a preset; docs/algorithms has a paragraph on each."""

    name: str = option("r2vpo", f"preset: {', '.join(PRESETS)}")
    loss: str | None = option(None, "objective of losses.get")
    reduction: str | None = option(None, "token_mean, sequence_mean or constant_length")

    adaptive: bool | None = option(None, "r2vpo: adapt the variance coefficient by dual ascent")
    variance_coef: float | None = option(None, "r2vpo: lambda, initial value if adaptive, else the fixed value")
    variance_budget: float | None = option(None, "r2vpo: delta, bound on E[(r-1)^2]")
    dual_step: float | None = option(None, "r2vpo: c, lambda moves by c * (V / delta - 1) a rollout")
    dual_max_step: float | None = option(None, "r2vpo: bound on one move of lambda (of log lambda: multiplicative)")
    dual_rule: str | None = option(None, "r2vpo: projected or multiplicative")
    max_variance_coef: float | None = option(None, "r2vpo: cap of lambda")
    dual_signal: str | None = option(
        None, "r2vpo: V of the last minibatch (absolute), less that of the first (excess), or auto"
    )
    normalize_variance_coef: bool | None = option(None, "r2vpo: multiply lambda by the advantages' deviation")
    penalty_scope: str | None = option(None, "r2vpo: token or sequence")

    clip_low: float | None = option(None, "ppo_clip, gspo, luspo, gppo, aspo: distance of the lower bound from 1")
    clip_high: float | None = option(None, "ppo_clip, gspo, luspo, gppo, aspo: distance of the upper bound from 1")
    dual_clip: float | None = option(None, "ppo_clip, gppo, aspo: bound c > 1 for negative advantages")
    min_ratio: float | None = option(None, "cispo: lower bound of the weight")
    max_ratio: float | None = option(None, "cispo, topr, dppo_tv, dppo_kl: upper bound of the weight")
    epsilon: float | None = option(None, "spo, drpo: where the gradient turns back")
    beta: float | None = option(None, "dro, dppo_tv: weight of (log r)^2 / 2")
    m2_budget: float | None = option(None, "m2po: bound on the second moment of log r")
    log_clip: float | None = option(None, "gmpo: bound of |log r|")
    keep_low: float | None = option(None, "gppo: share of the gradient kept below the clip")
    keep_high: float | None = option(None, "gppo: share of the gradient kept above the clip")
    divergence_low: float | None = option(None, "dppo_tv, dppo_kl: largest divergence of a fall")
    divergence_high: float | None = option(None, "dppo_tv, dppo_kl: largest divergence of a rise")
    tau_positive: float | None = option(None, "sapo: temperature for A > 0")
    tau_negative: float | None = option(None, "sapo: temperature for A <= 0")
    power_positive: float | None = option(None, "vespo: k for A >= 0")
    decay_positive: float | None = option(None, "vespo: lambda for A >= 0")
    power_negative: float | None = option(None, "vespo: k for A < 0")
    decay_negative: float | None = option(None, "vespo: lambda for A < 0")

    advantage: str | None = option(None, "group_relative, leave_one_out, reinforce_pp, reinforce_pp_baseline or gae")
    advantage_scale: str | None = option(None, "group_relative: std, std_biased or none")
    discount: float | None = option(None, "gae, reinforce_pp: gamma")
    trace_decay: float | None = option(None, "gae: lambda")
    whiten_advantages: bool | None = option(None, "gae: zero mean and unit deviation over the batch's tokens")
    value_coef: float | None = option(None, "gae: weight of the value loss")
    value_clip: float | None = option(None, "gae: bound on a value's move from the one at sampling; 0 is off")

    zero_variance: str | None = option(None, "groups of equal rewards: keep, drop, or resample until enough differ")
    max_resamples: int | None = option(None, "resample: extra rounds of sampling an iteration")
    verifier_errors: str | None = option(None, "no verdict: abstain (no reward, no gradient) or wrong (reward 0)")
    truncated: str | None = option(None, "responses without an end: keep, or mask (they count in the baseline only)")
    overlong_buffer: float | None = option(None, "last share of the maximal length over which the penalty grows")
    overlong_penalty: float | None = option(None, "taken off the reward at the maximal length; 0 is off")
    entropy_coef: float | None = option(None, "weight of an entropy bonus; 0 is off")

    kl_coef: float | None = option(None, "beta, weight of a KL divergence; 0 is off; the initial one with kl_target")
    kl_to: str | None = option(None, "reference (the frozen base model) or behavior (the policy that sampled)")
    kl_in: str | None = option(None, "loss or reward")
    kl_estimator: str | None = option(None, "k1, k2 or k3")
    kl_corrected: bool | None = option(None, "multiply the estimate by the ratio: unbiased off-policy")
    kl_target: float | None = option(None, "adapt beta so that the divergence stays near this; default fixed")

    correction: str | None = option(None, "importance weights of sampler against learner: none, truncate or mask")
    correction_scope: str | None = option(None, "token or sequence")
    max_weight: float | None = option(None, "correction: upper bound of the weights")
    min_weight: float | None = option(None, "correction=mask: lower bound of the weights")

    def __post_init__(self):
        require(
            self.name in PRESETS, f"objective.name={self.name!r} is not a preset; one of {', '.join(sorted(PRESETS))}"
        )
        preset = {**_DEFAULTS, **PRESETS[self.name]}
        object.__setattr__(self, "loss", self.loss or preset["loss"])
        for f in dataclasses.fields(self):
            # Another loss on top of a preset leaves behind those constants of the preset that it does not have.
            foreign = f.name in _LOSS_HYPERPARAMETERS and f.name not in _taken_by(self.loss)
            if getattr(self, f.name) is None and not foreign:
                object.__setattr__(self, f.name, preset.get(f.name))
        self._check_choices()
        self._check_numbers()
        self._check_combinations()
        self._check_hyperparameters()

    @property
    def critic(self) -> bool:
        """Whether a value head is learned."""
        return self.advantage == "gae"

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities under the frozen base model are needed."""
        return self.kl_coef > 0 and self.kl_to == "reference"

    def hyperparameters(self) -> dict[str, Any]:
        """The keyword arguments of the loss that are set: what is None keeps the loss function's default."""
        fields = {n: _FIELD_OF.get(n, n) for n in losses.hyperparameters(self.loss)}
        return {n: getattr(self, field) for n, field in fields.items() if getattr(self, field) is not None}

    def _check_choices(self):
        for name, known in (
            ("loss", losses.names()),
            ("reduction", losses.REDUCTIONS),
            ("dual_rule", dual.RULES),
            ("dual_signal", ("auto", "absolute", "excess")),
            ("advantage", ADVANTAGES),
            ("advantage_scale", advantages.SCALES),
            ("zero_variance", ("keep", "drop", "resample")),
            ("verifier_errors", ("abstain", "wrong")),
            ("truncated", ("keep", "mask")),
            ("kl_to", ("reference", "behavior")),
            ("kl_in", ("loss", "reward")),
            ("kl_estimator", kl.ESTIMATORS),
            ("correction", ("none", *corrections.MODES)),
            ("correction_scope", corrections.SCOPES),
        ):
            value = getattr(self, name)
            require(value in known, f"objective.{name}={value!r} is unknown; one of {', '.join(known)}")

    def _check_numbers(self):
        for names, holds, range_ in (
            ("variance_coef kl_coef entropy_coef value_coef value_clip overlong_penalty", lambda v: v >= 0, ">= 0"),
            ("variance_budget dual_step dual_max_step m2_budget kl_target", lambda v: v > 0, "> 0"),
            ("discount trace_decay overlong_buffer min_weight", lambda v: 0 <= v <= 1, "in [0, 1]"),
            ("max_resamples max_weight", lambda v: v >= 1, ">= 1"),
        ):
            for name in names.split():
                value = getattr(self, name)
                require(value is None or holds(value), f"objective.{name} must be {range_}, got {value}")
        require(
            self.max_variance_coef >= self.variance_coef,
            f"objective.max_variance_coef={self.max_variance_coef} is below variance_coef={self.variance_coef}",
        )

    def _check_combinations(self):
        require(
            not self.adaptive or self.loss == "r2vpo",
            f"objective.adaptive needs loss r2vpo, which has a variance coefficient; the loss is {self.loss}",
        )
        require(
            self.zero_variance == "keep" or self.advantage in GROUP_ADVANTAGES,
            f"objective.zero_variance={self.zero_variance} needs a baseline from the group; with advantage="
            f"{self.advantage} a group of equal rewards has a gradient",
        )
        require(self.kl_target is None or self.kl_coef > 0, "objective.kl_target adapts kl_coef, which must be > 0")
        require(
            self.kl_to == "reference" or (self.kl_in == "loss" and not self.kl_corrected),
            "objective.kl_to=behavior goes into the loss, and needs no correction: its tokens are the behavior's own",
        )
        require(
            self.kl_in == "loss" or not self.kl_corrected,
            "objective.kl_corrected is for kl_in=loss: in the reward the tokens are the sampling policy's own",
        )
        require(
            self.overlong_penalty == 0 or self.overlong_buffer > 0,
            "objective.overlong_penalty needs overlong_buffer > 0",
        )

    def _check_hyperparameters(self):
        """Refuse what the loss does not take; the ranges are the loss function's own checks."""
        for name in sorted(_LOSS_HYPERPARAMETERS - _taken_by(self.loss)):
            require(getattr(self, name) is None, f"objective.{name} is not a hyper-parameter of loss {self.loss}")
        try:
            losses.check_hyperparameters(self.loss, **self.hyperparameters())
        except ValueError as error:
            raise ValueError(f"objective: {error}") from error


def _taken_by(loss: str) -> set[str]:
    """The fields that are hyper-parameters of a loss."""
    return {_FIELD_OF.get(n, n) for n in losses.hyperparameters(loss)} if loss in losses.names() else set()


_LOSS_HYPERPARAMETERS = set().union(*map(_taken_by, losses.names()))
