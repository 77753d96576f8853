"""From positions to problems: epochs, mixtures, and splits that are kept apart."""

import collections
import fractions
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_jax import data
from r2vpo_jax.data import positions
from r2vpo_jax.data.mixtures import shares

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
STRETCH = 1 << 20


def example(text, answer="1", source="s"):
    return data.Example(text, answer, answer, "math", "", source)


def made(questions, split="train", counts=None):
    return data.InMemoryDataset([example(q) for q in questions], split, counts)


@given(size=st.integers(1, 60), stretch=st.integers(0, 1023), epoch=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_each_row_once(size, stretch, epoch):
    start = stretch * STRETCH + epoch * size
    assert sorted(positions.row_of_position(start + i, size) for i in range(size)) == list(range(size))


def test_orders_differ_between_epochs_and_stretches():
    orders = {
        tuple(positions.row_of_position(stretch * STRETCH + epoch * 50 + i, 50) for i in range(50))
        for stretch in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_rows_are_equally_likely_at_a_place():
    # The row at place 0 of 2000 epochs of 4 rows: binomial, 500 +- 19; five deviations are 97.
    counts = collections.Counter(positions.row_of_position(4 * epoch, 4) for epoch in range(2000))
    assert all(abs(counts[row] - 500) < 97 for row in range(4))


def test_orders_are_those_of_all_platforms():
    # The places of the first raw outputs in rising order: NumPy keeps these stable.
    raw = [int(x) for x in np.random.PCG64(np.random.SeedSequence((3, 7))).random_raw(5)]
    by_hand = sorted(range(5), key=raw.__getitem__)
    assert positions.permutation(5, 3, 7).tolist() == by_hand == [3, 2, 1, 0, 4]


def test_training_has_no_end_and_the_other_splits_have():
    dataset = made("abc")
    assert sorted(dataset.example(i).question for i in range(3)) == ["a", "b", "c"]
    assert dataset.example(STRETCH * 5 + 3_000_001 % STRETCH).question in "abc"
    for split in ("validation", "test"):
        assert [made("abc", split).example(i).question for i in range(3)] == ["a", "b", "c"]
    with pytest.raises(IndexError):
        dataset.example(-1)
    with pytest.raises(IndexError, match="which has 0 problems"):
        made("").example(0)


def test_select_keeps_and_counts():
    dataset = made("abcd", "test", {"rows": 5}).select(np.array([True, False, True, True]), "too long")
    dataset = dataset.select([True, True, False], "too long").select([True, True], "other")
    assert [e.question for e in dataset.examples()] == ["a", "c"]
    assert (dataset.num_examples, dataset.counts) == (2, {"rows": 5, "too long": 2, "other": 0})
    with pytest.raises(ValueError, match="zip"):
        dataset.select([True], "too long")


# Mixtures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "whole"),
    [(("2", "1"), (2, 1)), (("0.3", "0.7"), (3, 7)), (("4", "6"), (2, 3)), (("1/3", "0.5"), (2, 3))],
)
def test_shares_in_lowest_terms(weights, whole):
    assert shares([fractions.Fraction(w) for w in weights]) == whole


def test_weights_that_are_not_round_are_refused():
    with pytest.raises(
        ValueError, match=r"shares of 333:667.*in lowest terms; choose rounder ones|shares of 3333:10000"
    ):
        shares([fractions.Fraction("0.3333"), fractions.Fraction(1)])


@pytest.fixture(scope="module")
def mixture():
    parts = [made([f"{name}{i}" for i in range(size)]) for name, size in (("a", 4), ("b", 7), ("c", 5))]
    return data.Mixture(parts, [fractions.Fraction(w) for w in (3, 1, 2)], "train")


@pytest.mark.parametrize("start", [0, 77 * STRETCH])
def test_every_block_has_the_exact_shares(mixture, start):
    orders = set()
    for block in range(40):
        sources = [mixture.locate(start + 6 * block + i)[0] for i in range(6)]
        assert collections.Counter(sources) == {0: 3, 1: 1, 2: 2}
        orders.add(tuple(sources))
    assert len(orders) > 10


@pytest.mark.parametrize("start", [0, 77 * STRETCH])
def test_each_source_has_its_own_epochs(mixture, start):
    inner = collections.defaultdict(list)
    for i in range(6 * 28):
        source, position = mixture.locate(start + i)
        inner[source].append(position)
    for source, share in enumerate((3, 1, 2)):
        # In any order within a block, and none left out: so any n of a source in a row are an epoch or parts of two.
        assert sorted(inner[source]) == list(range(start, start + 28 * share))
    seen = [mixture.example(start + i).question for i in range(6 * 28)]
    # 28 blocks: 84 = 21 epochs of a's 4 rows, 28 = 4 epochs of b's 7, 56 = 11.2 epochs of c's 5.
    counts = collections.Counter(seen)
    assert {counts[f"a{i}"] for i in range(4)} == {21}
    assert {counts[f"b{i}"] for i in range(7)} == {4}
    assert {counts[f"c{i}"] for i in range(5)} == {11, 12}


def test_a_mixture_for_evaluation_is_one_source_after_the_other():
    parts = [made("ab", "test"), made("cde", "test")]
    dataset = data.Mixture(parts, [fractions.Fraction(1)] * 2, "test")
    assert "".join(dataset.example(i).question for i in range(5)) == "abcde"
    assert dataset.num_examples == 5
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            dataset.example(outside)


def test_select_in_a_mixture_reaches_the_sources(mixture):
    keep = [example.question not in ("a1", "c4") for example in mixture.examples()]
    dataset = mixture.select(keep, "too long")
    assert (dataset.num_examples, dataset.counts["too long"]) == (14, 2)
    assert "a1" not in {dataset.example(i).question for i in range(600)}
    assert collections.Counter(dataset.locate(i)[0] for i in range(6)) == {0: 3, 1: 1, 2: 2}
    with pytest.raises(ValueError, match="source 1 of the train mixture has no problems left"):
        mixture.select([not example.question.startswith("a") for example in mixture.examples()], "too long")
    with pytest.raises(ValueError, match="more values than examples"):
        mixture.select([True] * 17, "too long")


def test_a_mixture_by_text():
    dataset = data.load("math?weight=3 + dapo_math_17k", "train", FIXTURES)
    assert collections.Counter(dataset.example(i).source for i in range(40)) == {"math": 30, "dapo_math_17k": 10}
    assert dataset.counts == {"rows": 80, "duplicates": 48}
    assert data.load("math + dapo_math_17k", "test", FIXTURES).num_examples == 12 + 12


# Splits --------------------------------------------------------------------------------------------------------------


def test_training_problems_that_are_held_out_are_dropped():
    train = made(["What is\n1?", "what is  2?", "What is 3?", "What is 4?"])
    dataset = {"train": train, "validation": made(["what IS 1?"], "validation"), "test": made(["What is 2?"], "test")}
    found = data.disjoint(dataset)
    assert [e.question for e in found["train"].examples()] == ["What is 3?", "What is 4?"]
    assert found["train"].counts == {"also in validation or test": 2}
    assert found["test"] is dataset["test"]
    assert data.disjoint({"train": train}) == {"train": train}


def test_validation_and_test_may_not_share_problems():
    dataset = {"validation": made(["What is 1?", "b"], "validation"), "test": made(["c", "what is  1?"], "test")}
    with pytest.raises(ValueError, match=r"validation and test share 1 problems, such as 'what is  1\?'.*rows=:500"):
        data.disjoint(dataset)


def test_something_must_be_left_to_train_on():
    with pytest.raises(ValueError, match="all training problems are also in validation or test"):
        data.disjoint({"train": made("ab"), "test": made("abc", "test")})


def test_a_mixture_loses_held_out_problems_too(mixture):
    found = data.disjoint({"train": mixture, "test": made(["a2", "B3"], "test")})
    assert found["train"].num_examples == 14


def test_the_digest_knows_questions_answers_and_splits():
    base = {"train": made("ab"), "test": made("cd", "test")}
    same = data.digest({"test": made("cd", "test"), "train": made("ab")})
    assert data.digest(base) == same
    assert len(same) == 64
    others = [
        {"train": made("ba"), "test": made("cd", "test")},
        {"train": made(["a", "b", "e"]), "test": made("cd", "test")},
        {"train": made(["", "ab"]), "test": made("cd", "test")},
        {"train": data.InMemoryDataset([example("a"), example("b", "2")], "train"), "test": made("cd", "test")},
        {"train": made("ab")},
    ]
    assert len({same, *map(data.digest, others)}) == 6


def test_other_processes_see_the_same():
    code = f"""
import json
from r2vpo_jax import data
dataset = data.load("math?weight=2 + dapo_math_17k", "train", {str(FIXTURES)!r})
print(json.dumps([dataset.digest] + [dataset.example(i).question for i in (*range(30), 5 * {STRETCH} + 7)]))
"""
    dataset = data.load("math?weight=2 + dapo_math_17k", "train", FIXTURES)
    here = [dataset.digest] + [dataset.example(i).question for i in (5 * STRETCH + 7, *range(29, -1, -1))]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FIXTURES.parents[2], capture_output=True, text=True, check=True
    )
    there = json.loads(done.stdout)
    assert there == [here[0], *here[:1:-1], here[1]]
