"""From outcomes to scores and tables. Pure functions: the same outcomes give the same bytes."""

import re

import numpy as np

from r2vpo_jax.evaluation import estimators
from r2vpo_jax.verifiers.outcome import Outcome


def pass_sizes(k: int) -> list[int]:
    """1, 2, 4, ... below k, and k."""
    return [j for j in (2**i for i in range(k.bit_length())) if j < k] + [k]


def values_by_problem(rows: list[dict]) -> dict[str, np.ndarray]:
    """Every score of each problem, [problems]; their means are the scores of the benchmark.

    The names are those of a run's scores: pass_at_1 is the mean over all k samples (avg@k).

    Args:
      rows: of outcomes.jsonl, k outcomes each.
    """
    right = np.array([row["outcomes"] for row in rows]) == Outcome.RIGHT
    k = right.shape[1]
    values = {f"pass_at_{j}": estimators.pass_at_k(k, right.sum(axis=1), j) for j in pass_sizes(k)}
    values["pass_at_1"] = right.mean(axis=1)  # the same number, to the last bit what a run reports
    values[f"majority_at_{k}"] = estimators.majority_at_k(right, [row["answers"] for row in rows])
    if rows[0]["greedy"] is not None:
        values["greedy"] = np.array([row["greedy"]["outcome"] == Outcome.RIGHT for row in rows], np.float64)
    return values


def _scores(rows: list[dict]) -> dict:
    """Scores with intervals, and what the responses were like."""
    scores = {}
    for name, values in values_by_problem(rows).items():
        low, high = estimators.bootstrap_interval(values)
        scores[name] = {"value": float(values.mean()), "low": low, "high": high}
    lengths = np.array([row["lengths"] for row in rows])
    outcomes = np.array([row["outcomes"] for row in rows])
    greedy = [row["greedy"]["outcome"] for row in rows if row["greedy"] is not None]
    return {
        "problems": len(rows),
        "k": outcomes.shape[1],
        "average_at": outcomes.shape[1],
        "scores": scores,
        "response_length": {"mean": float(lengths.mean()), "max": int(lengths.max())},
        "truncated": float(np.mean([row["truncated"] for row in rows])),
        "without_answer": float(np.mean([[answer is None for answer in row["answers"]] for row in rows])),
        "verifier_errors": int((outcomes == Outcome.ERROR).sum()),
        "verifier_timeouts": int((outcomes == Outcome.TIMEOUT).sum()),
        "greedy_verifier_errors": greedy.count(Outcome.ERROR),
        "greedy_verifier_timeouts": greedy.count(Outcome.TIMEOUT),
    }


def _natural(label: str) -> list:
    """Sorts "level 10" behind "level 9"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", label) if part]


def summarize(identity: dict, rows: list[dict]) -> dict:
    """What evaluation.json holds.

    Args:
      identity: what was evaluated and how (config.json of the evaluation).
      rows: of outcomes.jsonl, all of them.
    """
    benchmarks = []
    for spec, task in identity["tasks"].items():
        mine = [row for row in rows if row["task"] == spec]
        levels = sorted({row["level"] for row in mine}, key=_natural)
        benchmarks.append(
            {
                "task": spec,
                "notices": task["notices"],
                "settings": {
                    "k": identity["k"],
                    **identity["evaluation"],
                    "max_response_length": task["max_response_length"],
                    "seed": identity["seed"],
                },
                **_scores(mine),
                "levels": {level: _scores([row for row in mine if row["level"] == level]) for level in levels},
            }
        )
    return {"evaluated": identity, "benchmarks": benchmarks}


# Tables ----------------------------------------------------------------------------------------------------

_SETTINGS = ("n", "k", "temperature", "top-p", "top-k", "max length", "seed")


def _settings(group: dict, settings: dict, *, greedy=False) -> list[str]:
    """What every row says besides its numbers; a greedy score is of one sample at temperature 0."""
    top_k = settings["top_k"] or "all"
    sampling = (1, 0, "-", "-") if greedy else (settings["k"], settings["temperature"], settings["top_p"], top_k)
    seed = "-" if greedy else settings["seed"]
    return [str(x) for x in (group["problems"], *sampling, settings["max_response_length"], seed)]


def _table(header, rows) -> str:
    """Markdown with padded columns: readable on a terminal too."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _label(name: str) -> str:
    """A score's name in tables."""
    return name.replace("majority_at_", "maj@").replace("pass_at_", "pass@")


def _cell(score: dict) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _score_table(groups: dict[str, tuple[dict, dict]], first: str) -> str:
    """One row a group: (scores, settings) by label."""
    first_group, settings = next(iter(groups.values()))
    k = settings["k"]
    names = dict.fromkeys(["pass_at_1", f"pass_at_{k}", f"majority_at_{k}", "greedy"])
    shown = [name for name in names if name in first_group["scores"]]
    rows = [
        [label, *(_cell(group["scores"][name]) for name in shown), *_settings(group, settings)]
        for label, (group, settings) in groups.items()
    ]
    return _table([first, *map(_label, shown), *_SETTINGS], rows)


def _response_table(groups: dict[str, tuple[dict, dict]], first: str) -> str:
    header = [first, "mean length", "longest", "truncated", "no answer", "errors", "timeouts", *_SETTINGS]
    rows = [
        [
            label,
            f"{group['response_length']['mean']:.1f}",
            group["response_length"]["max"],
            f"{group['truncated']:.3f}",
            f"{group['without_answer']:.3f}",
            group["verifier_errors"],
            group["verifier_timeouts"],
            *_settings(group, settings),
        ]
        for label, (group, settings) in groups.items()
    ]
    return _table(header, rows)


def _benchmark(benchmark: dict) -> list[str]:
    settings = benchmark["settings"]
    rows = [
        [
            _label(name),
            f"{s['value']:.3f}",
            f"[{s['low']:.3f}, {s['high']:.3f}]",
            *_settings(benchmark, settings, greedy=name == "greedy"),
        ]
        for name, s in benchmark["scores"].items()
    ]
    parts = [
        f"## {benchmark['task']}",
        *benchmark["notices"],
        _table(["score", "value", "95 % interval", *_SETTINGS], rows),
    ]
    if len(benchmark["levels"]) > 1:
        levels = {label: (group, settings) for label, group in benchmark["levels"].items()}
        parts += [_score_table(levels, "level"), _response_table(levels, "level")]
    return parts


def markdown(summary: dict) -> str:
    """What evaluation.md holds: all benchmarks, then each with its scores and levels."""
    evaluated = summary["evaluated"]
    model = evaluated["model"]
    checkpoint = "" if evaluated["checkpoint"] is None else f", checkpoint {evaluated['checkpoint']}"
    groups = {benchmark["task"]: (benchmark, benchmark["settings"]) for benchmark in summary["benchmarks"]}
    parts = [
        "# Evaluation",
        f"Model: {model['path']}{checkpoint} (digest {model['digest']}, computed in {model['compute_dtype']}). Intervals "
        "are 95 %, by bootstrap over problems. pass@1 is the mean over all k samples (avg@k); pass@j is unbiased; maj@k is "
        "the share of right majority answers; greedy is one sample per problem at temperature 0.",
        _score_table(groups, "benchmark"),
        _response_table(groups, "benchmark"),
    ]
    for benchmark in summary["benchmarks"]:
        parts += _benchmark(benchmark)
    return "\n\n".join(parts) + "\n"
