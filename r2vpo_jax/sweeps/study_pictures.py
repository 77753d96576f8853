"""Pictures of a study, fit for print: one message each, named axes, intervals over seeds, colors for the color-blind.

A method is drawn with the same color, line and marker in all of them. Where a method was tuned, its chosen cell stands for
it (`Study.chosen`), except where the tuning is the message. Every picture is None where the sweep has no data for it.
"""

import dataclasses
import io
from collections.abc import Iterator, Sequence

import numpy as np

from r2vpo_jax.sweeps import statistics
from r2vpo_jax.sweeps.pictures import is_number, label_of, over_runs
from r2vpo_jax.sweeps.runs import Axis, value_text
from r2vpo_jax.sweeps.study import Group, Outcome, Study, value_of

# Okabe and Ito, "Color universal design" (2008); yellow, which is faint on paper, is left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_ACROSS = 3  # panels; at 3.2 inches each, print keeps the text legible
_DPI = 160
_FONT = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8}
_ROLLOUTS = "thousands of rollouts (responses sampled)"
_SMOOTHED_OVER = 10  # iterations: V of single ones is heavy-tailed
_FINAL = "final pass@1 (test)"
_VARIANCE = "ratio variance V = E[(r − 1)²]"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure and what it shows."""

    name: str  # of its file, without .png
    title: str
    caption: str
    png: bytes


def draw(study: Study) -> Iterator[Picture]:
    """All pictures for which there is data."""
    intervals = "are 95 % intervals over seeds (Student's t)"
    tuned = " The cell of each method is the best on validation." if len(study.chosen) < len(study.groups) else ""
    found = [
        (
            "validation",
            "Accuracy against rollouts",
            f"Mean over the runs that finished; bands {intervals}.{tuned}",
            _validation(study),
        ),
        (
            "sensitivity",
            "How wide is the good region of each method's own coefficient",
            f"Lines are means over seeds; bars {intervals}. Panels share the vertical axis.",
            _sensitivity(study),
        ),
        (
            "constraint",
            "The ratio variance and its budget δ (dashed), and the multiplier λ",
            f"V is what the budget bounds, as a running mean of up to {_SMOOTHED_OVER} iterations; geometric mean over the "
            f"runs that finished, bands {intervals} of its logarithm.{tuned}",
            _constraint(study),
        ),
        *(
            (
                f"over_{axis.name.replace('.', '_')}",
                f"Accuracy, entropy and effective sample size over {axis.name}",
                f"Bars {intervals}. Entropy is that of the last iteration, the effective sample size a mean over "
                f"iterations.{tuned}",
                _over(study, axis),
            )
            for axis in study.axes(of_objective=False)
        ),
        (
            "dead_zone",
            "What becomes of the gradient that PPO's clip at 0.2 would cut",
            f"Means over the iterations in which a token would be cut; bars {intervals}. That clip retains 0 and restores 0; "
            f"no trust region retains 1.{tuned}",
            _dead_zone(study),
        ),
        (
            "displacement",
            "Accuracy against the measured displacement",
            "Small markers are runs, large ones the means of cells. All cells, tuned or not.",
            _displacement(study),
        ),
    ]
    yield from (Picture(*parts) for parts in found if parts[-1] is not None)


# The pictures -----------------------------------------------------------------------------------------------------


def _validation(study: Study) -> bytes | None:
    def panel(ax, setting):
        for group in _tuned(study, setting):
            curves = [outcome.validation for outcome in group.finished]
            _band(ax, study, group, *over_runs(curves, "pass_at_1", at="rollouts"))
        _say_who_is_lost(ax, study, setting)
        ax.set(xlabel=_ROLLOUTS, ylabel="validation pass@1")

    shown = [s for s in study.settings if any(len(o.validation["rollouts"]) > 1 for o in _runs(study, s))]
    return _figure([[(panel, setting)] for setting in shown], share="all")


def _sensitivity(study: Study) -> bytes | None:
    from matplotlib import colormaps

    axes = study.axes(of_objective=True)

    def panel(ax, method):
        groups = [group for group in study.groups if group.method == method]
        first, *others = _varied(axes, groups)
        place = _places(ax, [value_of(group, first) for group in groups])
        lines: dict[str, list[Group]] = {}
        for group in groups:
            told = [part for part in (label_of(_varied(others, groups), group.cell), group.setting) if part]
            lines.setdefault(", ".join(told), []).append(group)
        for number, (label, cells) in enumerate(lines.items()):
            style = _style(study, method)
            if len(lines) > 1:  # settings have an order, so they have shades
                shade = colormaps["viridis"](0.85 * number / (len(lines) - 1))
                style |= {"color": shade, "mfc": shade, "marker": _MARKERS[number % len(_MARKERS)]}
            points = [(place(value_of(group, first)), [o.final for o in group.finished]) for group in cells]
            _dots(ax, points, style, label if len(lines) > 1 else None, seeds=len(lines) == 1)
        _say_lost(ax, [(place(value_of(group, first)), group) for group in groups])
        ax.set(xlabel=first.name, ylabel=_FINAL)

    methods = [m for m in study.methods if _varied(axes, [g for g in study.groups if g.method == m])]
    shown = [method for method in methods if any(g.finished for g in study.groups if g.method == method)]
    return _figure([[(panel, method)] for method in shown], share="all")


def _constraint(study: Study) -> bytes | None:
    def variance(ax, setting):
        for group in _tuned(study, setting):
            x, center, half = over_runs([_log_variance(o) for o in group.finished], "log", at="rollouts")
            _band(ax, study, group, x, np.exp(center), np.exp(center - half), np.exp(center + half))
            budget = group.cell.config.objective.variance_budget
            if budget is not None:
                ax.axhline(budget, color=_style(study, group.method)["color"], ls="--", lw=1)
                ax.annotate(" δ", (1, budget), xycoords=ax.get_yaxis_transform(), va="center")
        ax.set(xlabel=_ROLLOUTS, ylabel=_VARIANCE, yscale="log")

    def multiplier(ax, setting):
        for group in _tuned(study, setting):
            priced = [o.training for o in group.finished]
            _band(ax, study, group, *over_runs(priced, "dual/variance_coef", at="rollouts"))
        ax.set(xlabel=_ROLLOUTS, ylabel="multiplier λ")

    shown = [
        setting for setting in study.settings if any(len(o.training["rollouts"]) > 1 for o in _runs(study, setting))
    ]
    price = any(np.isfinite(o.training["dual/variance_coef"]).any() for s in shown for o in _runs(study, s))
    return _figure([[(variance, s), *([(multiplier, s)] if price else [])] for s in shown])


def _over(study: Study, axis: Axis) -> bytes | None:
    measures = (
        (_FINAL, lambda run: run.final),
        ("policy entropy at the end\n(nats per token)", lambda run: run.last("policy/entropy")),
        ("effective sample size\n(share of tokens)", lambda run: run.mean("ratio/effective_sample_size")),
    )
    panels: dict[str, list[Group]] = {}
    for group in study.chosen.values():
        if is_number(value_of(group, axis)):
            panels.setdefault(_setting_without(study, group, [axis]), []).append(group)
    shown = {label: groups for label, groups in panels.items() if len({value_of(g, axis) for g in groups}) > 1}

    def panel_of(number, name, measure):
        def panel(ax, label):
            groups = shown[label]
            place = _places(ax, [value_of(group, axis) for group in groups])
            for method in study.methods:
                mine = [group for group in groups if group.method == method]
                points = [(place(value_of(g, axis)), [measure(o) for o in g.finished]) for g in mine]
                _dots(ax, points, _style(study, method), method, seeds=False)
            if not number:
                _say_lost(ax, [(place(value_of(group, axis)), group) for group in groups])
            ax.set(xlabel=axis.name, ylabel=name)

        return panel

    rows = [[(panel_of(i, *measure), label) for i, measure in enumerate(measures)] for label in shown]
    return _figure(rows, across=True, share="none")


def _dead_zone(study: Study) -> bytes | None:
    measures = (
        ("keeps/at_stake", 100, "at stake (% of the unclipped gradient)", ()),
        ("keeps/retained", 1, "retained, of what is at stake", (0, 1)),
        ("keeps/restoring", 1, "restoring, of what is at stake", (0,)),
    )

    def panel_of(metric, scale, name, marks):
        def panel(ax, setting):
            groups = _tuned(study, setting)
            for y, group in enumerate(groups):
                values = [scale * v for v in (o.mean(metric) for o in group.finished) if np.isfinite(v)]
                if not values:
                    continue
                style = _style(study, group.method)
                center, low, _ = statistics.mean_interval(values)
                ax.errorbar(center, y, xerr=np.nan_to_num(center - low), capsize=3, **style | {"ls": "none"})
            for mark in marks:
                ax.axvline(mark, color="0.6", lw=0.8, ls=":")
            ax.set_yticks(range(len(groups)), [group.method for group in groups])
            ax.set(xlabel=name, ylim=(len(groups) - 0.5, -0.5))

        return panel

    def seen(setting):
        return any(np.isfinite(o.mean("keeps/retained")) for g in _tuned(study, setting) for o in g.finished)

    shown = [setting for setting in study.settings if seen(setting)]
    return _figure([[(panel_of(*m), setting) for m in measures] for setting in shown], across=True, share="row")


def _displacement(study: Study) -> bytes | None:
    numbers = study.axes(of_objective=False)
    panels: dict[str, list[Group]] = {}
    for group in study.groups:
        panels.setdefault(_setting_without(study, group, numbers), []).append(group)

    def cell_points(group):
        return [(o.mean("ratio/variance_mean"), o.final) for o in group.finished if o.mean("ratio/variance_mean") > 0]

    def panel(ax, label):
        for method in study.methods:
            style = _style(study, method)
            cells = [np.array(points) for g in panels[label] if g.method == method and (points := cell_points(g))]
            if not cells:
                continue
            ax.plot(*np.concatenate(cells).T, **style | {"ls": "none", "ms": 4, "alpha": 0.35, "mec": "none"})
            edge = "black" if style["mfc"] == style["color"] else style["color"]
            # V is heavy-tailed: cells are placed at its geometric mean.
            means = [(np.exp(np.log(points[:, 0]).mean()), points[:, 1].mean()) for points in cells]
            ax.plot(*np.array(means).T, label=method, **style | {"ls": "none", "ms": 7, "mec": edge, "mew": 0.6})
        ax.set(xlabel=f"{_VARIANCE}, mean of the run", ylabel=_FINAL, xscale="log")

    shown = [label for label, groups in panels.items() if any(cell_points(group) for group in groups)]
    return _figure([[(panel, label)] for label in shown], share="all")


# What they share --------------------------------------------------------------------------------------------------


def _runs(study: Study, setting: str):
    return [outcome for group in _tuned(study, setting) for outcome in group.finished]


def _tuned(study: Study, setting: str) -> list[Group]:
    return [study.chosen[setting, method] for method in study.methods if (setting, method) in study.chosen]


def _varied(axes: Sequence[Axis], groups: Sequence[Group]) -> list[Axis]:
    """Those in which these cells have numbers, and more than one."""
    values = {axis.name: [value_of(group, axis) for group in groups] for axis in axes}
    return [axis for axis in axes if all(map(is_number, values[axis.name])) and len(set(values[axis.name])) > 1]


def _setting_without(study: Study, group: Group, axes: Sequence[Axis]) -> str:
    """What else the setting of a cell says."""
    others = [axis for axis in study.plan.axes if not axis.paths[0].startswith("objective.") and axis not in axes]
    return label_of([axis for axis in others if value_of(group, axis) is not None], group.cell)


def _style(study: Study, method: str) -> dict:
    number = study.methods.index(method)
    again = number // len(COLORS)  # the same colors, told apart by line and hollow markers
    color = COLORS[number % len(COLORS)]
    return {
        "color": color,
        "marker": _MARKERS[number % len(_MARKERS)],
        "mfc": "white" if again else color,
        "ls": _LINES[again % len(_LINES)],
        "ms": 4,
        "lw": 1.4,
    }


def _band(ax, study: Study, group: Group, x, center, low, high=None) -> None:
    """A line and its interval: `low` and `high` are its ends, or `low` alone is half of its width."""
    if not len(x):
        return
    low, high = (center - low, center + low) if high is None else (low, high)
    style = _style(study, group.method)
    marks = style["marker"] if len(x) <= 12 else None  # beyond that, they would hide the line
    ax.plot(x / 1000, center, label=group.method, **style | {"marker": marks})
    ax.fill_between(x / 1000, low, high, color=style["color"], alpha=0.18, lw=0)


def _log_variance(run: Outcome) -> dict[str, np.ndarray]:
    """The logarithm of the running mean of V; nan where it is not positive."""
    values, rollouts = run.training["variance"], run.training["rollouts"]
    window = max(1, min(_SMOOTHED_OVER, len(values) // 4))
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    return {"rollouts": rollouts[window - 1 :], "log": np.log(np.where(smooth > 0, smooth, np.nan))}


def _dots(ax, points, style: dict, label: str | None, seeds: bool = True) -> None:
    """The mean at each place with its interval, joined; with the values of the seeds as faint dots."""
    found = []
    for x, values in sorted(points, key=lambda point: point[0]):
        finite = [value for value in values if np.isfinite(value)]
        if not finite:
            continue
        if seeds:
            ax.plot([x] * len(finite), finite, **style | {"ls": "none", "ms": 4, "alpha": 0.35, "mec": "none"})
        center, low, _ = statistics.mean_interval(finite)
        found.append((x, center, np.nan_to_num(center - low)))
    if found:
        x, center, half = np.array(found).T
        ax.errorbar(x, center, yerr=half, capsize=3, label=label, **style)


def _places(ax, values):
    """Sets up the horizontal axis; returns where a value is: logarithmic where values are positive and far apart."""
    ticks = sorted(set(values))
    ax.margins(x=0.1)
    if len(ticks) > 1 and ticks[0] > 0 and ticks[-1] / ticks[0] >= 8:
        ax.set_xscale("log")
        ax.set_xticks(ticks, [value_text(tick) for tick in ticks])
        ax.minorticks_off()
        return float
    ax.set_xticks(range(len(ticks)), [value_text(tick) for tick in ticks])
    return ticks.index


def _say_lost(ax, places) -> None:
    lost: dict[float, int] = {}
    for x, group in places:
        lost[x] = lost.get(x, 0) + len(group.outcomes) - len(group.finished)
    for x, count in lost.items():
        if count:
            ax.margins(y=0.12)
            place = ax.get_xaxis_transform()  # x in data, y in parts of the axes
            ax.annotate(f"{count} lost", (x, 0.02), xycoords=place, ha="center", color="#D55E00", fontsize=7)


def _say_who_is_lost(ax, study: Study, setting: str) -> None:
    lost = [group for group in _tuned(study, setting) if len(group.finished) < len(group.outcomes)]
    for line, group in enumerate(reversed(lost)):
        text = f"{group.method}: {len(group.outcomes) - len(group.finished)} of {len(group.outcomes)} runs lost"
        place = {"xy": (0.98, 0.03 + 0.07 * line), "xycoords": "axes fraction", "ha": "right"}
        ax.annotate(text, color=_style(study, group.method)["color"], fontsize=7, **place)


def _figure(panels: list[list], *, across: bool = False, share: str = "row") -> bytes | None:
    """A PNG of panels, with one legend for all of them.

    Args:
      panels: for each setting (or whatever panels are for) its panels, (function of axes and label, label).
      across: panels of a setting stand beside each other, settings below each other; otherwise the other way around.
      share: which panels share the vertical axis: none, row or all.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        return None
    if across:
        grid = panels
    else:
        bands = [panels[start : start + _ACROSS] for start in range(0, len(panels), _ACROSS)]
        grid = [[of_setting[row] for of_setting in band] for band in bands for row in range(len(panels[0]))]
    columns = max(len(row) for row in grid)
    with matplotlib.rc_context(_FONT):
        width = 3.2 * columns if columns > 1 else 4.8
        figure = Figure(figsize=(width, 2.7 * len(grid) + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(grid), columns, squeeze=False, sharey=share)
        named = {}
        for row, (row_axes, line) in enumerate(zip(axes, grid, strict=True)):
            for column, (ax, (draw_panel, label)) in enumerate(zip(row_axes, line, strict=False)):
                draw_panel(ax, label)
                ax.grid(alpha=0.25, lw=0.6)
                ax.spines[["top", "right"]].set_visible(False)
                if column == 0 if across else row % len(panels[0]) == 0:
                    ax.set_title(label)
                if column and share != "none":
                    ax.set_ylabel("")
                named |= {text: handle for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
            for ax in row_axes[len(line) :]:
                ax.set_visible(False)
        if named:
            beside = min(len(named), max(2, int(width / 1.5)))
            figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=beside, frameon=False)
        content = io.BytesIO()
        figure.savefig(content, dpi=_DPI, format="png")
    return content.getvalue()
