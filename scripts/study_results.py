"""Tables and figures of docs/results/README.md, from the sweeps of experiments/configs/study.py.

    python -m scripts.study_results --runs=runs        # reads runs/study_*, writes docs/results/data/study.json
    python -m scripts.study_results                    # tables and figures again, from that file

Each sweep becomes a list of runs, with few numbers for each; tables go to docs/results/study_tables.md, figures beside it.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator

import matplotlib
import numpy as np
import pyarrow.parquet

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.configs import study
from r2vpo_jax.sweeps import statistics

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "results" / "data" / "study.json"
REFERENCE = "ppo_clip"
# Okabe and Ito's colors, and a marker each, so that print and every eye can tell them apart.
STYLE = {
    "r2vpo": ("#0072B2", "o"), "r2vpo_fixed": ("#D55E00", "v"), "r2vpo_A_mu": ("#56B4E9", "P"), "ppo_clip": ("#000000", "s"), "cispo": ("#E69F00", "^"),
    "spo": ("#009E73", "D"), "none": ("#999999", "x"),
}  # fmt: skip
NAMES = {
    "r2vpo": "R²VPO",
    "r2vpo_fixed": "R²VPO, fixed λ",
    "r2vpo_A_mu": "R²VPO, |A|μ",
    "ppo_clip": "PPO clip",
    "cispo": "CISPO",
    "spo": "SPO",
    "none": "none",
}
# axis -> (what its levels are, them)
LEVELS = {
    "headline": ("lag, iterations", (0, 8)),
    "again": ("", ("",)),
    "stale": ("lag, iterations", (8,)),
    "decoupled": ("lag, iterations", (8,)),
    "lag": ("lag, iterations", (0, 4, 16, 64)),
    "updates": ("updates a batch", (1, 4, 16, 64)),
    "rate": ("learning rate, times the tuned one", (1, 3, 10)),
    "rarity": ("rare tokens needed in a row", (2, 3, 4)),
    "precision": ("weights of the sampler", ("float32", "bfloat16", "int8")),
    "length": ("", ("",)),
    "penalties": ("", ("",)),
}
_MEANS = {  # name here -> column of curves.parquet; mean over the second half of the run
    "V": "ratio/variance_mean",
    "ess": "ratio/effective_sample_size",
    "killed": "clip/fraction",
    "entropy": "policy/entropy",
    "at_stake": "keeps/at_stake",
    "retained": "keeps/retained",
    "restoring": "keeps/restoring",
    "top_token": "ratio/top_token_share",
    "lambda": "dual/variance_coef",
}


def cells_of(axis: str, task: str = "eureka") -> list[tuple[str, object]]:
    """(method, level) of each cell, in the order of the sweep."""
    levels = LEVELS[axis][1]
    methods = study.main_methods("arithmetic" if axis == "length" else task)
    if axis == "again":
        return [(name, "") for name in study.AGAIN]
    if axis == "penalties":
        return [(name, "") for name in study.METHODS if name not in study.MAIN]
    if axis == "rate":
        return [(name, level) for level in levels for name in methods]
    return [(name, level) for name in methods for level in levels]


def read(workdir: pathlib.Path, axis: str, task: str) -> list[dict]:
    """The runs of a sweep that has ended."""
    cells = json.loads((workdir / "sweep.json").read_text())["sweep"]["cells"]
    cells = dict(zip(cells, cells_of(axis, task), strict=True))
    results = pyarrow.parquet.read_table(workdir / "results.parquet").to_pylist()
    curves = pyarrow.parquet.read_table(workdir / "curves.parquet")
    curves = curves.select(["run", "kind", "iteration", *(c for c in _MEANS.values() if c in curves.column_names)])
    runs: dict = {}
    for row in results:
        method, level = cells[row["cell"]]
        run = runs.setdefault(
            row["run"], {"method": method, "level": level, "seed": row["seed"], "status": row["status"], "curve": []}
        )
        if row["split"] == "validation":
            run["curve"].append((row["rollouts"], round(row["pass_at_1"], 4)))
        elif row["split"] == "test":
            run["base" if row["iteration"] == 0 else "final"] = round(row["pass_at_1"], 5)
    trained: dict = {}
    for row in curves.to_pylist():
        if row["kind"] == "train":
            trained.setdefault(row["run"], []).append(row)
    for name, rows in trained.items():
        half = rows[len(rows) // 2 :]
        for short, column in _MEANS.items():
            values = [row[column] for row in half if row.get(column) is not None and np.isfinite(row[column])]
            if values:
                runs[name][short] = float(f"{np.mean(values):.4g}")
    return list(runs.values())


# Tables -----------------------------------------------------------------------------------------------------------


def scores(runs, method, level) -> dict[int, float]:
    """seed -> final pass@1; a collapsed run scores 0 (protocol)."""
    return {
        run["seed"]: run.get("final", 0.0) if run["status"] == "finished" else 0.0
        for run in runs
        if run["method"] == method and run["level"] == level
    }


def reached(runs, method, level, target) -> tuple[list[float], list[bool]]:
    """(rollouts, whether the target was reached by then) of each run."""
    found = []
    for run in runs:
        if run["method"] == method and run["level"] == level and run["curve"]:
            first = next((rollouts for rollouts, score in run["curve"] if score >= target), None)
            found.append((first or run["curve"][-1][0], first is not None))
    return tuple(zip(*found, strict=True)) if found else ((), ())


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")


def _paired(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Mean and interval of the differences at the seeds of `ours`."""
    d = statistics.paired_difference(list(ours.values()), [theirs[seed] for seed in ours])
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def tables(found: dict[str, list[dict]]) -> Iterator[str]:
    """Markdown."""
    for name, runs in found.items():
        axis, task = name.split(" ")
        title, levels = LEVELS[axis]
        target = float(np.median([max(score for _, score in run["curve"]) for run in runs]))
        base = np.mean([run["base"] for run in runs if "base" in run])
        seeds = len({run["seed"] for run in runs})
        yield f"## {axis}, {task}: {len(runs)} runs, {seeds} seeds\n"
        yield (
            f"Base model {base:.3f} on the test problems; rollouts to {target:.2f} on validation. What is measured (V to entropy) is of the median run; retained and restoring are shares of the gradient that a clip at 0.2 would cut.\n"
        )
        yield f"| {title or 'setting'} | method | final pass@1 | IQM | less {NAMES[REFERENCE]}, paired | p | rollouts to target | not reached | lost | V | of it one token | killed | retained | restoring | ESS | entropy |"
        yield "|" + "---|" * 16
        methods = list(dict.fromkeys(run["method"] for run in runs))
        for level in levels:
            theirs = scores(runs, REFERENCE, level)
            for method in methods:
                ours = scores(runs, method, level)
                if not ours:
                    continue
                values = list(ours.values())
                mean, iqm = statistics.mean_interval(values), statistics.iqm_interval(values)
                paired, p = "–", "–"
                if method != REFERENCE and set(theirs) == set(ours):
                    d = statistics.paired_difference(values, [theirs[seed] for seed in ours])
                    paired, p = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]", f"{d.p_value:.3f}"
                time = statistics.rollouts_to_target(*reached(runs, method, level, target))
                mine = [run for run in runs if run["method"] == method and run["level"] == level]
                more = [
                    f"{np.median([run[key] for run in mine if key in run]):.3g}"
                    if any(key in run for run in mine)
                    else "–"
                    for key in ("V", "top_token", "killed", "retained", "restoring", "ess", "entropy")
                ]
                lost = sum(run["status"] != "finished" for run in mine)
                yield (
                    f"| {'–' if level == '' else level} | {_escaped(NAMES.get(method, method))} | {mean.value:.3f} ± {mean.high - mean.value:.3f} | {iqm.value:.3f} | "
                    f"{paired} | {p} | {time.median:.0f} | {time.censored}/{time.n} | {lost} | {' | '.join(more)} |"
                )
        yield ""


