"""Means over verdicts: what has none is in no mean of rewards, and where nothing has one there is no mean."""

import jax
import numpy as np
import pytest

from r2vpo_jax import config
from r2vpo_jax.tasks import Outcome
from r2vpo_jax.training import metrics
from tests.helpers.rollouts import GROUP, make

W, R, E, T = Outcome.WRONG, Outcome.RIGHT, Outcome.ERROR, Outcome.TIMEOUT
OBJECTIVE = config.from_flags(config.make()).objective
of_sampled = jax.jit(metrics.of_sampled, static_argnums=(0, 2))


def sampled(outcome, reward):
    """Four groups of two."""
    return make(0, outcome=np.array(outcome, np.int32), reward=np.array(reward, np.float32))


def test_what_has_no_verdict_is_in_no_mean():
    """Groups: one that differs, one of two right ones, one with a single verdict, one without."""
    found = of_sampled(OBJECTIVE, sampled([R, W, R, R, W, E, E, T], [3, 0, 1, 1, 0, 0, 0, 0]), GROUP)
    wanted = {
        "reward/mean": 5 / 5,
        "reward/learned": 5 / 5,
        "reward/zero_variance_groups": 2 / 3,
        "reward/all_right_groups": 1 / 3,
        "outcome/judged": 5 / 8,
        "outcome/errors": 2,
        "outcome/timeouts": 1,
    }
    assert {name: float(found[name]) for name in wanted} == pytest.approx(wanted)


def test_nothing_judged_is_no_number():
    found = of_sampled(OBJECTIVE, sampled([E, T] * 4, [0] * 8), GROUP)
    rewards = {name: float(value) for name, value in found.items() if name.startswith("reward/")}
    assert len(rewards) == 4
    assert np.isnan(list(rewards.values())).all(), rewards
    assert found["outcome/judged"] == 0


def test_where_all_are_judged_means_are_plain_means_bit_for_bit():
    rewards = np.random.default_rng(0).random((50, 8)).astype(np.float32)
    plain = jax.jit(lambda x: x.mean())
    for row in rewards:
        found = of_sampled(OBJECTIVE, sampled([W, R] * 4, row), GROUP)
        assert found["reward/mean"] == plain(row)


def test_parts_of_the_reward_are_means_over_what_they_apply_to():
    nan = np.nan
    terms = [{"a": np.float32([1, 3, 0]), "b": np.float32([nan, 5, 0]), "c": np.float32([nan, nan, 0])}] * 2
    terms[1] = {"a": np.float32([8, 0]), "b": np.float32([nan, 0]), "c": np.float32([nan, 0])}
    found = metrics.of_terms(terms, [np.array([R, W, E]), np.array([R, T])])
    assert (found["a"], found["b"]) == (4, 5)
    assert np.isnan(found["c"])
    assert metrics.of_terms([{}], [np.array([R])]) == {}
