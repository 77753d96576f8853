"""The report of a sweep: one HTML page that needs no other file, and its pictures. docs/statistics.md explains the columns."""

import html
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files
from r2vpo_jax.run.pages import markup
from r2vpo_jax.sweeps import results, statistics, study_pictures
from r2vpo_jax.sweeps import study as study_lib
from r2vpo_jax.sweeps.study import Group, Outcome, Study

REFERENCE = "ppo_clip"
_NONE = "–"


def write(workdir, *, reference: str | None = None, target: float = results.TARGET) -> pathlib.Path:
    """Write WORKDIR/report.html and the pictures of it in WORKDIR/report/, from the files of a sweep that has ended.

    Args:
      workdir: of the sweep.
      reference: the objective with which others are compared; by default `REFERENCE` where the sweep has it.
      target: "rollouts to": first validation score of at least this.

    Returns:
      The page.

    Raises:
      UsageError: the sweep has not ended, or has no such objective.
    """
    workdir = pathlib.Path(workdir)
    study = study_lib.read(workdir)
    objectives = list(dict.fromkeys(group.cell.objective for group in study.groups))
    if reference is not None and reference not in objectives:
        raise UsageError(f"--reference={reference} is not in this sweep; it has {', '.join(objectives)}")
    drawn = list(study_pictures.draw(study))
    with files.disk_errors(f"--workdir={workdir}"):
        (workdir / "report").mkdir(exist_ok=True)
        for picture in drawn:
            files.write_atomically(workdir / "report" / f"{picture.name}.png", picture.png)
        files.write_atomically(workdir / "report.html", page(study, drawn, reference or REFERENCE, target))
    return workdir / "report.html"


def page(study: Study, pictures: Sequence[study_pictures.Picture], reference: str, target: float) -> str:
    """The HTML page.

    Args:
      study: the sweep.
      pictures: of it.
      reference: objective that others are compared with; where a setting does not have it, nothing is compared.
      target: of "rollouts to".
    """
    ended = {
        status: sum(group.count(status) for group in study.groups) for status in ("finished", "collapsed", "failed")
    }
    total = sum(ended.values())
    sections = [
        f"<h1>{html.escape(study.name)}</h1>",
        f"<p>{total} runs: {len(study.groups)} cells × {study.seeds} seeds; {ended['finished']} finished, "
        f"{ended['collapsed']} collapsed (became non-finite), {ended['failed']} failed. Pass@1 of the base model on the test "
        f"problems: {html.escape(_bases(study))}.</p>",
        "<h2>How good, and how sure</h2>",
        _table(study, _quality_columns(study, reference)),
        f"<p>Intervals are 95 %. A star marks the cell of each method that did best on validation. Differences are paired by "
        f"seed, to the starred cell of {html.escape(reference)} in the same setting; p is by sign flips and not corrected "
        "for the number of rows. <i>Detectable</i> is the difference that a paired test at this n and spread finds with a "
        "chance of 80 %. The interval of the probability of improvement is a bootstrap, too narrow below about 20 seeds.</p>",
        "<h2>How fast</h2>",
        _table(study, _speed_columns(study, reference, target)),
        f"<p>Rollouts to {target:g} on validation: median by Kaplan and Meier, in which runs that did not reach it, "
        "or were lost, count as censored. Times fewer: geometric mean of paired ratios; a run that did not reach it is taken at the "
        "end, which makes the ratio a bound, or none if runs of both sides were cut off. A and C_mid: R0 + (A − R0) / (1 + (C_mid / C)^B), fitted to each run; means "
        "over the fits that are identified.</p>",
        *(
            f"<h2>{html.escape(picture.title)}</h2>{markup.picture(picture.png, picture.title)}"
            f"<p>{html.escape(picture.caption)}</p>"
            for picture in pictures
        ),
    ]
    return markup.page(f"{study.name}: sweep", "\n".join(sections) + "\n")


# Tables -----------------------------------------------------------------------------------------------------------

_Columns = list[tuple[str, Callable[[Group], str]]]


def _table(study: Study, columns: _Columns) -> str:
    """One row a cell; settings and coefficients only where they differ."""
    starred = {id(group) for group in study.chosen.values()}
    star = len(starred) < len(study.groups)
    shown: _Columns = [
        ("method", lambda group: group.method + (" *" if star and id(group) in starred else "")),
        ("coefficients", lambda group: group.coefficients),
        ("setting", lambda group: group.setting),
    ]
    shown = [(title, of) for title, of in shown if any(map(of, study.groups))]
    rows = [[of(group) for _, of in (*shown, *columns)] for group in study.groups]
    head = "".join(f"<th>{html.escape(title)}</th>" for title, _ in (*shown, *columns))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _quality_columns(study: Study, reference: str) -> _Columns:
    against = {setting: study.reference(setting, reference) for setting in study.settings}

    def pair(of: Callable[[np.ndarray, np.ndarray], str]):
        def text(group: Group) -> str:
            theirs = against[group.setting]
            if theirs is None or theirs is group:
                return _NONE
            both = _pairs(group, theirs)
            return of(*both.T) if len(both) > 1 else _NONE

        return text

    def improvement(group: Group) -> str:
        theirs = against[group.setting]
        if theirs is None or theirs is group or not (group.finished and theirs.finished):
            return _NONE
        return _interval(statistics.probability_of_improvement(_finals(group), _finals(theirs)), 2)

    def difference(ours, theirs):
        found = statistics.paired_difference(ours, theirs)
        return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], n = {found.n}"

    def told(ours, theirs):
        found = statistics.paired_difference(ours, theirs)
        return "better" if found.low > 0 else "worse" if found.high < 0 else "cannot be told"

    def verdict(group: Group) -> str:
        text, theirs = pair(told)(group), against[group.setting]
        lost = text != _NONE and any(len(side.finished) < len(side.outcomes) for side in (group, theirs))
        return text + (", among survivors" if lost else "")

    def detectable(ours, theirs):
        spread = float(np.std(ours - theirs, ddof=1))
        return f"{statistics.minimum_detectable_difference(spread, len(ours)):.3f}"

    compared: _Columns = [
        (f"difference to {reference}", pair(difference)),
        ("p", pair(lambda ours, theirs: f"{statistics.paired_difference(ours, theirs).p_value:.3f}")),
        ("verdict", verdict),
        ("detectable", pair(detectable)),
        ("probability of improvement", improvement),
    ]
    return [
        ("finished", lambda group: f"{len(group.finished)}/{len(group.outcomes)}"),
        ("final pass@1 (test), IQM", lambda group: _interval(statistics.iqm_interval(_finals(group)), 3)
            if group.finished else _NONE),
        *(compared if any(against.values()) else []),
        ("collapse rate", lambda group: _interval(
            statistics.collapse_rate(group.count("collapsed"), len(group.outcomes)), 2)),
        *([("failed", lambda group: str(group.count("failed")))] if any(g.count("failed") for g in study.groups) else []),
    ]  # fmt: skip