def speed_tables(found: dict[str, list[dict]]) -> Iterator[str]:
    """Markdown: how many rollouts it takes, for the comparisons with most seeds."""
    for name, runs in found.items():
        if name.split(" ")[0] not in ("again", "headline", "stale", "decoupled"):
            continue
        target = float(np.median([max(score for _, score in run["curve"]) for run in runs]))
        for level in dict.fromkeys(run["level"] for run in runs):
            methods = list(dict.fromkeys(run["method"] for run in runs))
            yield f"## rollouts: {name}" + (f", lag {level}" if level != "" else "") + "\n"
            yield "| method | area under the curve | less PPO clip, paired | times fewer rollouts than PPO clip | sigmoids identified | their A, median | their C_mid, median |"
            yield "|" + "---|" * 7
            for method in methods:
                ours = {run["seed"]: run for run in runs if run["method"] == method and run["level"] == level}
                theirs = {run["seed"]: run for run in runs if run["method"] == REFERENCE and run["level"] == level}
                areas = [
                    [statistics.area_under_curve(*zip(*some[seed]["curve"], strict=True)) for seed in ours]
                    for some in (ours, theirs)
                ]
                fits = [statistics.fit_sigmoid(*zip(*run["curve"], strict=True)) for run in ours.values()]
                fits = [fit for fit in fits if fit.identified]
                paired = faster = "–"
                if method != REFERENCE:
                    d = statistics.paired_difference(*areas)
                    paired = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
                    horizon = max(rollouts for run in ours.values() for rollouts, _ in run["curve"])
                    first = [
                        [next((r for r, s in some[seed]["curve"] if s >= target and r), np.inf) for seed in ours]
                        for some in (ours, theirs)
                    ]
                    ratio = statistics.speedup(*first, horizon)
                    faster = f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] ({ratio.bound})"
                shape = [
                    f"{np.median([getattr(fit, key) for fit in fits]):.3g}" if fits else "–"
                    for key in ("ceiling", "midpoint")
                ]
                yield (
                    f"| {_escaped(NAMES.get(method, method))} | {np.mean(areas[0]):.3f} | {paired} | {faster} | "
                    f"{len(fits)}/{len(ours)} | {' | '.join(shape)} |"
                )
            yield ""


