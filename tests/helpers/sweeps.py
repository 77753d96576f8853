"""What runs of a sweep leave behind, made up."""

import json
import pathlib

import numpy as np


def leave_run(folder: pathlib.Path, config, *, final=0.9, iterations=3, collapsed_at=None):
    """The files of a run that ended: finished, or collapsed after an iteration. Numbers depend on the seed."""
    generator = np.random.default_rng(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    budget = config.objective.variance_budget
    rows = [evaluation("test", 0, 0.3), evaluation("validation", 0, 0.3)]
    last = iterations if collapsed_at is None else collapsed_at
    for i in range(1, last + 1):
        score = 0.3 + (final - 0.3) * i / iterations
        rows.append(
            {
                "kind": "train",
                "iteration": i,
                "rollouts": 100 * i,
                "reward/mean": score + 0.02 * generator.normal(),
                "ratio/variance": (budget or 0.001) * float(np.exp(0.3 * generator.normal())),
                "ratio/variance_mean": 0.3 * (budget or 0.001) * i,
                "ratio/effective_sample_size": 0.99,
                "policy/entropy": 0.15 - 0.01 * i,
                "keeps/at_stake": 0.001,
                "keeps/retained": "nan" if i == 1 else 0.5,
                "keeps/restoring": "nan" if i == 1 else 0.1,
                **({"dual/variance_coef": 1.0 + 0.1 * i} if config.objective.has_multiplier else {}),
                "time/update": 0.1,
            }
        )
        rows.append(evaluation("validation", i, score))
    if collapsed_at is None:
        rows.append(evaluation("test", iterations, final))
        summary = {
            "base_pass_at_1": 0.3,
            "final_pass_at_1": final,
            "best_pass_at_1": final,
            "final_entropy": 0.1,
            "ratio_variance_second_half": 0.001,
        }
        (folder / "report").mkdir(exist_ok=True)
        (folder / "report" / "summary.json").write_text(json.dumps(summary))
    else:
        (folder / "failed.json").write_text(json.dumps({"error": "non-finite", "collapsed": True}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(split, iteration, score):
    """A line of metrics.jsonl."""
    row = {
        "kind": "evaluation",
        "iteration": iteration,
        "rollouts": 100 * iteration,
        "split": split,
        "pass_at_1": score,
        "response_length": 9.0,
    }
    of_test = {"pass_at_1_low": score - 0.1, "pass_at_1_high": score + 0.1, "k": 8, "pass_at_k": min(1.0, score + 0.05)}
    return row | (of_test if split == "test" else {})
