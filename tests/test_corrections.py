"""Importance weights against numbers worked out by hand, and against what they are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import corrections, losses

# One shape for most tests, so that they share compiled functions.
ROWS, COLUMNS = 4, 5
SETTINGS = [{"mode": mode, "scope": scope} for mode in corrections.MODES for scope in corrections.SCOPES]
EVERY = pytest.mark.parametrize("kwargs", SETTINGS, ids=[f"{x['mode']}-{x['scope']}" for x in SETTINGS])


@functools.cache
def _jitted(items):
    return jax.jit(functools.partial(corrections.importance_weights, **dict(items)))


def weigh(*arrays, jit=True, **kwargs):
    function = (
        _jitted(tuple(sorted(kwargs.items()))) if jit else functools.partial(corrections.importance_weights, **kwargs)
    )
    return np.asarray(function(*arrays))


def by_hand(log_weights):
    """Ragged rows of log w as (proximal_logp, behavior_logp, mask); log w is 30 under the mask."""
    behavior_logp = np.full((ROWS, COLUMNS), -1.5, np.float32)
    proximal_logp, mask = behavior_logp + 30, np.zeros((ROWS, COLUMNS), bool)
    for i, row in enumerate(log_weights):
        proximal_logp[i, : len(row)] = behavior_logp[i, : len(row)] + np.asarray(row, np.float32)
        mask[i, : len(row)] = True
    return proximal_logp, behavior_logp, mask


def padded(rows):
    """Ragged rows as an array of that shape, zeros elsewhere."""
    result = np.zeros((ROWS, COLUMNS))
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result


def batch(seed=0):
    rng = np.random.default_rng(seed)
    behavior_logp = -rng.exponential(1.0, (ROWS, COLUMNS)).astype(np.float32)
    proximal_logp = behavior_logp + rng.normal(0, 0.5, (ROWS, COLUMNS)).astype(np.float32)
    # Ragged, with a gap, and one row that is empty.
    mask = np.asarray([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)
    return proximal_logp, behavior_logp, mask


LOG = np.log


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("log_weights", "kwargs", "expected"),
    [
        # Truncated at 2: e -> 2, 1/2 and 1 stay, 2.1 -> 2, and nothing bounds a small weight.
        ([[1, LOG(0.5), 0], [LOG(2.1), LOG(0.01)]], {"mode": "truncate"}, [[2, 0.5, 1], [2, 0.01]]),
        ([[1, LOG(0.5)], [LOG(4)]], {"mode": "truncate", "max_weight": 3.0}, [[2.718282, 0.5], [3]]),
        ([[1, -1]], {"mode": "truncate", "max_weight": 1.0}, [[1, 0.367879]]),
        # A lower bound is for "mask" only.
        ([[LOG(0.25)]], {"mode": "truncate", "min_weight": 0.5}, [[0.25]]),
        # Masked above 2: e = 2.72 -> 0.
        ([[1, LOG(0.5), 0], [LOG(1.9), LOG(0.01)]], {"mode": "mask"}, [[0, 0.5, 1], [1.9, 0.01]]),
        # IcePop, .5 to 5.
        (
            [[LOG(5.1), LOG(4.9), LOG(0.51), LOG(0.49), 0]],
            {"mode": "mask", "min_weight": 0.5, "max_weight": 5.0},
            [[0, 4.9, 0.51, 0, 1]],
        ),
        # The bounds themselves are kept.
        ([[0, 1e-3, -1e-3]], {"mode": "mask", "min_weight": 1.0, "max_weight": 1.0}, [[1, 0, 0]]),
        # Responses: exp(.1 + .2 - .1), exp(1 + .5) = 4.48, exp(-1 - 1) and exp(0).
        (
            [[0.1, 0.2, -0.1], [1, 0.5], [-1, -1], [0.7, -0.7]],
            {"mode": "truncate", "scope": "sequence"},
            [[1.221403] * 3, [2] * 2, [0.135335] * 2, [1] * 2],
        ),
        (
            [[0.1, 0.2, -0.1], [1, 0.5], [-1, -1], [0.7, -0.7]],
            {"mode": "mask", "scope": "sequence", "min_weight": 0.5},
            [[1.221403] * 3, [0] * 2, [0] * 2, [1] * 2],
        ),
        # Beyond the numerical guard.
        ([[1e4, -1e4]], {"mode": "truncate"}, [[2, 0]]),
        ([[1e4, -1e4]], {"mode": "mask", "min_weight": 0.5}, [[0, 0]]),
    ],
)
def test_by_hand(log_weights, kwargs, expected, jit):
    actual = weigh(*by_hand(log_weights), jit=jit, **kwargs)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, padded(expected), rtol=1e-5, atol=1e-8)


def test_defaults():
    # Truncated at 2, token by token.
    actual = corrections.importance_weights(*by_hand([[1, LOG(0.5), 0], [-5]]))
    np.testing.assert_allclose(actual, padded([[2, 0.5, 1], [np.exp(-5)]]), rtol=2e-6)


def test_without_bounds_the_weights_turn_expectations_over():
    # E_behavior[w f] = E_proximal[f], exactly, for any f.
    rng = np.random.default_rng(0)
    behavior, proximal, f = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6)), rng.normal(size=6)
    arrays = (np.log(proximal)[None], np.log(behavior)[None], np.ones((1, 6), bool))
    assert np.max(proximal / behavior) > 2
    weights = weigh(*arrays, max_weight=np.inf)[0]
    np.testing.assert_allclose(behavior @ (weights * f), proximal @ f, rtol=1e-5)
    # "mask" leaves the same expectation over fewer actions.
    kept = proximal / behavior <= 2
    weights = weigh(*arrays, mode="mask", max_weight=2.0)[0]
    np.testing.assert_allclose(behavior @ (weights * f), (proximal * kept) @ f, rtol=1e-5)


@pytest.mark.parametrize("mode", corrections.MODES)
def test_a_response_of_one_token_is_its_token(mode):
    proximal_logp, behavior_logp, _ = batch()
    mask = np.eye(ROWS, COLUMNS, dtype=bool)
    expected = weigh(proximal_logp, behavior_logp, mask, mode=mode, scope="token")
    assert len(set(expected[mask])) == ROWS
    np.testing.assert_array_equal(weigh(proximal_logp, behavior_logp, mask, mode=mode, scope="sequence"), expected)


@EVERY
def test_equal_policies_have_weights_of_one(kwargs):
    _, behavior_logp, mask = batch()
    np.testing.assert_array_equal(weigh(behavior_logp, behavior_logp, mask, **kwargs), mask)


@EVERY
def test_empty_mask(kwargs):
    *logps, mask = batch()
    np.testing.assert_array_equal(weigh(*logps, np.zeros_like(mask), **kwargs), 0.0)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("argument", [0, 1])
def test_masked_positions_contribute_nothing(argument, bad, kwargs):
    arrays = list(batch())
    expected = weigh(*arrays, **kwargs)
    assert np.any(expected > 0)
    np.testing.assert_array_equal(expected[~arrays[2]], 0.0)
    arrays[argument] = np.where(arrays[2], arrays[argument], np.float32(bad))
    np.testing.assert_array_equal(weigh(*arrays, **kwargs), expected)


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("mode", corrections.MODES)
def test_a_nan_that_counts_stays(mode, argument):
    arrays = list(batch())
    arrays[argument][1, 2] = np.nan
    tokens = weigh(*arrays, mode=mode, scope="token")
    np.testing.assert_array_equal(np.isnan(tokens), (np.arange(20) == 7).reshape(ROWS, COLUMNS))
    # Its response has no weight, the others have theirs.
    responses = weigh(*arrays, mode=mode, scope="sequence")
    np.testing.assert_array_equal(np.isnan(responses), arrays[2] & (np.arange(ROWS) == 1)[:, None])


@EVERY
def test_rows_padding_and_vmap(kwargs):
    arrays = batch()
    expected = weigh(*arrays, **kwargs)
    order = np.asarray([2, 0, 3, 1])
    np.testing.assert_array_equal(weigh(*(x[order] for x in arrays), **kwargs), expected[order])
    # Rows are independent: micro-batches are the whole.
    parts = jax.vmap(functools.partial(corrections.importance_weights, **kwargs))(
        *(x.reshape(2, 2, COLUMNS) for x in arrays)
    )
    np.testing.assert_allclose(np.reshape(parts, expected.shape), expected, rtol=1e-6)
    wider = (np.pad(x, ((0, 0), (1, 2)), constant_values=y) for x, y in zip(arrays, (np.nan, 9, 0), strict=True))
    np.testing.assert_allclose(weigh(*wider, jit=False, **kwargs)[:, 1:-2], expected, rtol=1e-6)


@pytest.mark.parametrize("mode", corrections.MODES)
def test_the_scope_decides_whether_the_order_of_tokens_matters(mode):
    *logps, _ = batch()
    mask = np.ones((ROWS, COLUMNS), bool)
    order = np.asarray([3, 1, 4, 0, 2])
    shuffled = [x[:, order] for x in logps]
    expected = weigh(*logps, mask, mode=mode, scope="token")
    np.testing.assert_array_equal(weigh(*shuffled, mask, mode=mode, scope="token"), expected[:, order])
    expected = weigh(*logps, mask, mode=mode, scope="sequence")
    assert np.all(expected == expected[:, :1])
    np.testing.assert_allclose(weigh(*shuffled, mask, mode=mode, scope="sequence"), expected, rtol=1e-5)


def test_an_integer_mask():
    *logps, mask = batch()
    expected = weigh(*logps, mask)
    np.testing.assert_array_equal(weigh(*logps, mask.astype(np.int32)), expected)


@EVERY
def test_no_gradient(kwargs):
    *logps, mask = batch()

    def total(proximal_logp, behavior_logp):
        return jnp.sum(corrections.importance_weights(proximal_logp, behavior_logp, mask, **kwargs))

    for grad in jax.jit(jax.grad(total, argnums=(0, 1)))(*logps):
        np.testing.assert_array_equal(grad, 0.0)


def test_bfloat16_is_computed_in_float32():
    # -3 + 2.98828125 needs more bits than bfloat16 has between 2 and 4.
    logps = (np.full((ROWS, COLUMNS), x, jnp.bfloat16) for x in (-0.01171875, -3.0))
    actual = weigh(*logps, np.ones((ROWS, COLUMNS), bool), max_weight=np.inf)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, np.exp(2.98828125), rtol=1e-6)


@EVERY
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(np.float32, (2, ROWS, COLUMNS), elements=st.floats(-1e4, 1e4, width=32)),
    hnp.arrays(bool, (ROWS, COLUMNS)),
)
def test_extremes_stay_within_bounds(kwargs, logps, mask):
    actual = weigh(*logps, mask, **kwargs, min_weight=0.5, max_weight=2.0)
    assert np.all((actual >= 0) & (actual <= 2))
    assert np.all(actual[~mask] == 0)
    if kwargs["mode"] == "mask":
        assert np.all((actual == 0) | (actual >= 0.5))
    else:
        assert np.all(actual[mask] > 0)


# With an objective ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r2vpo", "ppo_clip", "policy_gradient"])
def test_at_the_proximal_policy_the_gradient_is_weighted(name):
    # The decoupled form at its first update: r = 1, so g = w A and the loss -mean(w A), whatever the objective.
    proximal_logp, behavior_logp, mask = batch()
    advantages = np.asarray([1.0, -0.5, 2.0, -1.5], np.float32)
    weights = weigh(proximal_logp, behavior_logp, mask)
    hyper = {"variance_coef": 2.5} if name == "r2vpo" else {}

    def loss(logp):
        return losses.get(name)(logp, proximal_logp, advantages, mask, weights=weights, **hyper)[0]

    value, grad = jax.jit(jax.value_and_grad(loss))(proximal_logp)
    expected = weights * advantages[:, None] / mask.sum()
    np.testing.assert_allclose(-grad, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(-value, expected.sum(), rtol=1e-5)


# Refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "clip"}, "unknown correction mode 'clip'; one of"),
        ({"scope": "batch"}, "unknown correction scope 'batch'; one of"),
        ({"max_weight": 0.9}, "0 <= min_weight <= 1 <= max_weight is needed, got 0.0 and 0.9"),
        ({"min_weight": 1.1}, "0 <= min_weight <= 1 <= max_weight is needed"),
        ({"min_weight": -0.1}, "0 <= min_weight <= 1 <= max_weight is needed"),
        ({"max_weight": np.nan}, "0 <= min_weight <= 1 <= max_weight is needed"),
        ({"min_weight": np.nan}, "0 <= min_weight <= 1 <= max_weight is needed"),
    ],
)
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        corrections.importance_weights(*batch(), **kwargs)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (2, 4), (2, 3)),
        ((2, 3), (2, 3), (2, 1)),
        ((2, 3), (3,), (2, 3)),
        ((3,), (3,), (3,)),
        ((1, 2, 3), (1, 2, 3), (1, 2, 3)),
    ],
)
def test_wrong_shapes_raise(shapes):
    with pytest.raises(AssertionError, match="Chex"):
        corrections.importance_weights(*map(np.ones, shapes))


@EVERY
def test_no_implicit_rank_promotion(kwargs):
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(functools.partial(corrections.importance_weights, **kwargs), *batch())
