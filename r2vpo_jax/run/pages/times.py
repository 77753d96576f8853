"""Where the time of a run went, from the time columns of its metrics: all of it adds up to the clock."""

from collections.abc import Mapping, Sequence
from typing import Any

from r2vpo_jax.run.pages import charts
from r2vpo_jax.run.pages.markup import duration, table

_BARS = 60
PHASES = {  # column of metrics.jsonl -> (name, what it is)
    "rollout": ("sample", "responses drawn by the sampler"),
    "verify": ("verify", "responses judged"),
    "score": ("score", "log-probabilities under the reference, values, advantages"),
    "update": ("update", "the optimizer's updates, with what they score themselves"),
    "wait": ("wait", "learning waited for responses"),
    "sync": ("sync", "processes waited for each other"),
    "weights": ("weights", "weights on their way to the devices that sample"),
    "compile": ("compile", "programs compiled, inside of any of these"),
    "evaluation": ("evaluate", "validation scores"),
    "checkpoint": ("save", "checkpoints, as far as the loop waits for them"),
    "report": ("report", "this page, and the tokens that it shows"),
}
OTHER = "other"
_COLORS = {  # of the page; phases that are not here are "other" in the drawing
    "rollout": 0, "verify": 8, "score": 4, "update": 1, "wait": 3, "sync": 6, "compile": 5, "evaluation": 2, OTHER: 9,
}  # fmt: skip
_IN_THREAD = ("rollout", "verify", "compile", "sync")  # what may happen beside the loop, in the order of being assumed


def of_loop(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of an iteration by phase as the loop spent them, and `OTHER`: they add up to time/iteration.

    With `replay.overlap` a thread samples and verifies beside the loop: that is taken out, and time/wait is what the loop saw
    of it.

    Args:
      row: of metrics.jsonl, of an iteration, with time/iteration.
    """
    spent = {phase: float(row.get(f"time/{phase}", 0.0)) for phase in PHASES}
    beside = float(row.get("time/beside", 0.0))
    for phase in _IN_THREAD:
        taken = min(spent[phase], beside)
        spent[phase], beside = spent[phase] - taken, beside - taken
    return spent | {OTHER: max(float(row["time/iteration"]) - sum(spent.values()), 0.0)}


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bars and a table as HTML; "" where the lines have no times (a run of a fused sweep).

    Args:
      rows: of metrics.jsonl, of iterations.
    """
    rows = [row for row in rows if "time/iteration" in row]
    if not rows:
        return ""
    spent = [of_loop(row) for row in rows]
    total = {phase: sum(row[phase] for row in spent) for phase in (*PHASES, OTHER)}
    iterations, beside = sum(total.values()), sum(float(row.get("time/beside", 0.0)) for row in rows)
    # What there was before each process came to its loop, and after its last line.
    around = max(float(rows[-1]["time/run"]) - iterations, 0.0)
    phases = [(name, total[phase], what) for phase, (name, what) in PHASES.items() if total[phase] > 0]
    phases += [(OTHER, total[OTHER], "metrics, samples, bookkeeping")]
    phases += [("<b>all iterations</b>", iterations, f"{len(rows)} of them")]
    cells = [(name, what, duration(s), f"{100 * s / max(iterations, 1e-9):.1f} %") for name, s, what in phases]
    cells += [
        ("around them", "start-up, weights read, base scores, noise floor", duration(around), ""),
        ("<b>the run so far</b>", "by the clock", duration(iterations + around), ""),
    ]
    text = f"<p class='small'>Beside the loop, at the same time: {duration(beside)} of sampling and verifying.</p>" * (
        beside > 0
    )
    return _chart(rows, spent) + text + table(("", "what", "time", "of all iterations"), cells, numbers=2)


def _chart(rows: Sequence[Mapping[str, Any]], spent: Sequence[Mapping[str, float]]) -> str:
    """A bar for each iteration; for several of them, their mean, where there are many."""
    there = [
        phase
        for phase in PHASES
        if phase in _COLORS and any(row[phase] > 0.002 * rows[i]["time/iteration"] for i, row in enumerate(spent))
    ]
    number, bars = min(len(rows), _BARS), []
    for place in range(number):
        first, last = place * len(rows) // number, (place + 1) * len(rows) // number
        part = spent[first:last]
        mean = [sum(row[phase] for row in part) / len(part) for phase in there]
        rest = sum(sum(row.values()) for row in part) / len(part) - sum(mean)
        ends = dict.fromkeys((rows[first]["iteration"], rows[last - 1]["iteration"]))
        bars.append((f"iteration {' to '.join(map(str, ends))}", [*mean, max(rest, 0.0)]))
    names = [(PHASES[phase][0], _COLORS[phase]) for phase in there] + [(OTHER, _COLORS[OTHER])]
    many = ", means of several" if number < len(rows) else ""
    return charts.stacked_chart(f"Seconds of each iteration{many}", bars, names, unit="s")
