"""Between a run's configuration and flags: ml_collections in, plain values and lines of help out."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from r2vpo_jax import losses
from r2vpo_jax.config import grid, presets
from r2vpo_jax.config.fields import Options, build, default_of, in_force
from r2vpo_jax.config.objective import LossConfig, ObjectiveConfig
from r2vpo_jax.config.renamed import new_name
from r2vpo_jax.config.run import Config


def make(**overrides) -> Any:
    """The ConfigDict of a config file: defaults, with `section={field: value}` overrides on top.

    Fields of `objective` stay open (None) here, so that a preset chosen by a flag still fills them in.
    """
    result = _template(Config)
    result.objective = _template(ObjectiveConfig, open=True)
    loss = overrides.get("objective", {}).get("loss", {}).get("name")
    known = {*losses.names(), *([loss] if loss else [])}
    for name in sorted(known):
        for option, default in losses.hyperparameters(name).items():
            result.objective.loss.options[option] = _placeholder(float if default is None else type(default))
    for section, value in overrides.items():
        if isinstance(value, dict):
            result[section].update(value)
        else:
            result[section] = value
    return result


def to_config_dict(node):
    """A ConfigDict for ml_collections flags of a dataclass as it is; None becomes a typed placeholder."""
    return _template(type(node), node)


def to_open_config_dict(kind: type):
    """A ConfigDict for ml_collections flags in which every field of a dataclass is open: None, until a flag sets it."""
    return _template(kind, open=True)


def _template(kind: type, node=None, *, open=False):
    """ConfigDict of a dataclass: of `node`, or of the defaults; with `open`, of nothing but typed placeholders."""
    from ml_collections import config_dict

    result, hints = config_dict.ConfigDict(), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = default_of(field) if node is None else getattr(node, field.name)
        if isinstance(value, Options):
            result[field.name] = config_dict.ConfigDict({} if open else dict(value))
        elif dataclasses.is_dataclass(value):
            result[field.name] = _template(type(value), None if node is None else value, open=open)
        elif value is None or open or (node is None and field.metadata.get("derived")):
            result[field.name] = _placeholder(_plain_type(hints[field.name]))
        elif _is_grid(value):
            result[field.name] = grid.to_text(value)
        else:
            result[field.name] = value
    return result


def _plain_type(hint) -> type:
    """The class behind a type hint: of `int | None` int, of `tuple[str, ...]` tuple."""
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and origin is not types.UnionType:
        return origin
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return _plain_type(kinds[0]) if kinds else hint


def _is_grid(value) -> bool:
    return isinstance(value, tuple) and any(isinstance(item, Mapping) for item in value)


def _placeholder(kind: type):
    from ml_collections import config_dict

    return config_dict.placeholder(kind)


def from_flags(config) -> Config:
    """The validated configuration of a parsed `--config` flag (a ConfigDict)."""
    return from_dict(config.to_dict())


def from_dict(values: Mapping[str, Any]) -> Config:
    """Frozen, validated dataclasses from nested plain values; None is as good as absent.

    The preset is resolved first, then every field gets the number that is in force. Fields without effect (a dual step
    where lambda is fixed) keep their defaults, whatever is given: `without_effect` lists them.

    Raises:
      ValueError: an unknown field (named, with those there are), an old name, or a value out of range.
    """
    for path, _ in leaves(values):
        if path_now := new_name(path):
            raise ValueError(f"config field {path} is now {path_now}")
    given = presets.without_none(values)
    objective = presets.resolve(given.get("objective", {}))
    config = build(Config, given | {"objective": objective})
    if config.model.compute_dtype == "bfloat16" and "max_noise_floor" not in given.get("trainer", {}):
        trainer = dataclasses.replace(config.trainer, max_noise_floor=config.objective.dual.budget / 4)
        config = dataclasses.replace(config, trainer=trainer)
    return _settled(config)


def without_effect(values: Mapping[str, Any]) -> list[str]:
    """Given fields, other than at their defaults, that have no effect beside the others: "objective.dual.step", …"""
    effective = dict(leaves(to_dict(from_dict(values))))
    defaults = dict(leaves(dataclasses.asdict(Config())))
    return [
        path
        for path, value in leaves(presets.without_none(values))
        if path not in effective and (path.startswith("objective.") or value != defaults.get(path))
    ]


def _settled(node):
    """The same with the default in every field that has no effect."""
    effective = {field.name for field, _ in in_force(node)}
    changes = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.name not in effective:
            changes[field.name] = default_of(field)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _settled(value)
    return dataclasses.replace(node, **changes)


def leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of nested values."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_dict(node) -> dict[str, Any]:
    """Nested plain values of what is in force, for config.json. `from_dict` gives the same configuration back."""
    result = {}
    for field, value in in_force(node):
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, Options):
            value = dict(value)
        result[field.name] = value
    return result


def describe(node, reference=None, mark="differs from the defaults of its preset") -> str:
    """Every field in force with its value and its help, section by section.

    Args:
      node: a configuration.
      reference: one to compare with; by default that of the same preset and nothing else. A `*` marks what differs.
      mark: what the `*` says.
    """
    if reference is None:
        reference = (
            from_dict({"objective": {"name": node.objective.name}}) if isinstance(node, Config) else type(node)()
        )
    base = dict(leaves(to_dict(reference)))
    lines, section = [], None
    for path, value, text in _described(node):
        parent = path.rpartition(".")[0].removesuffix(".options")
        if parent != section and lines:
            lines.append("")
        section = parent
        star = " " if path in base and base[path] == value else "*"
        lines.append(f"{star} {path:42s} {value!s:16s} {text}")
    return "\n".join([*lines, "", f"* {mark}"])


def _described(node, prefix="") -> Iterator[tuple[str, Any, str]]:
    """(path, value, help); plain fields before sections."""
    fields = list(in_force(node))
    for field, value in sorted(fields, key=lambda item: dataclasses.is_dataclass(item[1])):
        if dataclasses.is_dataclass(value):
            yield from _described(value, f"{prefix}{field.name}.")
        elif isinstance(value, Options):
            for name, item in value.items():
                yield (
                    f"{prefix}{field.name}.{name}",
                    item,
                    (_help_in_docstring(losses.get(node.name), name) if isinstance(node, LossConfig) else None)
                    or field.metadata["help"],
                )
        elif _is_grid(value):
            for number, cell in enumerate(value):
                yield (
                    f"{prefix}{field.name}[{number}]",
                    " ".join(f"{k}={v}" for k, v in cell.items()) or "(the base)",
                    "",
                )
        else:
            yield prefix + field.name, value, field.metadata["help"]


def _help_in_docstring(function, name: str) -> str | None:
    """What a docstring says of an argument: the text of a line `name, other: text`, there or where it refers to."""
    text = inspect.getdoc(function) or ""
    for names, said in re.findall(r"^\s+([a-z_]+(?:, [a-z_]+)*): (.+)$", text, re.MULTILINE):
        if name in names.split(", "):
            return said.rstrip(".")
    others = (
        getattr(losses, other)
        for other in re.findall(r"^Args\b.*: as `(\w+)`", text, re.MULTILINE)
        if hasattr(losses, other)
    )
    return next((said for other in others if (said := _help_in_docstring(other, name))), None)
