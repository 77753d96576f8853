"""Between a run's configuration and flags: ml_collections in, plain values and lines of help out."""

import dataclasses
import typing
from typing import Any

from r2vpo_jax.config.objective import ObjectiveConfig
from r2vpo_jax.config.run import Config


def to_config_dict(config: Config):
    """A ConfigDict for ml_collections flags: None becomes a typed placeholder."""
    from ml_collections import config_dict

    def convert(value):
        result = config_dict.ConfigDict()
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if dataclasses.is_dataclass(item):
                result[field.name] = convert(item)
            elif item is None:
                kind = next(t for t in typing.get_args(hints[field.name]) if t is not type(None))
                result[field.name] = config_dict.placeholder(kind)
            else:
                result[field.name] = item
        return result

    return convert(config)


def make(**overrides) -> Any:
    """The ConfigDict of a config file: defaults, with `section={field: value}` overrides on top.

    Fields of `objective` stay None here, so that a preset chosen by a flag still fills them in.
    """
    blank = object.__new__(ObjectiveConfig)
    for field in dataclasses.fields(ObjectiveConfig):
        object.__setattr__(blank, field.name, field.default)
    config = object.__new__(Config)
    for field in dataclasses.fields(Config):
        value = field.default if field.default is not dataclasses.MISSING else None
        if field.name != "objective" and value is None:
            value = field.default_factory()
        object.__setattr__(config, field.name, blank if field.name == "objective" else value)
    result = to_config_dict(config)
    for section, value in overrides.items():
        if isinstance(value, dict):
            result[section].update(value)
        else:
            result[section] = value
    return result


def from_dict(values: dict) -> Config:
    """Frozen, validated dataclasses from nested plain values.

    Raises:
      ValueError: an unknown field (named, with those there are) or a value out of range.
    """

    def build(cls, values, prefix):
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown config field {prefix}{unknown[0]}; known: {', '.join(sorted(known))}")
        built = {}
        for name, value in values.items():
            if dataclasses.is_dataclass(hints[name]):
                value = build(hints[name], value, f"{prefix}{name}.")
            built[name] = value
        return cls(**built)

    return build(Config, values, "")


def from_flags(config) -> Config:
    """The validated configuration of a parsed `--config` flag (a ConfigDict)."""
    return from_dict(config.to_dict())


def describe(config: Config) -> str:
    """Every field with its value and its help, one a line."""

    def lines(section, prefix):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                yield from lines(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix + field.name:36s} {value!s:16s} {field.metadata['help']}"

    return "\n".join(lines(config, ""))
