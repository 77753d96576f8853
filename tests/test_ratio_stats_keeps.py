"""What an objective does with the tokens that a clip would cut, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import losses, ratio_stats
from tests.helpers.ratio_stats import COLUMNS, QUOTIENTS, ROWS, batch, by_hand, compute, extras


@functools.cache
def _slope(name, items):
    def loss(logp, behavior_logp, advantages, mask):
        return losses.get(name)(logp, behavior_logp, advantages, mask, **dict(items))[0]

    return jax.jit(jax.grad(loss))


def keeps(name, arrays, **hyper):
    """The summary of an objective on a batch, by the coefficients that its gradient has."""
    weight = losses.token_weights(arrays["mask"], "token_mean")
    slope = _slope(name, tuple(hyper.items()))(*arrays.values())
    coefficient = -slope / jnp.where(weight == 0, 1.0, weight)
    return ratio_stats.summarize(compute(**arrays, coefficient=coefficient))


@pytest.mark.parametrize(("name", "retained"), [("ppo_clip", 0.0), ("policy_gradient", 1.0)])
def test_the_clip_keeps_nothing_and_the_policy_gradient_all(name, retained):
    for seed in range(4):
        summary = keeps(name, batch(seed))
        assert 0 < summary["keeps/at_stake"] < 1
        for split in QUOTIENTS:
            expected = retained if "retained" in split else 0.0
            assert np.isnan(summary[split]) or abs(summary[split] - expected) < 1e-6, split
        assert not np.isnan(summary["keeps/retained"])
        np.testing.assert_allclose(summary["clip/gradient_share"], retained * summary["keeps/at_stake"], rtol=1e-5)


# lambda = 1 / (2 clip) at a clip of .2; g = r (A - 5 (r - 1)).
COEF = 2.5


@pytest.mark.parametrize(
    ("ratio", "advantages", "expected"),
    [
        # |A| = 1 turns back at the clip's edges. g = 1.3 * -.5 = -.65 of 1.3, and .6 * (-1 + 2) = .6 of .6.
        ([[1.3, 1.0], [0.6]], [1, -1], {"retained": 0.0, "restoring": 1.25 / 1.9, "at_stake": 1.9 / 2.9}),
        ([[1.3, 1.0], [0.6]], [1, -1], {"restoring_positive": 0.5, "restoring_negative": 1.0}),
        # |A| = 3 turns back at 1.6 and .4. g = 1.4 * (3 - 2) = 1.4 of 4.2, 1.7 * (3 - 3.5) = -.85 of 5.1, and
        # .7 * (-3 + 1.5) = -1.05 of 2.1; 3 at r = 1 is not at stake.
        (
            [[1.4, 1.7, 1.0], [0.7]],
            [3, -3],
            {"retained": 2.45 / 11.4, "restoring": 0.85 / 11.4, "at_stake": 11.4 / 14.4},
        ),
        (
            [[1.4, 1.7, 1.0], [0.7]],
            [3, -3],
            {"retained_positive": 1.4 / 9.3, "restoring_positive": 0.85 / 9.3, "retained_negative": 0.5},
        ),
        ([[1.21], [0.41]], [3, -3], {"restoring": 0.0}),
        ([[1.61], [0.39]], [3, -3], {"retained": 0.0}),
    ],
)
def test_what_r2vpo_keeps(ratio, advantages, expected):
    summary = keeps("r2vpo", by_hand([np.log(x) for x in ratio], advantages), variance_coef=COEF)
    for name, value in expected.items():
        np.testing.assert_allclose(summary[f"keeps/{name}"], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("ratio", [1.201, 1.25, 1.4, 1.59, 1.61, 3.0, 0.799, 0.6, 0.41, 0.39, 0.1])
def test_where_r2vpo_turns_back(ratio):
    sign = 1 if ratio > 1 else -1
    unit = keeps("r2vpo", by_hand([[np.log(ratio)]], [sign]), variance_coef=COEF)
    assert unit["keeps/retained"] == 0
    assert unit["keeps/restoring"] > 0
    large = keeps("r2vpo", by_hand([[np.log(ratio)]], [3 * sign]), variance_coef=COEF)
    inside = 0.4 < ratio < 1.6
    assert (large["keeps/retained"] > 0) == inside
    assert (large["keeps/restoring"] > 0) == (not inside)


def by_split(g, **changed):
    """Summary of a batch in which every token is in Z with r |A| = 1, A = -2, and g = -`g` (so `g` is kept)."""
    arrays = by_hand([np.full(COLUMNS, np.log(0.5))] * ROWS, advantages=[-2.0] * ROWS)
    arrays |= {"coefficient": -np.broadcast_to(np.asarray(g, np.float32), (ROWS, COLUMNS))} | changed
    arrays["logp"] = arrays["behavior_logp"] + np.float32(np.log(0.5))
    return ratio_stats.summarize(compute(**arrays))


def assert_kept(summary, **expected):
    for name, value in expected.items():
        np.testing.assert_allclose(summary[f"keeps/{name}"], value, rtol=1e-5, err_msg=name)


def test_split_by_sign():
    # r |A| = 2 * .5 and .5 * 2; A > 0 keeps .25 and .75, A < 0 keeps .125 and turns .5 back.
    arrays = by_hand([np.log([2.0, 2.0]), np.log([0.5, 0.5])], advantages=[0.5, -2.0])
    arrays["coefficient"] = np.zeros((ROWS, COLUMNS), np.float32)
    arrays["coefficient"][:2, :2] = [[0.25, 0.75], [-0.125, 0.5]]
    summary = ratio_stats.summarize(compute(**arrays))
    assert_kept(summary, retained=1.125 / 4, retained_positive=0.5, retained_negative=0.0625)
    assert_kept(summary, restoring=0.125, restoring_positive=0.0, restoring_negative=0.25)


def test_split_by_probability():
    # Two of each, close to the bounds .05 and .5: means (.1 + .3) / 2, (.2 + .6) / 2, (.4 + 1) / 2.
    probability = np.asarray([0.01, 0.0499, 0.0501, 0.499, 0.501, 0.9], np.float32)
    summary = by_split(
        [0.1, 0.3, 0.2, 0.6, 0.4, 1.0], behavior_logp=np.broadcast_to(np.log(probability), (ROWS, COLUMNS))
    )
    assert_kept(summary, retained_rare=0.2, retained_uncertain=0.4, retained_likely=0.7, retained=2.6 / 6)


def test_split_by_third():
    # Responses of 6, 4 and 3 tokens, the last with gaps, and of 1, which is a start. Of 4 the thirds have 2, 1, 1.
    mask = np.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
    g = np.zeros((ROWS, COLUMNS))
    g[mask] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.1, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.5]
    # start .1 + .2 | .1 + .1 | .1 | .5, middle .3 + .4 | .2 | .2, end .5 + .6 | .3 | .3
    assert_kept(by_split(g, mask=mask), retained_start=1.1 / 6, retained_middle=1.1 / 4, retained_end=1.7 / 4)


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        ([0, 1, 7, 8], [0.1, 0.25, 0.4, np.nan]),
        ([63, 64, 1000, 0], [0.4, np.nan, 0.1, 0.25]),
        (None, [0.25, np.nan, np.nan, np.nan]),
    ],
)
def test_split_by_age(age, expected):
    # Rows keep .1, .2, .3, .4.
    changed = {} if age is None else {"age": np.asarray(age, np.int32)}
    summary = by_split([[0.1], [0.2], [0.3], [0.4]], **changed)
    names = ("age_0", "age_1_to_7", "age_8_to_63", "age_64_up")
    assert_kept(summary, **{f"retained_{name}": value for name, value in zip(names, expected, strict=True)})


def test_splits_are_partitions():
    stats = compute(**batch(2), **extras(2))
    for name in ("retained", "restoring"):
        for x in stats.sums[name]:
            whole, sign, probability, third, age = np.split(np.asarray(x), [1, 3, 6, 9])
            assert whole[0] > 0
            for part in (sign, probability, third, age):
                np.testing.assert_allclose(part.sum(), whole[0], rtol=1e-5)


def test_weights_by_hand():
    # r = 2, A = .5, weights 2 and 1: 2 and 1 at stake of 2 + 1 + 3 * 1 * 1, g = 1 and .5.
    arrays = by_hand([np.log([2.0, 2.0]), [0.0]], advantages=[0.5, 1.0])
    arrays["weights"] = np.zeros((ROWS, COLUMNS), np.float32)
    arrays["weights"][:2, :2] = [[2, 1], [3, 0]]
    arrays["coefficient"] = np.where(arrays["mask"], np.float32(0), np.float32(np.nan))
    arrays["coefficient"][0, :2] = [1.0, 0.5]
    summary = ratio_stats.summarize(compute(**arrays))
    assert_kept(summary, at_stake=0.5, retained=0.5, restoring=0.0)
    # Weighted squares 2 * 1, 1 * 1 and 0; the others are not weighted.
    np.testing.assert_allclose(summary["ratio/top_permille_share"], 2 / 3, rtol=1e-5)
    np.testing.assert_allclose(summary["ratio/token_second_moment"], 2 / 3, rtol=1e-5)


def test_without_a_coefficient_it_is_the_weighted_policy_gradient():
    arrays = batch(3) | extras(3)
    log_ratio = arrays["logp"] - arrays["behavior_logp"]
    explicit = arrays["weights"] * np.exp(log_ratio) * arrays["advantages"]
    del arrays["coefficient"]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        compute(**arrays),
        compute(**arrays, coefficient=explicit),
    )