def forms_table(found: dict[str, list[dict]]) -> Iterator[str]:
    """Markdown: what correcting for the age of stale data is worth to each method."""
    direct, decoupled = found.get("stale eureka"), found.get("decoupled eureka")
    if not direct or not decoupled:
        return
    clip = max((scores(runs, REFERENCE, 8) for runs in (direct, decoupled)), key=lambda some: sum(some.values()))
    yield "## direct and decoupled form, eureka, lag 8\n"
    yield "Each as tuned there; the same seeds. The clip's better form is that of the higher mean.\n"
    yield "| method | direct | decoupled | decoupled less direct, paired | decoupled less the clip's better form, paired |"
    yield "|---|---|---|---|---|"
    for method in study.MAIN:
        ours, theirs = (scores(runs, method, 8) for runs in (decoupled, direct))
        means = [f"{np.mean(list(some.values())):.3f}" for some in (theirs, ours)]
        means += [_paired(ours, others) for others in (theirs, clip)]
        yield f"| {_escaped(NAMES[method])} | {' | '.join(means)} |"
    yield ""


def shapes_table(found: dict[str, list[dict]]) -> Iterator[str]:
    """Markdown: other penalties and methods at the seeds that the plain adaptive penalty has in the headline."""
    others, plain = found.get("penalties eureka"), found.get("headline eureka")
    if not others or not plain:
        return
    seeds = {run["seed"] for run in others}
    yield "## shapes of the penalty and other methods, eureka, no lag\n"
    yield f"Each as tuned with three seeds; {len(seeds)} test seeds; those of the headline where they are the same.\n"
    yield "| method | final pass@1 | less R²VPO, paired |\n|---|---|---|"

    def row(method, ours, base):
        mean = statistics.mean_interval(list(ours.values()))
        difference = "–" if ours is base else _paired(ours, base)
        return f"| {_escaped(NAMES.get(method, method))} | {mean.value:.3f} ± {mean.high - mean.value:.3f} | {difference} |"

    def at_seeds(method):
        return {seed: score for seed, score in scores(plain, method, 0).items() if seed in seeds}

    base = at_seeds("r2vpo")
    yield row("r2vpo", base, base)
    yield row("r2vpo_A_mu", at_seeds("r2vpo_A_mu"), base)
    for method in dict.fromkeys(run["method"] for run in others):
        yield row(method, scores(others, method, ""), base)
    yield ""


