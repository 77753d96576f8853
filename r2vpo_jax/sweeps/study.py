"""A sweep as a comparison of methods, read from the files that it left: what was the same, what was tuned, what was found.

Of what a sweep varies, fields of the objective that are no numbers make a *method* (its name, say); numbers of the
objective are its *coefficients*, which are tuned; every other field is a *setting*, in which methods are compared.
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from r2vpo_jax.config import SweepConfig
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run.summary import held_variance
from r2vpo_jax.sweeps import pictures, runs
from r2vpo_jax.sweeps.runs import Axis, Cell, Plan

METRICS = (  # of training rows; those of "keeps/" exist where a token would have been clipped
    "ratio/variance_mean", "ratio/effective_sample_size", "policy/entropy", "dual/variance_coef",
    "keeps/at_stake", "keeps/retained", "keeps/restoring",
)  # fmt: skip
_OBJECTIVE = "objective."


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A run that has ended."""

    seed: int
    status: str  # finished, collapsed or failed
    final: float  # pass@1 on the test problems; nan unless it finished
    base: float  # of the base model on the same problems; nan unless it finished
    validation: Mapping[str, np.ndarray]  # rollouts, pass_at_1: [validations]
    training: Mapping[
        str, np.ndarray
    ]  # rollouts, variance (V that a budget bounds) and METRICS: [iterations], nan: absent

    def mean(self, metric: str) -> float:
        """Over the iterations that have it; nan if none has."""
        values = self.training[metric]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else np.nan

    def last(self, metric: str) -> float:
        """In the last iteration; nan if it was never measured."""
        values = self.training[metric]
        return float(values[-1]) if len(values) else np.nan


@dataclasses.dataclass(frozen=True)
class Group:
    """A cell of the sweep and its runs, one for each seed."""

    cell: Cell
    method: str
    setting: str  # "" if nothing but the objective is varied
    coefficients: str  # "" if nothing of the method is varied
    outcomes: tuple[Outcome, ...]

    @property
    def finished(self) -> list[Outcome]:
        """Runs that did, in the order of seeds."""
        return [outcome for outcome in self.outcomes if outcome.status == "finished"]

    def count(self, status: str) -> int:
        """Runs that ended so."""
        return sum(outcome.status == status for outcome in self.outcomes)


@dataclasses.dataclass(frozen=True)
class Study:
    """A sweep."""

    name: str
    plan: Plan
    groups: tuple[Group, ...]
    seeds: int

    @functools.cached_property
    def methods(self) -> list[str]:
        """In the order of the grid, as are settings."""
        return list(dict.fromkeys(group.method for group in self.groups))

    @functools.cached_property
    def settings(self) -> list[str]:
        """In which methods are compared; one, "", if nothing but the objective is varied."""
        return list(dict.fromkeys(group.setting for group in self.groups))

    @functools.cached_property
    def chosen(self) -> dict[tuple[str, str], Group]:
        """(setting, method) -> its tuned cell: fewest runs lost, then best last validation. The test has no say."""
        found: dict[tuple[str, str], Group] = {}
        for group in self.groups:
            key = (group.setting, group.method)
            if key not in found or _rank(group) > _rank(found[key]):
                found[key] = group
        return found

    def reference(self, setting: str, objective: str) -> Group | None:
        """The cell of an objective in a setting that others are compared with: its best, as in `chosen`."""
        there = [group for group in self.groups if group.setting == setting and group.cell.objective == objective]
        return max(there, key=_rank, default=None)

    def axes(self, *, of_objective: bool) -> list[Axis]:
        """Numbers that are varied: coefficients, or those of the settings."""
        return [
            axis
            for axis in self.plan.axes
            if axis.paths[0].startswith(_OBJECTIVE) == of_objective
            and len({value for group in self.groups if pictures.is_number(value := value_of(group, axis))}) > 1
        ]


def value_of(group: Group, axis: Axis):
    """What a cell has for an axis: the value in force, None where it has no effect."""
    return group.cell.settings[axis.paths[0]]


def is_sweep(workdir) -> bool:
    """Whether the directory is a sweep's."""
    return (pathlib.Path(workdir) / "sweep.json").exists()


