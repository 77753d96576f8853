"""What is optimized: the section `objective`. `presets.resolve` fills it in; these classes check it."""

import dataclasses

from r2vpo_jax import advantages, corrections, dual, kl, losses
from r2vpo_jax.config import presets
from r2vpo_jax.config.fields import Options, is_on, option, require, require_choice, require_range, section


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The policy loss. `options` are the loss function's own keyword arguments, read from its signature."""

    name: str = option("r2vpo", f"{', '.join(losses.names())}, or module:function for a loss of your own")
    reduction: str = option("token_mean", "token_mean, sequence_mean or constant_length")
    entropy_coef: float = option(0.0, "weight of an entropy bonus (0 = off)")
    imitation_coef: float = option(0.0, "weight of the mean -log pi of right responses, beside the loss (0 = off)")
    options: Options = option(Options(), "keyword argument of the loss, explained in its docstring")

    def __post_init__(self):
        require_choice("objective.loss", self, {"reduction": losses.REDUCTIONS})
        require_range("objective.loss", self, "entropy_coef imitation_coef", ">= 0")
        object.__setattr__(self, "options", Options(self.options))
        try:
            losses.check_hyperparameters(self.name, **self.options)
        except ValueError as error:
            raise ValueError(f"objective.loss: {error}") from error


