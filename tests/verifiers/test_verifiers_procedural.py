"""Scorers of generators that evaluate answers: what they are shown, and what they are not."""

import json
import re

import pytest

from r2vpo_jax.verifiers import procedural

reasoning_gym = pytest.importorskip("reasoning_gym")


def gold(name, **more):
    return json.dumps({"dataset": name, "config": {}, "seed": 3, "index": 0} | more)


@pytest.fixture
def shown(monkeypatch):
    """The answers that scorers were shown; they give full marks for each."""
    seen = []

    class Everything:
        def __getitem__(self, index):
            return {"question": "?", "answer": "1"}

        def score_answer(self, answer, entry):
            seen.append(answer)
            return 1.0

    monkeypatch.setattr(procedural, "_dataset", lambda *_: Everything())
    return seen


def test_the_answers_that_come_with_the_problems_are_shown():
    for name, pattern in procedural.EVALUATED.items():
        data = reasoning_gym.create_dataset(name, seed=3)
        answers = [data[i]["answer"].strip() for i in range(3 if name in ("countdown", "puzzle24") else 10)]
        answers = [
            answer for answer in answers if "Integral" not in answer
        ]  # the problem again, where SymPy has no answer
        assert [a for a in answers if not re.fullmatch(pattern, a, re.DOTALL | re.ASCII)] == [], name


# Harmless, and not of what right answers are made of.
CODE = (
    "abs(1)",
    "len('abc')",
    "[1, 2]",
    "(1).real",
    "1 .real",
    "x.diff",
    "sin.name",
    "a=1",
    "__name__",
    "lambda: 1",
    "'1'",
    "1 if 1 else 1",
    "sinx",
    "Symbol(x)",
    "２ + 2",
)


def test_code_is_wrong_unseen(shown):
    for name in procedural.EVALUATED:
        for text in CODE:
            assert not procedural.right(gold(name), text), (name, text)
        assert not procedural.right(gold(name), "2" * 20_000 + "!"), "and no pattern takes long"
    assert not procedural.right(gold("countdown"), "2**3")
    assert shown == []


def test_sums_and_integrals_are_shown(shown):
    answers = {
        "countdown": "(1 + 2.5)*3 - 4/2",
        "simple_integration": "-5*x**9 + sin(2.5*x)/3 + C",
        "n_queens": "_ Q\nQ _",
    }
    for name, text in answers.items():
        assert procedural.right(gold(name), text)
    assert procedural.right(gold("chain_sum"), CODE[0]), "a scorer that parses is shown everything"
    assert procedural.right(gold("countdown", evaluated_answers=True), CODE[0]), "the user has allowed it"
    assert shown == [*answers.values(), CODE[0], CODE[0]]