def read(workdir) -> Study:
    """The study in a sweep's directory.

    Raises:
      UsageError: the sweep has not ended, or its sweep.json is not of this version.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "results.json").exists():
        raise UsageError(f"{workdir} holds a sweep that has not ended (no results.json); its command goes on with it")
    identity = json.loads((workdir / "sweep.json").read_text())
    grid = SweepConfig(cells=tuple(identity["sweep"]["cells"].values()), seeds=tuple(identity["sweep"]["seeds"]))
    plan = runs.plan(identity["base"], grid)
    rows = json.loads((workdir / "results.json").read_text())
    validation = _columns(_rows(workdir / "results.parquet", ("split", "rollouts", "pass_at_1")), _validation)
    training = _columns(_rows(workdir / "curves.parquet", ("kind", "rollouts", *_VARIANCE, *METRICS)), _training)
    by_cell = collections.defaultdict(list)
    for row in rows:
        by_cell[row["cell"]].append(
            Outcome(
                row["seed"],
                row["status"],
                row.get("final_pass_at_1", np.nan),
                row.get("base_pass_at_1", np.nan),
                validation(row["run"]),
                training(row["run"]),
            )
        )
    return Study(workdir.resolve().name, plan, tuple(_groups(plan, by_cell)), len(grid.seeds))


def _groups(plan: Plan, by_cell: Mapping[str, Sequence[Outcome]]):
    ours = [axis for axis in plan.axes if axis.paths[0].startswith(_OBJECTIVE)]
    others = [axis for axis in plan.axes if axis not in ours]
    methods = collections.defaultdict(list)
    for cell in plan.cells:
        fixed = [axis for axis in ours if _is_told(cell, axis) and not pictures.is_number(cell.settings[axis.paths[0]])]
        methods[pictures.label_of(fixed, cell) or cell.objective].append(cell)
    method_of = {cell.name: method for method, cells in methods.items() for cell in cells}
    for cell in plan.cells:
        peers = methods[method_of[cell.name]]
        tuned = [
            axis
            for axis in ours
            if pictures.is_number(cell.settings[axis.paths[0]])
            and len({peer.settings[axis.paths[0]] for peer in peers}) > 1
        ]
        told = [axis for axis in others if _is_told(cell, axis)]
        yield Group(
            cell,
            method_of[cell.name],
            pictures.label_of(told, cell),
            pictures.label_of(tuned, cell),
            tuple(by_cell[cell.name]),
        )


def _is_told(cell: Cell, axis: Axis) -> bool:
    return cell.settings[axis.paths[0]] is not None


def _rank(group: Group) -> tuple[float, float]:
    last = [outcome.validation["pass_at_1"][-1] for outcome in group.finished if len(outcome.validation["pass_at_1"])]
    return -(len(group.outcomes) - len(group.finished)), float(np.mean(last)) if last else -np.inf


# Files ------------------------------------------------------------------------------------------------------------

_VARIANCE = ("ratio/variance", "dual/signal")  # what `held_variance` needs


def _rows(path: pathlib.Path, names: Sequence[str]) -> dict[str, list[dict]]:
    """Rows of each run, without what is null in them; columns that no run of the sweep has are none."""
    import pyarrow.parquet

    there = set(pyarrow.parquet.read_schema(path).names)
    table = pyarrow.parquet.read_table(path, columns=["run", *(name for name in names if name in there)])
    by_run = collections.defaultdict(list)
    for row in table.to_pylist():
        by_run[row["run"]].append({name: value for name, value in row.items() if value is not None})
    return by_run


def _columns(rows: Mapping[str, list[dict]], of):
    return lambda run: of(rows.get(run, []))


def _validation(rows: list[dict]) -> dict[str, np.ndarray]:
    kept = [row for row in rows if row.get("split") == "validation"]
    return {name: np.array([row[name] for row in kept], np.float64) for name in ("rollouts", "pass_at_1")}


def _training(rows: list[dict]) -> dict[str, np.ndarray]:
    kept = [row for row in rows if row["kind"] == "train"]
    columns = {name: np.array([row.get(name, np.nan) for row in kept], np.float64) for name in ("rollouts", *METRICS)}
    return columns | {"variance": np.array([held_variance(row) for row in kept], np.float64)}
