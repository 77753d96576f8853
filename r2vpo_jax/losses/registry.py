"""Objectives by name: the built-in ones, and a user's own by its import path."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from r2vpo_jax.losses import clipped, penalized, sequence, soft
from r2vpo_jax.losses.core import Loss

_COMMON = ("logp", "behavior_logp", "advantages", "mask", "weights", "reduction", "normalizer")
_MULTIPLIER = "variance_coef"


@dataclasses.dataclass(frozen=True)
class _Row:
    function: Callable[..., Loss]
    computed: tuple[str, ...] = ()  # arguments that training computes, from its state or from a whole minibatch


_LOSSES = {
    "r2vpo": _Row(penalized.r2vpo_loss, computed=(_MULTIPLIER,)),
    "policy_gradient": _Row(penalized.policy_gradient_loss),
    "ppo_clip": _Row(clipped.ppo_clip_loss),
    "cispo": _Row(clipped.cispo_loss),
    "gspo": _Row(sequence.gspo_loss),
    "spo": _Row(penalized.spo_loss),
    "m2po": _Row(clipped.m2po_loss, computed=("threshold",)),
    "gmpo": _Row(sequence.gmpo_loss),
    "sapo": _Row(soft.sapo_loss),
    "vespo": _Row(soft.vespo_loss),
    "topr": _Row(soft.topr_loss),
    "drpo": _Row(penalized.drpo_loss),
    "dro": _Row(penalized.dro_loss),
    "dppo_tv": _Row(clipped.dppo_tv_loss),
    "dppo_kl": _Row(clipped.dppo_kl_loss),
    "gppo": _Row(clipped.gppo_loss),
    "aspo": _Row(clipped.aspo_loss),
    "luspo": _Row(sequence.luspo_loss),
}


def names() -> tuple[str, ...]:
    """The names of the built-in objectives."""
    return tuple(_LOSSES)


def get(name: str) -> Callable[..., Loss]:
    """The objective of that name, or a function of your own as "module:function"; `Alternatives` are given back.

    Every argument beyond the arrays has a default, except `variance_coef` where an objective has that one. An
    objective of your own takes the arguments that all objectives take, by their names, and may take
    `variance_coef`, the multiplier that training adapts.

    Raises:
      ValueError: no such objective, module or function; or a function with another signature.
    """
    return _row(name).function


def computed(name: str) -> tuple[str, ...]:
    """The arguments of an objective that training computes, so that no configuration sets them.

    `variance_coef` is the multiplier of the dual state, `threshold` is `m2po_threshold` of the whole minibatch.

    Raises:
      ValueError: as `get`.
    """
    return _row(name).computed


def hyperparameters(name: str) -> dict[str, Any]:
    """The arguments of an objective that a user sets, with their defaults, in the order of its signature.

    Raises:
      ValueError: as `get`.
    """
    row = _row(name)
    if not isinstance(name, str):
        return name.hyperparameters()
    taken = inspect.signature(row.function).parameters
    return {k: p.default for k, p in taken.items() if k not in (*_COMMON, *row.computed)}


def check_hyperparameters(name: str, /, **values) -> None:
    """Check values for an objective's hyper-parameters. Nothing is computed.

    Args:
      name: as for `get`.
      **values: some of `hyperparameters(name)`, as plain numbers and strings.

    Raises:
      ValueError: an argument that the objective does not take, a value of another type than the default (a default
        of None stands for an optional number), or one out of range: the message is then the objective's own.
    """
    row, known = _row(name), hyperparameters(name)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{key} is not a hyper-parameter of loss {name}; it takes {', '.join(known) or 'none'}")
        if not _same_kind(value, known[key]):
            raise ValueError(f"{key} must be of the type of its default {known[key]!r}, got {value!r}")
    given = dict.fromkeys(row.computed, 1.0) | values
    token = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jax.eval_shape(lambda x: row.function(x, x, x, x, normalizer=1.0, **given), token)


def _same_kind(value, default):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if default is None:
        return value is None or is_number
    if isinstance(default, int | float) and not isinstance(default, bool):
        return is_number
    return isinstance(value, type(default))


def _row(name):
    if not isinstance(name, str):  # Alternatives
        return _Row(name, name.computed())
    if name in _LOSSES:
        return _LOSSES[name]
    if ":" in name:
        return _imported(name)
    raise ValueError(f"unknown objective {name!r}; one of {', '.join(_LOSSES)}, or module:function")


def import_own(path: str, what: str) -> Callable:
    """What a user's "module:name" names.

    Args:
      path: importable from where the program was started.
      what: what it is to be, for messages: "objective".

    Raises:
      ValueError: it is not of that form, or there is no such module, or nothing callable of that name in it.
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ValueError(f"{what} {path!r} is not of the form module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something that it imports itself
        raise ValueError(f"{what} {path!r}: there is no module {module_name!r}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{what} {path!r}: module {module_name!r} has no function or class {name!r}")
    return found


def _imported(name):
    function = import_own(name, "objective")
    parameters = inspect.signature(function).parameters
    missing = [k for k in _COMMON if k not in parameters]
    if missing:
        raise ValueError(f"objective {name!r} does not take {', '.join(missing)}, which all objectives take")
    own = {k: p for k, p in parameters.items() if k not in (*_COMMON, _MULTIPLIER)}
    without_default = [k for k, p in own.items() if p.default is inspect.Parameter.empty]
    if without_default:
        raise ValueError(f"objective {name!r} has no default for {', '.join(without_default)}")
    return _Row(function, computed=(_MULTIPLIER,) if _MULTIPLIER in parameters else ())