def none_table(found: dict[str, list[dict]]) -> Iterator[str]:
    """Markdown: what each trust region is worth against none, where the same method steps too far."""
    strained = [("rate eureka", 3), ("updates eureka", 64), ("lag eureka", 4), ("lag eureka", 16)]
    strained = [(name, level) for name, level in strained if name in found]
    if not strained:
        return
    yield "## against no trust region, eureka\n"
    yield "Final pass@1 less that of no trust region, paired.\n"
    yield "| method | " + " | ".join(f"{LEVELS[name.split(' ')[0]][0]}: {level}" for name, level in strained) + " |"
    yield "|" + "---|" * (1 + len(strained))
    for method in study.MAIN[:-1]:
        cells = []
        for name, level in strained:
            ours, none = scores(found[name], method, level), scores(found[name], "none", level)
            cells.append(_paired(ours, none))
        yield f"| {_escaped(NAMES[method])} | {' | '.join(cells)} |"
    yield ""


def displacement_table(found: dict[str, list[dict]]) -> Iterator[str]:
    """Markdown: how runs that learned much differ in what was measured."""
    runs = displaced(found)
    if not runs:
        return
    good = [run for run in runs if run["final"] > 0.6]
    within = {
        "V in (0.02, 1)": ("V", 0.02, 1),
        "killed in (0.03, 0.06)": ("killed", 0.03, 0.06),
        "ESS above 0.8": ("ess", 0.8, 2),
    }

    def share(some, key, low, high):
        return np.mean([low < run.get(key, np.nan) < high for run in some])

    yield f"## displacement: {len(runs)} runs on eureka with more than one update a batch, {len(good)} of which end above 0.6\n"
    yield "| | of those above 0.6 | of all |\n|---|---|---|"
    for name, limits in within.items():
        yield f"| {name} | {share(good, *limits):.2f} | {share(runs, *limits):.2f} |"
    inside = [run for run in runs if all(share([run], *limits) for limits in within.values())]
    outside = [run for run in runs if run not in inside]
    means = [np.mean([run["final"] for run in some]) for some in (inside, outside)]
    yield f"\nAll three: {len(inside)} runs, mean final pass@1 {means[0]:.3f}; the others {means[1]:.3f}.\n"


def displaced(found: dict[str, list[dict]]) -> list[dict]:
    """The finished runs on eureka of the methods with a color whose policy moved within a batch.

    Not those of the decoupled form, whose ratio is against another policy.
    """
    apart = ("penalties eureka", "decoupled eureka")
    runs = [run for name, some in found.items() if name.endswith(" eureka") and name not in apart for run in some]
    return [run for run in runs if run["method"] in STYLE and run["status"] == "finished" and run.get("V", 0) > 1e-6]


# Figures ----------------------------------------------------------------------------------------------------------


