"""Tiny evaluations: their settings, what they leave behind, and rows of outcomes made by hand."""

import re
import subprocess
import sys

import jax

from r2vpo_jax.config.evaluation import EvaluationConfig
from r2vpo_jax.config.presets import merged
from r2vpo_jax.evaluation import benchmarks, settings
from r2vpo_jax.tasks import Outcome
from tests.helpers.paths import ROOT, TASK

TINY = "arithmetic?" + "&".join(f"{name}={value}" for name, value in TASK.items())
NUM_PROBLEMS, K, BATCH = 16, 4, 8
FILES = ("config.json", "outcomes.jsonl", "evaluation.json", "evaluation.md")


def tiny(model, sections=None, **changes) -> EvaluationConfig:
    """Batches of 8 problems with 4 samples each; `sections` and keywords as for settings.resolve."""
    shared = {"evaluation": {"batch_size": BATCH * K}, "mesh": {"data": len(jax.devices())}}
    values = {"tasks": TINY, "model": str(model), "num_problems": NUM_PROBLEMS, "k": K}
    return settings.resolve(**values | changes, sections=merged(shared, sections or {}))


def silent(config, path):
    return benchmarks.run(config, path, say=lambda _: None)


def contents(path, names=FILES):
    """Their bytes, without the identity of the code: it may be edited while the tests run."""
    return {name: re.sub(rb', "code": "\w+"', b"", (path / name).read_bytes()) for name in names}


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def row(outcomes, answers=None, *, task="a", level="1", greedy=Outcome.WRONG, lengths=None, truncated=None):
    """A row of outcomes.jsonl."""
    outcomes = [int(outcome) for outcome in outcomes]
    return {
        "task": task,
        "index": 0,
        "level": level,
        "outcomes": outcomes,
        "answers": answers or [None] * len(outcomes),
        "lengths": lengths or [1] * len(outcomes),
        "truncated": truncated or [False] * len(outcomes),
        "greedy": None if greedy is None else {"outcome": int(greedy), "length": 1, "truncated": False, "answer": None},
    }


def identity(*specs, k):
    """As much of an evaluation's config.json as its tables show."""
    return {
        "tasks": {spec: {"max_response_length": 7, "notices": []} for spec in specs},
        "checkpoint": None,
        "model": {"path": "m", "digest": "d", "compute_dtype": "float32"},
        "evaluation": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        "k": k,
        "seed": 3,
    }
