"""The runs of a sweep: the configuration of each, checked, and names that are short, unique and fit for files."""

import collections
import copy
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from r2vpo_jax import config as config_lib
from r2vpo_jax.config import Config, SweepConfig
from r2vpo_jax.errors import UsageError

_LONGEST_NAME = 120  # of a cell, in characters; the file systems that we know allow 255 bytes


@dataclasses.dataclass(frozen=True)
class Axis:
    """What is swept: a field, or several fields of one section that always have the same value."""

    name: str  # as short as tells it from the other axes
    paths: tuple[str, ...]

    @property
    def bare(self) -> bool:
        """Whether its values say what they are: r2vpo rather than objective=r2vpo."""
        return self.paths[0] in ("objective.name", "task.name")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of the grid: what its runs share."""

    name: str  # for files
    label: str  # for people
    settings: Mapping[str, Any]  # path of every swept field -> the value in force, None where it has no effect
    config: Config  # with the first seed
    objective: str  # the preset


@dataclasses.dataclass(frozen=True)
class Run:
    """A cell at one seed."""

    name: str
    cell: Cell
    seed: int
    config: Config


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a sweep will do."""

    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]  # seeds outermost: a sweep that is stopped early has complete grids for the first seeds


def plan(base: dict, sweep: SweepConfig) -> Plan:
    """All runs of a sweep, each configuration checked.

    Args:
      base: plain nested values of a Config (`config.make(...).to_dict()`), shared by all runs.
      sweep: the grid and the seeds.

    Raises:
      UsageError: a cell that is no valid configuration, or two that are the same run; both are named.
    """
    found = axes(sweep.cells)
    names = _names(found, sweep.cells)
    configs = {}
    for name, given in zip(names, sweep.cells, strict=True):
        try:
            made = cell_config(base, given, sweep.seeds[0])
        except (ValueError, TypeError) as error:
            raise UsageError(f"sweep.cells, {name}: {error}") from error
        for other, earlier in configs.items():
            if made == earlier:
                raise UsageError(
                    f"the cells {other} and {name} are the same run: what only one of them sets is so anyway, or has no effect"
                )
        configs[name] = made
    cells = []
    for name, given in zip(names, sweep.cells, strict=True):
        in_force = dict(config_lib.leaves(config_lib.to_dict(configs[name])))
        settings = {path: in_force.get(path) for axis in found for path in axis.paths}
        label = ", ".join(_parts(found, given)) or "base"
        cells.append(Cell(name, label, settings, configs[name], configs[name].objective.name))
    runs = [
        Run(f"{cell.name}_seed={seed}", cell, seed, dataclasses.replace(cell.config, seed=seed))
        for seed in sweep.seeds
        for cell in cells
    ]
    return Plan(found, tuple(cells), tuple(runs))


def cell_config(base: dict, cell: Mapping[str, Any], seed: int) -> Config:
    """The configuration of one run: the base, with what the cell sets, and the seed.

    Raises:
      ValueError: no valid configuration.
    """
    values = copy.deepcopy(base) | {"seed": seed}
    for path, value in cell.items():
        *sections, name = path.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"unknown config field {path}: {section} is no section")
        if isinstance(node.get(name), dict):
            raise ValueError(f"{path} is a section; a cell sets single fields")
        node[name] = value
    return config_lib.from_dict(values)


def axes(cells: Sequence[Mapping[str, Any]]) -> tuple[Axis, ...]:
    """What a grid varies, in the order in which its cells name it: what a method has of its own before what all share."""
    places: dict[str, int] = {}
    for cell in cells:
        for place, path in enumerate(cell):
            places[path] = min(place, places.get(path, place))
    paths = sorted(places, key=places.__getitem__)
    together: dict[tuple, list[str]] = {}
    for path in paths:
        column = tuple(repr(cell[path]) if path in cell else None for cell in cells)
        together.setdefault((path.rpartition(".")[0], column), []).append(path)
    groups = [tuple(group) for group in together.values()]
    words = [_words(group) for group in groups]
    lengths = [1] * len(groups)
    while True:
        names = [".".join(long[-length:]) for long, length in zip(words, lengths, strict=True)]
        counts = collections.Counter(names)
        longer = [
            number for number, name in enumerate(names) if counts[name] > 1 and lengths[number] < len(words[number])
        ]
        if not longer:
            return tuple(Axis(name, group) for name, group in zip(names, groups, strict=True))
        for number in longer:
            lengths[number] += 1


def value_text(value) -> str:
    """A value for people: 0.5, 1e-05, r2vpo, none."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, tuple):
        return "-".join(value_text(item) for item in value)
    return "none" if value is None else str(value)


def _words(paths: tuple[str, ...]) -> list[str]:
    """The words that may stand in an axis' name, the most telling last: objective.dual.coef, objective.loss.clip."""
    *sections, last = paths[0].split(".")
    if len(paths) > 1:
        names = [path.rpartition(".")[2] for path in paths]
        shared = names[0]
        while not all(name.startswith(shared) for name in names):
            shared = shared[:-1]
        last = shared.rstrip("_") if len(shared.rstrip("_")) >= 3 else "+".join(names)
    elif last == "name" and sections:  # objective.loss.name is the loss
        last = sections.pop()
    return [section for section in sections if section != "options"] + [last]


def _parts(found: Sequence[Axis], cell: Mapping[str, Any]) -> list[str]:
    set_here = [axis for axis in found if axis.paths[0] in cell]
    texts = [value_text(cell[axis.paths[0]]) for axis in set_here]
    return [text if axis.bare else f"{axis.name}={text}" for axis, text in zip(set_here, texts, strict=True)]


def _names(found: Sequence[Axis], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A file name for each cell, all different."""
    names = []
    for cell in cells:
        text = "_".join(_parts(found, cell)) or "base"
        name = re.sub(r"[^\w.=+-]", "-", text, flags=re.ASCII)
        if len(name) > _LONGEST_NAME or name in names:
            name = f"{name[:_LONGEST_NAME]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        names.append(name)
    if len(set(names)) < len(names):  # two cells that read the same: an integer and its text, say
        names = [f"{number}_{name}" for number, name in enumerate(names)]
    return names
