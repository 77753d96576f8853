"""From outcomes to scores and tables, by the book and by hand."""

import itertools
import json

import numpy as np
import pytest

from r2vpo_jax.evaluation import estimators, validation
from r2vpo_jax.evaluation import report as benchmark_report
from r2vpo_jax.tasks import Outcome
from tests.helpers.evaluations import identity, row


@pytest.mark.parametrize(("k", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_pass_sizes(k, sizes):
    assert benchmark_report.pass_sizes(k) == sizes


def test_scores_are_those_of_enumeration():
    """pass@j of a problem: the share of the j-subsets of its samples that hold a right one; errors are not right."""
    generator = np.random.default_rng(0)
    rows = [row(generator.integers(0, 4, 6)) for _ in range(12)]
    values = benchmark_report.values_by_problem(rows)
    assert list(values) == ["pass_at_1", "pass_at_2", "pass_at_4", "pass_at_6", "majority_at_6", "greedy"]
    for j in (1, 2, 4, 6):
        subsets = list(itertools.combinations(range(6), j))
        expected = [np.mean([any(r["outcomes"][i] == 1 for i in s) for s in subsets]) for r in rows]
        np.testing.assert_allclose(values[f"pass_at_{j}"], expected, atol=1e-12)


def test_numbers_by_hand():
    """Three problems, two samples: both right, one right, an error and a timeout."""
    rows = [
        row([1, 1], ["7", "7"], greedy=Outcome.RIGHT, lengths=[3, 5]),
        row([0, 1], ["8", "9"], level="2", lengths=[1, 2], truncated=[True, False]),
        row([2, 3], ["7", None], level="2", greedy=Outcome.TIMEOUT),
    ]
    (benchmark,) = benchmark_report.summarize(identity("a", k=2), rows)["benchmarks"]
    scores = {name: score["value"] for name, score in benchmark["scores"].items()}
    assert scores == pytest.approx({"pass_at_1": 3 / 6, "pass_at_2": 2 / 3, "majority_at_2": 1.5 / 3, "greedy": 1 / 3})
    assert (benchmark["problems"], benchmark["k"], benchmark["average_at"]) == (3, 2, 2)
    assert benchmark["response_length"] == {"mean": pytest.approx(13 / 6), "max": 5}
    assert benchmark["truncated"] == pytest.approx(1 / 6)
    assert benchmark["without_answer"] == pytest.approx(1 / 6)
    assert (benchmark["verifier_errors"], benchmark["verifier_timeouts"]) == (1, 1)
    assert (benchmark["greedy_verifier_errors"], benchmark["greedy_verifier_timeouts"]) == (0, 1)
    assert benchmark["levels"]["2"]["scores"]["pass_at_1"]["value"] == pytest.approx(1 / 4)
    for name, values in benchmark_report.values_by_problem(rows).items():
        low, high = estimators.bootstrap_interval(values)
        assert (benchmark["scores"][name]["low"], benchmark["scores"][name]["high"]) == (low, high)


def test_levels_add_up_and_are_in_their_order():
    generator = np.random.default_rng(1)
    labels = ["level 10", "level 9", "geometry", "level 9", "level 10", "level 9"]
    rows = [row(generator.integers(0, 2, 4), list("abab"), level=label) for label in labels]
    (benchmark,) = benchmark_report.summarize(identity("a", k=4), rows)["benchmarks"]
    assert list(benchmark["levels"]) == ["geometry", "level 9", "level 10"]
    groups = benchmark["levels"].values()
    assert sum(group["problems"] for group in groups) == benchmark["problems"] == 6
    assert sum(group["verifier_errors"] for group in groups) == benchmark["verifier_errors"]
    for name, score in benchmark["scores"].items():
        total = sum(group["problems"] * group["scores"][name]["value"] for group in groups)
        assert score["value"] == pytest.approx(total / 6)


def test_every_row_of_every_table_says_how_it_was_made():
    rows = [row([1, 0], level=level, task=task) for task in ("a", "b|c") for level in "12" for _ in range(2)]
    summary = benchmark_report.summarize(identity("a", "b|c", k=2), rows)
    text = benchmark_report.markdown(summary)
    header, tables, seen = None, 0, []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        if header is None:
            header, tables = cells, tables + 1
        elif not set(line) <= {"|", "-"}:
            assert len(cells) == len(header)
            named = dict(zip(header, cells, strict=True))
            seen.append(cells[0])
            settings = [named[x] for x in ("n", "k", "temperature", "top-p", "top-k", "max length", "seed")]
            greedy = named.get("score") == "greedy"
            n = "2" if header[0] == "level" else "4"
            assert settings == [
                n,
                *(["1", "0", "-", "-", "7", "-"] if greedy else ["2", "0.6", "0.95", "20", "7", "3"]),
            ]
    assert tables == 2 + 2 * 3, "all benchmarks: scores, responses; each: scores, levels, responses by level"
    assert seen[:4] == ["a", "b/c", "a", "b/c"]
    assert {"pass@1", "pass@2", "maj@2", "greedy", "1", "2"} <= set(seen)
    assert text == benchmark_report.markdown(json.loads(json.dumps(summary)))


def test_the_names_are_those_of_a_run():
    """What both report of the same outcomes has one name, and is one number."""
    right = np.random.default_rng(2).integers(0, 2, (9, 4))
    scores = validation.Evaluation(
        split="test",
        right=right == 1,
        errors=0,
        timeouts=0,
        level=np.zeros(9, int),
        response_length=np.ones((9, 4), int),
        truncated=np.zeros((9, 4), bool),
        texts=(),
        prompts=(),
    ).scores(4)
    (benchmark,) = benchmark_report.summarize(identity("a", k=4), [row(outcomes) for outcomes in right])["benchmarks"]
    assert {name: benchmark[name] for name in ("problems", "k", "average_at")} == {
        name: scores[name] for name in ("problems", "k", "average_at")
    }
    mine = benchmark["scores"]["pass_at_1"]
    assert (mine["value"], mine["low"], mine["high"]) == tuple(scores[f"pass_at_1{x}"] for x in ("", "_low", "_high"))
    assert benchmark["scores"]["pass_at_4"]["value"] == scores["pass_at_k"]