@dataclasses.dataclass(frozen=True)
class DualConfig:
    """The multiplier lambda of the ratio variance, for losses that take a variance coefficient (r2vpo)."""

    adaptive: bool = option(False, "adapt lambda so that the ratio variance V stays at the budget")
    coef: float = option(0.0, "lambda: its initial value if adaptive, else its fixed value")
    budget: float = option(0.04, "delta, bound on V = E[(r-1)^2]", when=lambda s: s.adaptive)
    step: float = option(0.5, "lambda moves by step * (V / budget - 1) per rollout batch", when=lambda s: s.adaptive)
    max_step: float = option(
        1.0, "bound on one move of lambda (of log lambda with the rule multiplicative)", when=lambda s: s.adaptive
    )
    max_coef: float = option(50.0, "cap of lambda", when=lambda s: s.adaptive)
    rule: str = option("projected", "projected or multiplicative", when=lambda s: s.adaptive)
    signal: str = option(
        "auto",
        "absolute (V at the end of the batch), excess (less V at its start), or auto: excess with stale data",
        when=lambda s: s.adaptive,
    )
    measure: str = option(
        "before",
        "which V is at the end of the batch: before (of the last minibatch, before its update), or after the last of N "
        "updates: corrected (before times (N/(N-1))^2), pooled (fitted to all minibatches), after (of the batch scored again)",
        when=lambda s: s.adaptive,
    )
    smoothing: float = option(
        0.0, "share of the old average of V / budget - 1 in the new one (0 = no average)", when=lambda s: s.adaptive
    )
    carry: float = option(
        0.0,
        "what max_step cuts off is moved later, up to this many moves of max_step (0 = it is lost, inf = all of it)",
        when=lambda s: s.adaptive,
    )
    proportional: float = option(
        0.0,
        "lambda moves by this * (V / budget - 1) at once and back, beside its steps (0 = off)",
        when=lambda s: s.adaptive,
    )
    normalize: bool = option(False, "multiply lambda by the root mean square of the advantages")

    def __post_init__(self):
        require_choice(
            "objective.dual",
            self,
            {"rule": dual.RULES, "signal": ("auto", "absolute", "excess"), "measure": dual.MEASURES},
        )
        require_range("objective.dual", self, "coef carry proportional", ">= 0")
        require_range("objective.dual", self, "smoothing", "in [0, 1)")
        require_range("objective.dual", self, "budget step max_step", "> 0")
        require(self.coef < float("inf"), f"objective.dual.coef must be finite, got {self.coef}")
        require(
            self.max_coef >= self.coef or not self.adaptive,
            f"objective.dual.max_coef={self.max_coef} is below objective.dual.coef={self.coef}",
        )


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """From rewards to advantages, with a learned critic for gae."""

    estimator: str = option(
        "group_relative", f"{', '.join(advantages.ESTIMATORS)}, or module:function for an estimator of your own"
    )
    scale: str = option(
        "std",
        "divide by the group's deviation (std, std_biased), by that of the whole batch (batch), by the group's mean "
        "(mean: MaxRL, for rewards >= 0) or by nothing (none)",
        when=lambda s: s._takes("scale"),
    )
    baseline: str = option(
        "estimator",
        "estimator (its own) or minimum_variance: moved to where the gradient's variance is least, at one backward pass for "
        "each response (VCPO)",
    )
    discount: float = option(1.0, "gamma", when=lambda s: s._takes("discount"))
    trace_decay: float = option(0.95, "lambda of GAE", when=lambda s: s._takes("trace_decay"))
    whiten: bool = option(
        True,
        "shift to zero mean and scale to unit deviation over the batch's tokens",
        when=lambda s: s._takes("whiten"),
    )
    value_coef: float = option(0.5, "weight of the value loss", when=lambda s: s.critic)
    value_clip: float = option(
        0.2, "bound on a value's move from the one at sampling (0 = off)", when=lambda s: s.critic
    )

    def __post_init__(self):
        try:
            advantages.estimator(self.estimator)
        except ValueError as error:
            raise ValueError(f"objective.advantage.estimator: {error}") from error
        require_choice(
            "objective.advantage",
            self,
            {"scale": advantages.SCALES, "baseline": ("estimator", "minimum_variance")},
        )
        require_range("objective.advantage", self, "discount trace_decay", "in [0, 1]")
        require_range("objective.advantage", self, "value_coef value_clip", ">= 0")
        require(
            self.baseline == "estimator" or self.group_baseline,
            "objective.advantage.baseline=minimum_variance moves the baseline of a group; with "
            f"objective.advantage.estimator={self.estimator} there is none",
        )

    @property
    def critic(self) -> bool:
        """Whether a value head is learned."""
        return advantages.estimator(self.estimator).critic

    @property
    def group_baseline(self) -> bool:
        """Whether the baseline is the group: a group of equal rewards has no gradient."""
        return advantages.estimator(self.estimator).group_baseline

    @property
    def minimum_variance(self) -> bool:
        """Whether the baseline of each group is moved before a batch is trained on."""
        return self.baseline == "minimum_variance"

    @property
    def by_function(self) -> bool:
        """Whether the reward is needed part by part."""
        return advantages.estimator(self.estimator).parts

    @property
    def takes_verdicts_alone(self) -> bool:
        """Whether nothing may be taken off the reward: a mean to divide by, or parts that are normalized apart."""
        return self.by_function or (self._takes("scale") and self.scale == "mean")

    def _takes(self, option: str) -> bool:
        return option in advantages.estimator(self.estimator).options