def draw_axes(found: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Final accuracy over each axis: mean and t interval of each method."""
    there = [name for name in found if name.split(" ")[0] in ("lag", "updates", "rate", "rarity", "precision")]
    if not there:
        return
    with pyplot.rc_context({"font.size": 9}):
        figure, axes = pyplot.subplots(2, 3, figsize=(9.5, 6.2), sharey=True)
        for ax in axes.flat[len(there) :]:
            ax.set_axis_off()
        for ax, name in zip(axes.flat, there, strict=False):
            title, levels = LEVELS[name.split(" ")[0]]
            for number, method in enumerate(STYLE):
                color, marker = STYLE[method]
                shown = [
                    statistics.mean_interval(list(scores(found[name], method, level).values())) for level in levels
                ]
                x = np.arange(len(levels)) + 0.05 * (number - 2.5)
                mean = np.array([one.value for one in shown])
                error = np.array([one.high - one.value for one in shown])
                ax.errorbar(x, mean, error, color=color, marker=marker, ms=4, lw=1.2, capsize=2, label=NAMES[method])
            ax.set_xticks(range(len(levels)), levels)
            ax.set(xlabel=title)
            ax.set_ylim(0, 1)
            ax.spines[["top", "right"]].set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("final pass@1 on eureka (test)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=7, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.95))
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def draw_headline(found: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Paired differences to the clip where seeds are most, a panel for each comparison."""
    panels = [
        ("again eureka", ""), ("headline countdown", 0), ("headline arithmetic", 0),
        ("stale eureka", 8), ("headline countdown", 8), ("headline arithmetic", 8),
    ]  # fmt: skip
    panels = [(name, level) for name, level in panels if name in found]
    if not panels:
        return
    methods = [method for method in STYLE if method != REFERENCE][::-1]  # of which some were not run on every task
    with pyplot.rc_context({"font.size": 9}):
        figure, axes = pyplot.subplots(2, 3, figsize=(9.5, 6.2), sharey=True)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax, (name, level) in zip(axes.flat, panels, strict=False):
            theirs = scores(found[name], REFERENCE, level)
            for y, method in enumerate(methods):
                color, marker = STYLE[method]
                if not (ours := scores(found[name], method, level)):
                    continue
                d = statistics.paired_difference(list(ours.values()), [theirs[seed] for seed in ours])
                error = [[d.mean - d.low], [d.high - d.mean]]
                ax.errorbar(d.mean, y, xerr=error, color=color, marker=marker, capsize=3)
                each = [ours[seed] - theirs[seed] for seed in ours]
                ax.plot(each, [y - 0.25] * len(each), ".", color=color, ms=3, alpha=0.6)
            ax.axvline(0, color="black", lw=0.8)
            ax.set_yticks(range(len(methods)), [NAMES[method] for method in methods])
            clip = np.mean(list(theirs.values()))
            ax.set_title(f"{name.split(' ')[1]}, lag {level or 0}\n(PPO clip {clip:.2f})", fontsize=9)
            ax.set_xlabel("final pass@1\nless PPO clip's")
            ax.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def draw_displacement(found: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Final accuracy against the displacement that was measured, all axes on eureka together."""
    runs = displaced(found)
    if not runs:
        return
    with pyplot.rc_context({"font.size": 9}):
        figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.4), sharey=True)
        labels = {
            "V": "measured V = E[(r − 1)²]",
            "killed": "share of tokens that a clip at 0.2 would cut",
            "ess": "effective sample size of the batch",
        }
        for ax, (key, label) in zip(axes, labels.items(), strict=True):
            for method, (color, marker) in STYLE.items():
                points = [(run[key], run["final"]) for run in runs if run["method"] == method and key in run]
                ax.plot(
                    *zip(*points, strict=True), marker, color=color, ms=3, alpha=0.5, ls="none", label=NAMES[method]
                )
            if key == "V":
                ax.set_xscale("log")
            ax.set(xlabel=label)
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("final pass@1 on eureka (test)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=7, frameon=False, markerscale=1.6)
        figure.tight_layout(rect=(0, 0, 1, 0.91))
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, help="directory of the sweeps study_AXIS or study_AXIS_TASK")
    given = parser.parse_args().runs
    found = json.loads(DATA.read_text()) if DATA.exists() else {}
    if given:
        for workdir in sorted(path.parent for path in given.glob("study_*/results.parquet")):
            axis, _, task = workdir.name.removeprefix("study_").partition("_")
            if axis in LEVELS:
                task = task or ("long" if axis == "length" else "eureka")
                found[f"{axis} {task}"] = read(workdir, axis, task)
        order = list(LEVELS)
        found = dict(sorted(found.items(), key=lambda item: order.index(item[0].split(" ")[0])))
        DATA.parent.mkdir(exist_ok=True)
        DATA.write_text(
            "{\n"
            + ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, runs)) + "\n]" for name, runs in found.items())
            + "\n}\n"
        )
    where = DATA.parent.parent
    (where / "study_tables.md").write_text(
        "# Tables of the study\n\nMade by `python -m scripts.study_results`.\n\n"
        + "\n".join(
            [
                *tables(found),
                *speed_tables(found),
                *forms_table(found),
                *shapes_table(found),
                *none_table(found),
                *displacement_table(found),
            ]
        )
    )
    draw_headline(found, where / "study_headline.png")
    draw_axes(found, where / "study_axes.png")
    draw_displacement(found, where / "study_displacement.png")


if __name__ == "__main__":
    main()
