"""What every section of a configuration is made of: fields with a line of help, and checks."""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


def option(default, help: str, *, when: Callable[[Any], bool] | None = None, derived: bool = False):
    """A dataclass field with its line of help.

    Args:
      default: immutable; `Options()` for keyword arguments.
      help: a line.
      when: of the section; whether the field has any effect. Default: always.
      derived: whether the default depends on other fields (`flags.from_dict` computes it where nothing is given).
    """
    metadata = {"help": help, "when": when, "derived": derived}
    if isinstance(default, Options):
        return dataclasses.field(default_factory=Options, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type | Callable[[], Any], *, when: Callable[[Any], bool] | None = None):
    """A dataclass field that is a section of its own; `when` as for `option`."""
    return dataclasses.field(default_factory=kind, metadata={"when": when})


def default_of(field: dataclasses.Field):
    """The value that a field has unless another is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def in_force(node) -> Iterator[tuple[dataclasses.Field, Any]]:
    """The fields of a section that have an effect, with their values."""
    for field in dataclasses.fields(node):
        when = field.metadata.get("when")
        if when is None or when(node):
            yield field, getattr(node, field.name)


class Options(dict):
    """Keyword arguments as a part of a frozen configuration: a dict that is never changed, and so can be hashed."""

    def __hash__(self):
        return hash(frozenset(self.items()))


def is_on(value) -> bool:
    """Whether a number that is off at exactly 0 is on. An array, traced or not, is: zeros stay plain (`traced.numbers`)."""
    return isinstance(value, jax.Array) or value != 0


def require(condition, message):
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_choice(prefix: str, node, choices: dict[str, tuple]) -> None:
    """Raise ValueError unless each named field has one of its choices."""
    for name, known in choices.items():
        value = getattr(node, name)
        require(value in known, f"{prefix}.{name}={value!r} is unknown; one of {', '.join(map(str, known))}")


def require_integers(prefix: str, node, names: str, range_: str) -> None:
    """Raise ValueError unless all members of each tuple field (names with spaces between) are integers in a range."""
    for name in names.split():
        for value in getattr(node, name):
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(
                whole and _RANGES[range_](value), f"{prefix}.{name} must be whole numbers {range_}; {value!r} is not"
            )


# text in a message -> test of a number
_RANGES = {
    ">= 0": lambda v: v >= 0,
    "> 0": lambda v: v > 0,
    ">= 1": lambda v: v >= 1,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in [0, 1)": lambda v: 0 <= v < 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
}


def require_range(prefix: str, node, names: str, range_: str) -> None:
    """Raise ValueError unless each field (names with spaces between them) lies in a range; None passes."""
    for name in names.split():
        value = getattr(node, name)
        require(value is None or _RANGES[range_](value), f"{prefix}.{name} must be {range_}, got {value}")


def build(kind: type, values: Mapping[str, Any], prefix: str = ""):
    """A dataclass, with its sections, from nested plain values; what is absent keeps its default.

    Raises:
      ValueError: an unknown field, named with those there are, or a value out of range.
    """
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown config field {prefix}{unknown[0]}; known: {', '.join(sorted(known))}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = build(hints[name], value, f"{prefix}{name}.")
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)