@dataclasses.dataclass(frozen=True)
class GroupsConfig:
    """Which responses are learned from, and what is taken off their reward."""

    zero_variance: str = option("keep", "groups of equal rewards: keep, drop, or resample until enough groups differ")
    max_resamples: int = option(
        10, "extra rounds of sampling per iteration", when=lambda s: s.zero_variance == "resample"
    )
    verifier_errors: str = option(
        "abstain", "responses without a verdict: abstain (no reward, no gradient) or wrong (reward 0)"
    )
    truncated: str = option("keep", "responses without an end: keep, or mask (they count in the baseline only)")
    overlong_penalty: float = option(0.0, "taken off the reward at the maximal length (0 = off)")
    overlong_buffer: float = option(
        0.2, "last share of the maximal length, over which the penalty grows", when=lambda s: s.overlong_penalty > 0
    )

    def __post_init__(self):
        require_choice(
            "objective.groups",
            self,
            {
                "zero_variance": ("keep", "drop", "resample"),
                "verifier_errors": ("abstain", "wrong"),
                "truncated": ("keep", "mask"),
            },
        )
        require_range("objective.groups", self, "max_resamples", ">= 1")
        require_range("objective.groups", self, "overlong_penalty", ">= 0")
        require_range("objective.groups", self, "overlong_buffer", "in [0, 1]")
        require(
            self.overlong_penalty == 0 or self.overlong_buffer > 0,
            "objective.groups.overlong_penalty needs overlong_buffer > 0",
        )


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """A KL divergence, as a penalty in the loss or in the reward."""

    coef: float = option(0.0, "beta, weight of the divergence (0 = off); the initial weight if there is a target")
    to: str = option(
        "reference",
        "reference (the frozen base model) or behavior (the policy that sampled)",
        when=lambda s: s.coef > 0,
    )
    where: str = option("loss", "loss or reward", when=lambda s: s.coef > 0)
    estimator: str = option("k3", "k1, k2 or k3", when=lambda s: s.coef > 0)
    corrected: bool = option(
        False, "multiply the estimate by the ratio, which makes it unbiased off-policy", when=lambda s: s.coef > 0
    )
    target: float | None = option(
        None, "adapt beta so that the divergence stays near this (default: beta is fixed)", when=lambda s: s.coef > 0
    )

    def __post_init__(self):
        require_choice(
            "objective.kl",
            self,
            {"to": ("reference", "behavior"), "where": ("loss", "reward"), "estimator": kl.ESTIMATORS},
        )
        require_range("objective.kl", self, "coef", ">= 0")
        require_range("objective.kl", self, "target", "> 0")
        require(self.target is None or self.coef > 0, "objective.kl.target adapts objective.kl.coef, which must be > 0")
        require(
            self.to == "reference" or (self.where == "loss" and not self.corrected),
            "objective.kl.to=behavior goes into the loss, without objective.kl.corrected: its estimate is over tokens of the "
            "policy that sampled, and is weighed by itself where objective.correction takes the ratio against another",
        )
        require(
            self.where == "loss" or not self.corrected,
            "objective.kl.corrected is for objective.kl.where=loss: in the reward the tokens are the sampling policy's own",
        )


