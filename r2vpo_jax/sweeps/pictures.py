"""The two pictures of a sweep: final scores against what was varied, and curves against iterations.

Cells that differ in numbers alone share a panel: those with the same objective, task and every other swept field that is
no number. A panel's x axis is the first number that varies in it; where more do, there is a line for each of the others.
"""

import collections
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r2vpo_jax.evaluation import estimators
from r2vpo_jax.run.summary import held_variance
from r2vpo_jax.sweeps.runs import Axis, Cell, Plan, value_text

_COLUMNS = 4  # of panels
_LONGEST_LEGEND = 10  # lines; more would hide the panel
_DPI = 110
CURVES = {  # what `curves` needs of a training row of metrics.jsonl
    "iteration": lambda row: float(row["iteration"]),
    "reward": lambda row: float(row["reward/mean"]),
    "variance": held_variance,
}


@dataclasses.dataclass(frozen=True)
class _Panel:
    """Cells that differ in numbers alone."""

    title: str
    cells: list[Cell]
    varied: list[Axis]  # numbers, more than one value each


def final_scores(plan: Plan, results: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: test pass@1 of the fine-tuned model against the varied numbers; every seed a dot, their mean a line.

    Args:
      plan: of the sweep.
      results: from `results.result`, one for each run.
    """
    by_cell = _grouped(results, "cell")
    panels = _panels(plan, alone_together=len(plan.cells))

    def draw(ax, panel):
        first, *others = panel.varied or [None]
        ticks = _ticks(panel, first)
        lines, lost = collections.defaultdict(list), collections.Counter()
        for cell in panel.cells:
            lines[label_of(others, cell)].append(cell)
        for color, (label, cells) in zip(_colors(len(lines), bool(first)), lines.items(), strict=True):
            means = []
            for cell in cells:
                x = ticks.index(_tick(first, cell))
                done = [row["final_pass_at_1"] for row in by_cell[cell.name] if row["status"] == "finished"]
                ax.plot([x] * len(done), done, "o", color=color, alpha=0.4, ms=4)
                lost[x] += len(by_cell[cell.name]) - len(done)
                means.append((x, np.mean(done) if done else np.nan))
            means.sort()
            ax.plot(
                *zip(*means, strict=True),
                "-" if first else "_",
                color=color,
                ms=14,
                mew=2,
                label=label or "mean over seeds",
            )
        for x, count in lost.items():
            if count:
                ax.annotate(f"{count} lost", (x, 0.02), ha="center", color="C3", fontsize=7)
        finished = (row for cell in panel.cells for row in by_cell[cell.name] if row["status"] == "finished")
        for number, base in enumerate(sorted({row["base_pass_at_1"] for row in finished})):  # one of each task
            ax.axhline(base, color="C3", ls=":", label=None if number else "base model")
        long = max(len(tick) for tick in ticks) * len(ticks) > 40
        ax.set_xticks(range(len(ticks)), ticks, rotation=90 if long else 0)
        ax.set(title=panel.title, xlabel=first.name if first else "", ylim=(0, 1.02))
        ax.margins(x=0.08)
        _legend(ax)

    widest = max((len(panel.cells) for panel in panels if not panel.varied), default=0)
    return _figure(panels, 1, [("final pass@1 (test)", draw)], width=max(4, 0.25 * widest))


def curves(
    plan: Plan, results: Sequence[Mapping[str, Any]], drawn: Mapping[str, Mapping[str, Sequence[float]]]
) -> bytes:
    """PNG: training reward, and V against its budget, by iteration; mean and 95 % interval over the seeds of a cell.

    Only runs that finished are drawn: a mean over the survivors of each iteration would look better than any run was.

    Args:
      plan: of the sweep.
      results: from `results.result`, one for each run.
      drawn: run name -> name of `CURVES` -> its value in each iteration that trained.
    """
    finished = _grouped((row for row in results if row["status"] == "finished"), "cell")
    lost = collections.Counter(row["cell"] for row in results if row["status"] != "finished")

    def draw(metric, scale):
        def on(ax, panel) -> np.ndarray:
            means = [np.zeros(0)]
            for color, cell in zip(_colors(len(panel.cells), bool(panel.varied)), panel.cells, strict=True):
                x, mean, half = over_runs([drawn[row["run"]] for row in finished[cell.name]], metric, scale(cell))
                if not len(x):
                    continue
                label = label_of(panel.varied, cell) or cell.label
                label += f" ({lost[cell.name]} lost)" if lost[cell.name] else ""
                ax.plot(x, mean, color=color, lw=1.3, label=label)
                means.append(mean)
                ax.fill_between(x, mean - half, mean + half, color=color, alpha=0.2, lw=0)
            ax.set(title=panel.title, xlabel="iteration")
            ax.xaxis.get_major_locator().set_params(integer=True)
            _legend(ax)
            return np.concatenate(means)

        return on

    def reward(ax, panel):
        draw("reward", lambda cell: 1.0)(ax, panel)
        ax.set(ylim=(0, 1.02))

    def variance(ax, panel):
        budgets = {cell.name: cell.config.objective.variance_budget for cell in panel.cells}
        relative = all(budgets.values())
        means = draw("variance", lambda cell: budgets[cell.name] if relative else 1.0)(ax, panel)
        ax.set_yscale("log", nonpositive="clip")
        if np.any(means > 0):  # few seeds have intervals down to 0, which a logarithm would draw without end
            ax.set_ylim(means[means > 0].min() / 3, means.max() * 3)
        ax.set_ylabel("V / budget δ" if relative else "V = E[(r − 1)²]")
        if relative:
            ax.axhline(1.0, color="C3", ls="--", lw=1)

    return _figure(_panels(plan, alone_together=_LONGEST_LEGEND), 2, [("training reward", reward), (None, variance)])


def _grouped(rows, name) -> dict[Any, list]:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row[name]].append(row)
    return groups


def is_number(value) -> bool:
    """Whether an axis with this value has an order that a picture can show."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _panels(plan: Plan, alone_together: int) -> list[_Panel]:
    """The panels, those with varied numbers first; cells that are alone of their kind share panels, so many in each."""
    groups = collections.defaultdict(list)
    for cell in plan.cells:
        values = [cell.settings[axis.paths[0]] for axis in plan.axes]
        groups[tuple(None if is_number(value) else (value, type(value)) for value in values)].append(cell)
    panels, alone = [], []
    for cells in groups.values():
        varied = [axis for axis in plan.axes if len({cell.settings[axis.paths[0]] for cell in cells}) > 1]
        if varied:
            shown = [axis for axis in plan.axes if isinstance(cells[0].settings[axis.paths[0]], (str, bool, tuple))]
            panels.append(_Panel(label_of(shown, cells[0]), cells, varied))
        else:
            alone += cells
    for start in range(0, len(alone), alone_together):
        panels.append(_Panel("", alone[start : start + alone_together], []))
    return panels


def label_of(axes: Sequence[Axis], cell: Cell) -> str:
    """What a cell sets of some axes, for people: r2vpo, budget 0.001."""
    texts = [(axis, value_text(cell.settings[axis.paths[0]])) for axis in axes]
    return ", ".join(text if axis.bare else f"{axis.name} {text}" for axis, text in texts)


def _tick(first: Axis | None, cell: Cell) -> str:
    return cell.label if first is None else value_text(cell.settings[first.paths[0]])


def _ticks(panel: _Panel, first: Axis | None) -> list[str]:
    """The places on the x axis, equally far from each other, by value."""
    cells = panel.cells if first is None else sorted(panel.cells, key=lambda cell: cell.settings[first.paths[0]])
    return list(dict.fromkeys(_tick(first, cell) for cell in cells))


def over_runs(
    runs, metric: str, scale: float = 1.0, at: str = "iteration"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places, mean, half of the 95 % interval) over runs; one run has an interval of 0.

    Args:
      runs: a mapping each, from names to as many values.
      metric: whose mean is taken, divided by `scale`; values that are not finite are left out.
      at: what says which values of the runs belong together.
    """
    by_place = collections.defaultdict(list)
    for run in runs:
        for place, value in zip(run[at], run[metric], strict=True):
            if np.isfinite(value):
                by_place[place].append(value / scale)
    x = sorted(by_place)
    found = np.array([estimators.mean_interval(by_place[i]) for i in x]).reshape(len(x), 2)
    return np.array(x), found[:, 0], np.nan_to_num(found[:, 1])


def _colors(count: int, ordered: bool):
    from matplotlib import colormaps

    if count <= 1 or not ordered:
        return [f"C{i % 10}" for i in range(count)]
    return [colormaps["viridis"](0.9 * i / (count - 1)) for i in range(count)]


def _legend(ax) -> None:
    ax.grid(alpha=0.3)
    handles, labels = ax.get_legend_handles_labels()
    if 0 < len(handles) <= _LONGEST_LEGEND:  # below the axes: among curves there is no free corner
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=7, frameon=False)


def _figure(panels: list[_Panel], height: int, rows, width: float = 4) -> bytes:
    """A grid of panels; each is drawn in every row of `rows`, (label of the y axis, function of axes and panel)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(_COLUMNS, len(panels))
    bands = -(-len(panels) // across)
    figure = Figure(figsize=(width * across, 3.6 * bands * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(bands * height, across, squeeze=False)
    for number in range(bands * across):
        band, column = divmod(number, across)
        for line, (label, draw) in enumerate(rows):
            ax = axes[band * height + line, column]
            if number >= len(panels):
                ax.set_visible(False)
                continue
            draw(ax, panels[number])
            if column == 0 and label:
                ax.set_ylabel(label)
    content = io.BytesIO()
    figure.savefig(content, dpi=_DPI, format="png")
    return content.getvalue()
