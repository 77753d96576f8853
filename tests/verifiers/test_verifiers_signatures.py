"""Reward functions: how each kind of signature is called, and what counts as a list of values."""

import textwrap

import numpy as np
import pytest

from r2vpo_jax.verifiers import VerifierPool
from r2vpo_jax.verifiers.functions import Parameters, parameters
from r2vpo_jax.verifiers.outcome import Outcome

RIGHT, WRONG, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.ERROR

FUNCTIONS = """
    import numpy as np

    def seen(names, values):
        return 1.0 if values == names else f"{values}"

    # Each gives 1 where it got what it should. Two rows: question q0, response r0, answer a0, grade 0, and so on.
    def ours(q, r, a):
        return [float((q[i], r[i], a[i]) == (f"q{i}", f"r{i}", f"a{i}")) for i in range(len(q))]

    def ours_with_columns(questions, responses, answers, grade, *, levels, response_lengths, note="none"):
        assert note == "none" and levels == ["easy", "hard"]
        return [float(g == i and n == 10 + i) for i, (g, n) in enumerate(zip(grade, response_lengths))]

    def ours_with_all(questions, responses, answers, **columns):
        assert sorted(columns) == ["grade", "odd name"], sorted(columns)
        return ours(questions, responses, answers)

    def trl(prompts, completions, completion_ids=None, **columns):
        assert sorted(columns) == ["grade", "odd name"], sorted(columns)
        assert completion_ids == [[1], [2, 3]] and columns["odd name"] == ["x", None]
        return [float(p == f"P{i}" and c == f"r{i}") for i, (p, c) in enumerate(zip(prompts, completions))]

    def trl_by_keyword(*, completions, grade, **kwargs):
        return [float(c == f"r{i}" and g == i) for i, (c, g) in enumerate(zip(completions, grade))]

    def trl_alone(completions, **_):
        return [float(c == f"r{i}") for i, c in enumerate(completions)]

    def by_name(responses, answers):
        return [float((r, a) == (f"r{i}", f"a{i}")) for i, (r, a) in enumerate(zip(responses, answers))]

    def anything(**everything):
        assert everything["prompts"] == ["P0", "P1"]
        return trl_alone(everything["completions"])

    class Scorer:
        def __call__(self, questions, responses, answers):
            return ours(questions, responses, answers)

        def method(self, completions, **columns):
            return trl_alone(completions)

    scorer = Scorer()

    def wants_what_is_not_there(prompts, completions, solution): ...
    def wants_two(x, y): ...
    def wants_nothing(): ...

    # Values.
    def column(q, r, a): return np.ones((len(r), 1))
    def row(q, r, a): return np.ones((1, len(r)))
    def one_number(q, r, a): return 1.0
    def one_array(q, r, a): return np.float32(1)
    async def coroutine(q, r, a): return [1.0] * len(r)
    def dicts(q, r, a): return [{"score": 1.0} for _ in r]
    def one_dict(q, r, a): return {"score": [1.0] * len(r)}
    def text(q, r, a): return "1" * len(r)
    def nested(q, r, a): return [[1.0] for _ in r]
    def boxes(q, r, a): return [np.ones(1) for _ in r]
    def digits(q, r, a): return ["1" for _ in r]
    def huge(q, r, a): return [10 ** 400 for _ in r]
    def none_each(q, r, a): return [None for _ in r]
    def some(q, r, a):
        values = {"none": None, "nan": float("nan"), "inf": float("inf"), "dict": {}, "yes": True, "half": np.float32(0.5)}
        return (values[x] for x in r)
    def array(q, r, a): return np.arange(len(r))
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signatures")
    (folder / "signature_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with VerifierPool(num_workers=1, time_limit=20.0) as pool:
            yield pool


COLUMNS = {
    "prompts": ["P0", "P1"],
    "completion_ids": [[1], [2, 3]],
    "levels": ["easy", "hard"],
    "response_lengths": [10, 11],
    "grade": [0, 1],
    "odd name": ["x", None],
}


def score(pool, function, columns=COLUMNS):
    return pool.score(f"signature_functions:{function}", ["q0", "q1"], ["r0", "r1"], ["a0", "a1"], columns=columns)


def test_every_kind_of_signature(pool):
    names = [
        "ours",
        "ours_with_columns",
        "ours_with_all",
        "trl",
        "trl_by_keyword",
        "trl_alone",
        "by_name",
        "anything",
        "scorer",
        "scorer.method",
    ]
    found = {name: score(pool, name) for name in names}
    assert {name: values.tolist() for name, (values, _) in found.items()} == {name: [1, 1] for name in names}, found


def test_an_argument_that_is_not_there_is_named(pool):
    for name, message in {
        "wants_what_is_not_there": "wants solution, and there is no such column; there are .*grade",
        "wants_two": "wants x, y, and there is no such column",
        "wants_nothing": "takes no argument that there is",
    }.items():
        with pytest.raises(ValueError, match=message):
            score(pool, name)


@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_no_list_of_values(pool, rows):
    """Also where a call has one response, and a shape could hide."""
    wanted = f"a list of one number for each of the {rows} responses is needed"
    reasons = {
        "column": f"ValueError: the function returned an array of shape ({rows}, 1); {wanted}",
        "one_number": f"TypeError: the function returned a value of type float; {wanted}",
        "one_array": f"ValueError: the function returned an array of shape (); {wanted}",
        "row": f"ValueError: the function returned an array of shape (1, {rows}); {wanted}",
        "coroutine": "TypeError: the function returned a coroutine",
        "dicts": "the value is no number but a dict",
        "one_dict": f"TypeError: the function returned a value of type dict; {wanted}",
        "text": f"TypeError: the function returned a value of type str; {wanted}",
        "nested": "the value is no number but a list",
        "boxes": "the value is no number but a ndarray of shape (1,)",
        "digits": "the value is no number but a str '1'",
        "huge": "the value is not a finite float32",
    }
    for name, reason in reasons.items():
        values, judgements = pool.score(f"signature_functions:{name}", ["q"] * rows, ["r"] * rows, ["a"] * rows)
        assert [j.outcome for j in judgements] == [ERROR] * rows, name
        assert all(j.reason.startswith(reason) and j.applies for j in judgements), (name, judgements)
        assert np.isnan(values).all(), name


def test_a_value_that_is_none_costs_its_own_response(pool):
    texts = ["yes", "none", "half", "nan", "inf", "dict", "yes"]
    values, judgements = pool.score("signature_functions:some", texts, texts, texts)
    assert [j.outcome for j in judgements] == [RIGHT, ERROR, WRONG, ERROR, ERROR, ERROR, RIGHT]
    assert [j.applies for j in judgements] == [True, False, True, False, True, True, True]
    assert values[[0, 2, 6]].tolist() == [1, 0.5, 1]
    assert not any(j.applies for j in pool.score("signature_functions:none_each", texts, texts, texts)[1])
    assert pool.score("signature_functions:array", texts, texts, texts)[0].tolist() == list(range(7))


def test_parameters_are_read_from_names():
    def ours(questions, responses, answers, level, *, tone="dry", **more): ...
    def trl(prompts, completions, completion_ids=None, **more): ...

    assert parameters(ours) == Parameters(False, ("level",), ("tone",), True)
    assert parameters(ours).names() == {"level", "tone"}
    assert parameters(trl) == Parameters(True, ("prompts", "completions"), ("completion_ids",), True)
    assert parameters(max) == Parameters(False, (), (), False)
    assert parameters(lambda *texts: []) == Parameters(False, (), (), False)