@dataclasses.dataclass(frozen=True)
class CorrectionConfig:
    """Importance weights of the learner's policy against the sampler's, responses left out for them, and shorter steps."""

    mode: str = option("none", "none, truncate or mask")
    scope: str = option("token", "token or sequence", when=lambda s: s.mode != "none")
    max_weight: float = option(
        2.0, "upper bound of the weights (inf: none, with truncate)", when=lambda s: s.mode != "none"
    )
    min_weight: float = option(0.0, "lower bound of the weights", when=lambda s: s.mode == "mask")
    filter: str = option(
        "none",
        "leave out whole responses, once before the first update: none, geometric (geometric mean of the tokens' weights "
        "within bounds), mean_k3 or max_k2 (trust region masking)",
    )
    filter_high: float | None = option(
        None,
        "upper bound of the filter's measure (default: a ratio of 1.001 for geometric, 0.01 nats for mean_k3)",
        when=lambda s: s.filter != "none",
    )
    filter_low: float = option(0.999, "lower bound of the filter's measure", when=lambda s: s.filter == "geometric")
    off_policy_threshold: float = option(
        0.0,
        "leave out bad responses that the policy has left behind, in each update: those whose mean log-probability fell by "
        "more than this, nats per token (DeepSeek-V3.2; 0 = off)",
    )
    step_scaling: str = option(
        "none", "shorten steps on stale responses by their effective sample size: none, sqrt or linear (VCPO)"
    )
    step_reference: float = option(
        1.0, "effective sample size, as a share, at which a step is whole", when=lambda s: s.step_scaling != "none"
    )

    def __post_init__(self):
        require_choice(
            "objective.correction",
            self,
            {
                "mode": ("none", *corrections.MODES),
                "scope": corrections.SCOPES,
                "filter": ("none", *corrections.FILTERS),
                "step_scaling": ("none", *corrections.STEP_SCALINGS),
            },
        )
        require_range("objective.correction", self, "max_weight", ">= 1")
        require_range("objective.correction", self, "min_weight filter_low", "in [0, 1]")
        require_range("objective.correction", self, "filter_high", "> 0")
        require_range("objective.correction", self, "off_policy_threshold", ">= 0")
        require_range("objective.correction", self, "step_reference", "in (0, 1]")
        require(
            self.filter != "geometric" or self.filter_bound >= 1,
            f"objective.correction.filter_high={self.filter_high} bounds a ratio with filter=geometric, and must be >= 1",
        )
        require(
            self.filter != "max_k2" or self.filter_high is not None,
            "objective.correction.filter=max_k2 has no published bound: set objective.correction.filter_high, in nats",
        )

    @property
    def filter_bound(self) -> float | None:
        """The upper bound of the filter: what was given, or the usual one."""
        return {"geometric": 1.001, "mean_k3": 0.01}.get(self.filter) if self.filter_high is None else self.filter_high

    @property
    def weighs(self) -> bool:
        """Whether a batch is scored before its first update, and its tokens weighed."""
        return self.mode != "none" or self.filter != "none"

    @property
    def leaves_out(self) -> bool:
        """Whether whole responses may have weight 0."""
        return self.filter != "none" or self.masks_off_policy

    @property
    def masks_off_policy(self) -> bool:
        """Whether bad responses are left out once the policy has left them behind."""
        return is_on(self.off_policy_threshold)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimized. `name` picks a preset; docs/algorithms/objectives.md explains each."""

    name: str = option(presets.DEFAULT, f"preset: {', '.join(presets.PRESETS)}")
    loss: LossConfig = section(LossConfig)
    dual: DualConfig = section(DualConfig, when=lambda s: s.has_multiplier)
    advantage: AdvantageConfig = section(AdvantageConfig)
    groups: GroupsConfig = section(GroupsConfig)
    kl: KLConfig = section(KLConfig)
    correction: CorrectionConfig = section(CorrectionConfig)

    def __post_init__(self):
        require(
            not self.dual.adaptive or self.has_multiplier,
            "objective.dual.adaptive needs a loss with a variance coefficient, such as r2vpo; the loss is "
            f"{self.loss.name}",
        )
        require(
            self.groups.zero_variance == "keep" or self.advantage.group_baseline,
            f"objective.groups.zero_variance={self.groups.zero_variance} needs a baseline from the group; with "
            f"objective.advantage.estimator={self.advantage.estimator} a group of equal rewards has a gradient",
        )
        require(
            not self.advantage.takes_verdicts_alone
            or not (self.has_overlong_penalty or (self.has_kl and self.kl.where == "reward")),
            "nothing may be taken off the reward (objective.groups.overlong_penalty, objective.kl.where=reward) with "
            "objective.advantage.scale=mean or objective.advantage.estimator=gdpo",
        )

    @property
    def has_multiplier(self) -> bool:
        """Whether the loss takes a variance coefficient."""
        return "variance_coef" in losses.computed(self.loss.name)

    @property
    def variance_budget(self) -> float | None:
        """delta, if there is one that V is held at."""
        return self.dual.budget if self.dual.adaptive else None

    @property
    def measures_after(self) -> bool:
        """Whether V is measured over again, on the whole batch, after its last update."""
        return self.dual.adaptive and self.dual.measure == "after"

    @property
    def critic(self) -> bool:
        """Whether a value head is learned."""
        return self.advantage.critic

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities under the frozen base model are needed."""
        return self.has_kl and self.kl.to == "reference"

    @property
    def has_kl(self) -> bool:
        """Whether a KL divergence is penalized."""
        return is_on(self.kl.coef)

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether entropy is rewarded."""
        return is_on(self.loss.entropy_coef)

    @property
    def imitates(self) -> bool:
        """Whether the log-probability of right responses is rewarded beside the loss."""
        return is_on(self.loss.imitation_coef)

    @property
    def has_overlong_penalty(self) -> bool:
        """Whether long responses lose a part of their reward."""
        return is_on(self.groups.overlong_penalty)
