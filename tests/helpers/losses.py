"""Arrays for the objectives, and one compiled call for each objective and shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import losses

# What training computes for an objective; the tests over `losses.names()` take it from here.
COMPUTED = {"r2vpo": {"variance_coef": 2.5}, "m2po": {"threshold": 0.3}}
NAMES = losses.names()
REDUCTIONS = losses.REDUCTIONS
TRACED = ("variance_coef", "threshold")

# The arrays of most tests have one shape, so that they share compiled functions.
ROWS, COLUMNS = 4, 5


@functools.cache
def _evaluator(name, jit, static):
    def call(logp, behavior_logp, advantages, mask, traced):
        return losses.get(name)(logp, behavior_logp, advantages, mask, **traced, **dict(static))

    function = jax.value_and_grad(call, has_aux=True)
    return jax.jit(function) if jit else function


def evaluate(name, arrays, reduction="token_mean", normalizer=None, *, jit=True, **hyper):
    """(loss, stats, gradient in logp), on NumPy arrays. The normalizer is the usual one, if it is not given.

    Compiled once for each objective, shape and set of static arguments; what costs a compilation of its own
    runs without one.
    """
    if normalizer is None:
        normalizer = usual_normalizer(reduction, arrays["mask"])
    hyper = COMPUTED.get(name, {}) | hyper
    traced = {k: np.asarray(v, np.float32) for k, v in hyper.items() if k in TRACED}
    traced |= {"normalizer": np.asarray(normalizer, np.float32)}
    traced |= {"weights": arrays.get("weights", np.ones(np.shape(arrays["mask"]), np.float32))}
    static = {k: v for k, v in hyper.items() if k not in TRACED} | {"reduction": reduction}
    function = _evaluator(name, jit, tuple(sorted(static.items())))
    inputs = [jnp.asarray(arrays[k]) for k in ("logp", "behavior_logp", "advantages", "mask")]
    (loss, stats), grad = jax.tree.map(np.asarray, function(*inputs, traced))
    return loss, stats, grad


def usual_normalizer(reduction, mask):
    mask = np.asarray(mask, bool)
    return {
        "token_mean": np.sum(mask),
        "sequence_mean": np.sum(np.any(mask, axis=1)),
        "constant_length": np.size(mask),
    }[reduction]


def batch(seed=0, rows=ROWS, columns=COLUMNS):
    """Random arrays as keyword arguments; ratios within a factor of about 2, some rows short, none empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, columns + 1, rows)
    behavior_logp = -0.1 - rng.exponential(1.0, (rows, columns))
    arrays = {
        "logp": np.minimum(behavior_logp + rng.normal(0, 0.3, (rows, columns)), -0.05),
        "behavior_logp": behavior_logp,
        "advantages": rng.normal(0, 1, (rows, columns)),
        "weights": rng.uniform(0.5, 2.0, (rows, columns)),
    }
    return {k: v.astype(np.float32) for k, v in arrays.items()} | {"mask": np.arange(columns) < lengths[:, None]}


def by_hand(ratio, advantages):
    """Ragged rows of ratios and advantages (one number a row, or one a token) as arrays of the usual shape.

    logp is log r, and the behavior policy's is 0.
    """
    arrays = {k: np.zeros((ROWS, COLUMNS), np.float32) for k in ("logp", "behavior_logp", "advantages")}
    arrays["weights"] = np.ones((ROWS, COLUMNS), np.float32)
    arrays["mask"] = np.zeros((ROWS, COLUMNS), bool)
    for i, row in enumerate(ratio):
        arrays["logp"][i, : len(row)] = np.log(row)
        arrays["advantages"][i, : len(row)] = advantages[i]
        arrays["mask"][i, : len(row)] = True
    return arrays


def one_token(name, advantage, logp, log_ratio, **hyper):
    """(loss, gradient coefficient) of a single token."""
    values = {"logp": logp, "behavior_logp": logp - log_ratio, "advantages": advantage}
    arrays = {k: np.full((1, 1), v, np.float32) for k, v in values.items()} | {"mask": np.ones((1, 1), bool)}
    loss, _, grad = evaluate(name, arrays, jit=False, **hyper)
    return float(loss), -float(grad[0, 0])


def same_up_to_rounding(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.max(np.abs(expected)))
