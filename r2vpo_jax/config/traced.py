"""Numbers of a configuration as traced values: runs that differ in them alone can share a compiled program.

    values = numbers(config)                            # {"optimizer.learning_rate": 1e-4, ...}
    assert structure(other) == structure(config)        # one program for both
    jax.jit(lambda values: run(with_numbers(config, values)))(numbers(other))

A number that is exactly 0 is not traced. 0 turns many things off (an entropy bonus, a KL divergence, weight decay), and
what is off is not in the program; a configuration with 0 therefore has a structure of its own.
"""

import copy
import dataclasses
import typing
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from jaxtyping import Array

from r2vpo_jax import losses
from r2vpo_jax.config.fields import Options, in_force
from r2vpo_jax.config.flags import leaves, to_dict
from r2vpo_jax.config.run import Config

_SECTIONS = ("objective.", "optimizer.")
_FIELDS = ("sampler.temperature",)
# They enter no program: what is drawn, a label, and what the host compares and writes. Programs for many runs pack nothing.
_NOT_STRUCTURE = ("seed", "objective.name", "trainer.max_noise_floor", "trainer.packing")
_NOT_STRUCTURE_SECTIONS = ("alarms.",)


def numbers(config: Config) -> dict[str, float]:
    """The numbers that may be traced, by their dotted paths.

    They are the fields in force of the sections `objective` and `optimizer`, and `sampler.temperature`, that take a
    float and hold a number other than 0. A keyword argument of the loss takes a float if its default is one, or None.
    A loss or an estimator of one's own must not branch on them in Python (docs/extending.md).

    Example:
      >>> numbers(Config())["objective.dual.budget"]
      0.04
    """
    return {
        path: float(value)
        for path, value in _floats(config)
        if (path.startswith(_SECTIONS) or path in _FIELDS) and value is not None and value != 0
    }


def structure(config: Config) -> Hashable:
    """What a compiled program depends on. Configurations of one structure differ in `numbers` and in the seed alone.

    Not compared are fields without effect, the name of the preset (what it stands for is compared), the alarms, the limit
    of the noise floor, and packing, which a program for many runs has none of.

    Returns:
      A hashable key.

    Example:
      >>> from r2vpo_jax.config.run import make_objective
      >>> plain, ours = (Config(objective=make_objective(name)) for name in ("gppo", "ce_gppo"))
      >>> structure(plain) == structure(ours)  # they differ in the constant keep_low
      True
    """
    traced = numbers(config)
    fixed = {path: value for path, value in leaves(to_dict(config)) if path not in (*traced, *_NOT_STRUCTURE)}
    fixed = {path: value for path, value in fixed.items() if not path.startswith(_NOT_STRUCTURE_SECTIONS)}
    return frozenset(traced), frozenset(fixed.items())


def with_numbers(config: Config, values: Mapping[str, float | Array]) -> Config:
    """The same configuration with other numbers, which may be traced.

    Nothing is checked, for a traced number cannot be compared: each run's own configuration was checked when it was made.
    With traced numbers the result is for use inside the traced function only; it is neither hashed nor printed.

    Args:
      config: of the same structure as the configurations that the numbers are of.
      values: some of `numbers(config)`, each a number or f32 [].

    Raises:
      ValueError: a path that is not among `numbers(config)`.

    Example:
      >>> with_numbers(Config(), {"optimizer.learning_rate": 0.5}).optimizer.learning_rate
      0.5
    """
    unknown = sorted(set(values) - set(numbers(config)))
    if unknown:
        raise ValueError(f"{unknown[0]} is not a number of this configuration that may be traced")
    for path, value in values.items():
        config = _replaced(config, path.split("."), value)
    return config


def _floats(node, prefix="") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of the fields in force that take a float."""
    for field, value in in_force(node):
        path = prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _floats(value, f"{path}.")
        elif path == "objective.loss.options":
            defaults = losses.hyperparameters(node.name)
            yield from ((f"{path}.{k}", v) for k, v in value.items() if isinstance(defaults[k], float | None))
        elif float in (field.type, *typing.get_args(field.type)):
            yield path, value


def _replaced(node, path: list[str], value):
    """`node` with another value at the path. `dataclasses.replace` would check it."""
    name, *rest = path
    if isinstance(node, Options):
        return Options({**node, name: value})
    changed = copy.copy(node)
    object.__setattr__(changed, name, _replaced(getattr(node, name), rest, value) if rest else value)
    return changed