def _speed_columns(study: Study, reference: str, target: float) -> _Columns:
    ends = [run.validation["rollouts"][-1] for group in study.groups for run in group.finished if _has_curve(run)]
    horizon = max(ends, default=0.0)
    against = {setting: study.reference(setting, reference) for setting in study.settings}

    def area(group: Group) -> str:
        areas = [statistics.area_under_curve(*_curve(run)) for run in group.finished if _has_curve(run)]
        return _interval(statistics.mean_interval(areas), 3) if areas else _NONE

    def time(group: Group) -> str:
        times = np.array([_rollouts_to(run, target) for run in group.outcomes])
        reached = np.isfinite(times)
        found = statistics.rollouts_to_target(np.where(reached, times, horizon), reached)
        median = f"{found.median:.0f}" if np.isfinite(found.median) else f"> {horizon:.0f}"
        return f"{median} ({found.censored} of {found.n} censored)"

    def faster(group: Group) -> str:
        theirs = against[group.setting]
        if theirs is None or theirs is group:
            return _NONE
        times = {run.seed: _rollouts_to(run, target) for run in theirs.outcomes}
        pairs = np.array([(_rollouts_to(run, target), times[run.seed]) for run in group.outcomes])
        if not np.isfinite(pairs).any() or np.any(pairs == 0):  # nobody gets there, or the base model is there
            return _NONE
        found = statistics.speedup(*pairs.T, horizon)
        if found.bound == "unknown":  # its interval would be narrow for the wrong reason
            return f"{found.ratio:.2f}, no bound"
        return ("" if found.bound == "exact" else f"{found.bound} ") + _interval(found[:3], 2)

    def fits(group: Group) -> list[statistics.SigmoidFit]:
        fitted = [statistics.fit_sigmoid(*_curve(run)) for run in group.finished if _has_curve(run)]
        return [fit for fit in fitted if fit.identified]

    def ceiling(group: Group) -> str:
        found = fits(group)
        return _interval(statistics.mean_interval([fit.ceiling for fit in found]), 3) if found else _NONE

    def midpoint(group: Group) -> str:
        found = fits(group)
        count = f"({len(found)} of {len(group.finished)} identified)"
        if not found:
            return f"{_NONE} {count}"
        logs = statistics.mean_interval(np.log([fit.midpoint for fit in found]))
        return f"{_interval(tuple(np.exp(logs)), 0)} {count}"

    return [
        ("area under validation curve", area),
        (f"rollouts to {target:g}", time),
        *([(f"times fewer than {reference}", faster)] if any(against.values()) else []),
        ("A", ceiling),
        ("C_mid, rollouts", midpoint),
    ]


def _finals(group: Group) -> list[float]:
    return [run.final for run in group.finished]


def _pairs(ours: Group, theirs: Group) -> np.ndarray:
    """Final scores of the seeds that finished on both sides, [seeds, 2]."""
    scores = {run.seed: run.final for run in theirs.finished}
    return np.array([(run.final, scores[run.seed]) for run in ours.finished if run.seed in scores]).reshape(-1, 2)


def _curve(run: Outcome) -> tuple[np.ndarray, np.ndarray]:
    return run.validation["rollouts"], run.validation["pass_at_1"]


def _has_curve(run: Outcome) -> bool:
    return len(run.validation["rollouts"]) > 1


def _rollouts_to(run: Outcome, target: float) -> float:
    """The first validation that reached the target; inf if none did, or the run was lost."""
    rollouts, scores = _curve(run)
    reached = rollouts[scores >= target]
    return float(reached[0]) if len(reached) and run.status == "finished" else np.inf


def _interval(found: Sequence[float], digits: int) -> str:
    """0.91 [0.88, 0.94]; the number alone where one seed has no interval."""
    value, low, high = (f"{number:.{digits}f}" for number in found)
    return f"{value} [{low}, {high}]" if np.isfinite(found[1]) else value


def _bases(study: Study) -> str:
    scores = {f"{run.base:.3f}" for group in study.groups for run in group.finished}
    return ", ".join(sorted(scores)) or _NONE
