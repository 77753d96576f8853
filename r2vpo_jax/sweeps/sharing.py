"""Which runs share a compiled program: those of one structure, and those that differ in the objective besides.

Objectives are cheap beside the model, so a program can have several and pick one by a traced number
(`losses.Alternatives`). With an adaptive multiplier among them all runs have one: where it should be constant its steps
are too small to change it, and where there is none it multiplies nothing.
"""

import copy
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from r2vpo_jax import losses
from r2vpo_jax.config import Config, traced
from r2vpo_jax.config.fields import Options
from r2vpo_jax.config.flags import leaves, to_dict
from r2vpo_jax.sweeps.program import Measured
from r2vpo_jax.training.learner import settings_of

_NOTHING = 1e-30  # in place of 0, which is not traced; added to a multiplier it changes no float32
_OPTIONS = "objective.loss.options."
_DUAL = "objective.dual."


def families(configs: Mapping[str, Config]) -> list["Family"]:
    """The runs that share a program, for each program; all in the order given.

    Args:
      configs: name -> configuration.
    """
    found: dict = {}
    for name, config in configs.items():
        found.setdefault(_apart_from_the_objective(config), {})[name] = config
    return [Family(members) for alike in found.values() for members in _by_multiplier(alike)]


class Family:
    """Runs that share a program.

    Attributes:
      configs: name -> configuration.
      config: what the program is made of; that of every run, if all are of one structure.
    """

    def __init__(self, configs: Mapping[str, Config]):
        self.configs = dict(configs)
        first = next(iter(self.configs.values()))
        self._plain = len({traced.structure(config) for config in self.configs.values()}) == 1
        self.config = first
        if self._plain:
            return
        self._alternatives = list(dict.fromkeys(_alternative(config) for config in self.configs.values()))
        # A multiplier that adapts before one that does not, before none: what it can do, all can be given.
        leader = max(self.configs.values(), key=lambda c: (c.objective.dual.adaptive, c.objective.has_multiplier))
        options = {"which": 1.0}
        for config in reversed(self.configs.values()):
            options |= self._options(config)
        loss = _changed(
            leader.objective.loss,
            name=losses.Alternatives(*zip(*self._alternatives, strict=True)),
            options=Options(options),
        )
        self.config = _changed(first, objective=_changed(first.objective, loss=loss, dual=leader.objective.dual))
        self._numbers = traced.numbers(self.config)

    def numbers(self, name: str) -> dict[str, float]:
        """The traced numbers of a run, by path."""
        config = self.configs[name]
        own = traced.numbers(config)
        if self._plain:
            return own
        objective, result = config.objective, dict(self._numbers)
        result |= {path: value for path, value in own.items() if not path.startswith(_OPTIONS)}
        result |= {_OPTIONS + key: value for key, value in self._options(config).items()}
        result[f"{_OPTIONS}which"] = float(self._place(config))
        if not objective.dual.adaptive:
            result |= {f"{_DUAL}{field}": _NOTHING for field in ("coef", "step", "max_step")}
        if objective.has_multiplier and not objective.dual.adaptive:
            coef = objective.dual.coef or _NOTHING
            result |= {f"{_DUAL}coef": coef, f"{_DUAL}max_coef": max(coef, result.get(f"{_DUAL}max_coef", 0.0))}
        return {path: result[path] for path in self._numbers}

    def own(self, name: str, measured: Measured) -> Measured:
        """What a run alone would have measured: nothing that only others of the program report."""
        if self._plain:
            return measured
        config, report = self.configs[name], measured.report
        objective = config.objective
        foreign = frozenset().union(*map(_reported, self._alternatives)) - _reported(_alternative(config))
        sums = {key: value for key, value in report.stats.sums.items() if key not in foreign}
        report = report.replace(stats=report.stats.replace(sums=sums))
        if not objective.measures_after:
            last = report.variance_last
            signal = last - report.variance_first if settings_of(config).excess else last
            report = report.replace(variance_after=None, dual_signal=signal)
        coef = measured.variance_coef if objective.has_multiplier else measured.variance_coef * 0
        return measured.replace(report=report, variance_coef=coef)

    def _place(self, config: Config) -> int:
        return 1 + self._alternatives.index(_alternative(config))

    def _options(self, config: Config) -> dict[str, float]:
        """The traced hyper-parameters of its loss, by their names among the alternatives."""
        name, constants = _alternative(config)
        fixed, place = dict(constants), self._place(config)
        given = config.objective.loss.options
        return {f"{place}{losses.SEPARATOR}{key}": float(value) for key, value in given.items() if key not in fixed}


def _apart_from_the_objective(config: Config):
    """A key: equal for runs that can share a program."""
    numbers, fixed = traced.structure(config)
    name = config.objective.loss.name
    # A threshold of a whole minibatch would cost every run another pass of the model.
    if name not in losses.names() or "threshold" in losses.computed(name):
        return numbers, fixed
    ours = ("objective.loss.name", _OPTIONS, _DUAL)
    return (
        frozenset(path for path in numbers if not path.startswith(ours)),
        frozenset(item for item in fixed if not item[0].startswith(ours)),
    )


def _by_multiplier(alike: dict[str, Config]) -> list[dict[str, Config]]:
    """The same runs, apart where the multiplier works in another way: a family for each way to adapt it.

    Runs with a constant multiplier go where the scale of theirs is the same, those without one anywhere.
    """
    found: dict = {}

    def join(name, config, key, scale):
        found.setdefault(key, (scale, {}))[1][name] = config

    for name, config in alike.items():
        if config.objective.dual.adaptive:
            join(name, config, frozenset(_dual(config).items()), config.objective.dual.normalize)
    for name, config in alike.items():
        scale = config.objective.dual.normalize
        if config.objective.has_multiplier and not config.objective.dual.adaptive:
            key = next((key for key, (other, _) in found.items() if other == scale), scale)
            join(name, config, key, scale)
    for name, config in alike.items():
        if not config.objective.has_multiplier:
            join(name, config, next(iter(found), None), None)
    order = list(alike)
    return [dict(sorted(members.items(), key=lambda item: order.index(item[0]))) for _, members in found.values()]


def _dual(config: Config) -> dict:
    """How a multiplier adapts, apart from traced numbers; of these, which there are."""
    numbers = traced.numbers(config)
    return {
        path: None if path in numbers else value for path, value in leaves(to_dict(config)) if path.startswith(_DUAL)
    }


def _alternative(config: Config) -> tuple[str, tuple]:
    """(name, constants) of its loss: hyper-parameters that are not traced are part of what it is."""
    loss, numbers = config.objective.loss, traced.numbers(config)
    return loss.name, tuple((key, value) for key, value in loss.options.items() if _OPTIONS + key not in numbers)


@functools.cache
def _reported(alternative) -> frozenset[str]:
    """The statistics that a loss reports."""
    name, constants = alternative
    given = dict.fromkeys(losses.computed(name), 1.0) | dict(constants)
    token = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    _, stats = jax.eval_shape(lambda x: losses.get(name)(x, x, x, x, normalizer=1.0, **given), token)
    return frozenset(stats)


def _changed(node, **values):
    """A section with other values, unchecked: a program's configuration need not be one that a user could give."""
    changed = copy.copy(node)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed
