"""Scores: the same problems and random numbers for everybody, and verdicts by the task."""

import dataclasses

import numpy as np
import pytest

from r2vpo_jax.evaluation.validation import Evaluation, evaluate
from r2vpo_jax.tasks import Outcome, Verdicts

NUM_PROBLEMS, NUM_SAMPLES = 16, 16  # the shape of the tiny run's test scores


@pytest.fixture(scope="module")
def score(tiny_model, task, mesh):
    model, params = tiny_model

    def evaluate_tiny(num_samples=NUM_SAMPLES, **kwargs):
        settings = {"split": "test", "num_problems": NUM_PROBLEMS, "batch_size": 16} | kwargs
        return evaluate(model, params, task, num_samples=num_samples, mesh=mesh, **settings)

    return evaluate_tiny


def test_verdicts_are_those_of_the_texts(score, task):
    """The first responses, read as text: right if they end with the sum of the prompt modulo 10."""
    result = score()
    assert result.split == "test"
    assert result.right.shape == result.response_length.shape == result.truncated.shape == (16, 16)
    assert 0 < result.right.mean() < 1, "a base model that is right now and then is wanted"
    assert result.errors == 0
    np.testing.assert_array_equal(result.level, task.level("test", np.arange(16)))
    assert len(result.texts) == len(result.prompts) == 3
    problems = task.problems("test", np.arange(16))
    for i, (prompt, text) in enumerate(zip(result.prompts, result.texts, strict=True)):
        assert prompt == task.decode(problems.tokens[i, -problems.length[i] :])
        answer = sum(int(x) for x in prompt[:-1].split("+")) % 10
        assert result.right[i, 0] == text.endswith(f";{answer}<eos>")
        assert result.truncated[i, 0] == (not text.endswith("<eos>"))
        tokens = len(text.replace("<eos>", "e").replace("<pad>", "p"))
        assert result.response_length[i, 0] == tokens


def test_everybody_gets_the_same_draws(score):
    """Again, and with fewer samples: the first ones are the same."""
    first, again, fewer = score(), score(), score(num_samples=2)
    for name in ("right", "response_length", "truncated"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(first, name)[:, :2], getattr(fewer, name))
    assert first.texts == again.texts == fewer.texts
    responses = {tuple(lengths) for lengths in first.response_length}
    assert len(responses) > 1


def test_at_temperature_zero_all_samples_are_one(score):
    greedy = score(temperature=0.0)
    for kinds in (greedy.right, greedy.response_length, greedy.truncated):
        np.testing.assert_array_equal(kinds, np.repeat(kinds[:, :1], NUM_SAMPLES, axis=1))
    assert np.any(score().right != greedy.right)


def test_validation_is_another_set_of_problems(score):
    validation = score(num_samples=2, split="validation")
    assert validation.split == "validation"
    assert validation.prompts != score().prompts


def test_errors_are_counted_and_not_right(tiny_model, task, mesh):
    """A verifier that gives up on every fourth response."""

    class Hesitant:
        def __getattr__(self, name):
            return getattr(task, name)

        def verify(self, split, index, responses, lengths):
            outcome = np.full(len(index), Outcome.RIGHT)
            outcome[::4] = Outcome.ERROR
            outcome[1::8] = Outcome.TIMEOUT
            return Verdicts((outcome == Outcome.RIGHT).astype(np.float32), outcome)

    settings = {"split": "test", "num_problems": 16, "num_samples": 16, "batch_size": 16}
    result = evaluate(*tiny_model, Hesitant(), mesh=mesh, **settings)
    assert (result.errors, result.timeouts) == (64, 32)
    np.testing.assert_array_equal(result.right, ~np.isin(np.arange(16) % 8, [0, 1, 4]) & np.ones((16, 1), bool))
    assert result.without_verdicts() == ""
    assert result.judged
    assert not dataclasses.replace(result, errors=200, timeouts=56).judged
    most = dataclasses.replace(result, errors=100, timeouts=29, reason="KeyError: 1")
    assert most.without_verdicts() == (
        "test: 129 of 256 responses have no verdict, and count as not right; the first reason: KeyError: 1"
    )


def evaluation(right):
    right = np.array(right, bool)
    return Evaluation(
        split="test",
        right=right,
        errors=0,
        timeouts=0,
        level=np.zeros(len(right), int),
        response_length=np.ones(right.shape, int),
        truncated=np.zeros(right.shape, bool),
        texts=(),
        prompts=(),
    )


def test_numbers_by_hand():
    """Three problems, four samples: 2, 0 and 4 right."""
    result = evaluation([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert result.average_at(4) == 0.5
    assert result.average_at(1) == 2 / 3  # the first sample of each
    # pass@2 of 2 in 4: 1 - C(2,2) / C(4,2) = 5/6; then (5/6 + 0 + 1) / 3.
    np.testing.assert_allclose(result.pass_at(2), (5 / 6 + 0 + 1) / 3)
    np.testing.assert_allclose(result.pass_at(4), 2 / 3)
    low, high = result.interval_at(4)
    assert 0 <= low < 0.5 < high <= 1
