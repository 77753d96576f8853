"""Alarms: signs of a collapse, said once when they have lasted."""

from r2vpo_jax.config import AlarmConfig

VERDICTS = "verdicts"
# Name -> (metric, whether it is too low or too high, field of AlarmConfig, what to do).
_SIGNS = {
    "entropy": ("policy/entropy", "low", "min_entropy", "exploration is over: lower the learning rate or add entropy"),
    "effective_sample_size": (
        "ratio/effective_sample_size",
        "low",
        "min_effective_sample_size",
        "few tokens carry the batch: fewer updates per rollout, fresher data, or a tighter trust region",
    ),
    "ratio_variance": (
        "ratio/variance",
        "high",
        "max_ratio_variance",
        "the policy leaves the data: lower the learning rate, or a tighter trust region",
    ),
    "truncation": ("response/truncated", "high", "max_truncated", "responses do not end: raise the maximal length"),
    "zero_variance": (
        "reward/zero_variance_groups",
        "high",
        "max_zero_variance_groups",
        "hardly any group has a gradient: other problems, or objective.groups.zero_variance=resample",
    ),
    VERDICTS: ("outcome/judged", "low", "min_judged", "most responses have no verdict: events.jsonl has the reasons"),
}
# Name -> metric: where it is 0 there was nothing to measure, and the sign says nothing.
_NEEDS = {
    "entropy": "reward/kept",
    "effective_sample_size": "reward/kept",
    "ratio_variance": "reward/kept",
    "zero_variance": "outcome/judged",
}


class Alarms:
    """Counts for how many iterations in a row each sign has been there. `state` goes into checkpoints."""

    def __init__(self, config: AlarmConfig):
        self._config = config
        self.state: dict[str, int] = dict.fromkeys(_SIGNS, 0)

    def check(self, row: dict) -> list[tuple[str, str]]:
        """(name, line) of each alarm that a metrics row sets off: once, when its sign has lasted long enough."""
        raised = []
        for name, (metric, side, field, advice) in _SIGNS.items():
            if name in _NEEDS and row[_NEEDS[name]] == 0:
                continue
            value, limit = float(row[metric]), getattr(self._config, field)
            bad = not (value >= limit if side == "low" else value <= limit)  # a NaN is bad
            self.state[name] = self.state[name] + 1 if bad else 0
            if self.state[name] == self._config.patience:
                line = f"{metric} = {value:.4g} for {self._config.patience} iterations (limit {limit:g}): {advice}"
                raised.append((name, line))
        return raised

    def is_in_vain(self, row: dict) -> bool:
        """Whether a run had better end: too few verdicts for as long as an alarm takes, and now none at all."""
        return row["outcome/judged"] == 0 and self.state[VERDICTS] >= self._config.patience
