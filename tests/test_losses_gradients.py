"""Gradients of the objectives: against formulas, against finite differences, and under jit, vmap and grad."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import losses
from tests.helpers.losses import COLUMNS, COMPUTED, NAMES, REDUCTIONS, ROWS, batch, evaluate, same_up_to_rounding

VOCABULARY = 4
# One advantage a response, of both signs. Both kinds of response hold tokens on either side of every bound, and
# the geometric means 1.27, .77, 1.00, 1.15 are cut by GSPO at +-.1 in the first two rows only. No log-ratio is so
# near a bound that a finite difference steps across.
RATIO = np.asarray(
    [[1.5, 1.1, 1.6, 0.9, 1.4], [0.5, 0.9, 0.7, 1.1, 0.6], [0.6, 1.1, 1.5, 0.9, 1.4], [1.6, 1.1, 0.6, 1.3, 1.4]]
)
LENGTH = np.asarray([5, 4, 3, 5])
MASK = np.arange(COLUMNS) < LENGTH[:, None]
ADVANTAGES = np.asarray([1.0, -1.0, 0.75, -0.5])
HYPER = {
    "gspo": {"clip_low": 0.1, "clip_high": 0.1},
    "luspo": {"clip_low": 0.1, "clip_high": 0.1},
    "m2po": {"threshold": 0.25},
    "gmpo": {"log_clip": 0.25},
    "cispo": {"min_ratio": 0.8, "max_ratio": 1.2},
    "aspo": {"dual_clip": 1.35},
    "drpo": {"epsilon": 0.2},
    "gppo": {"keep_low": 0.5, "dual_clip": 1.35},
    "dppo_tv": {"divergence_low": 0.05, "divergence_high": 0.05, "beta": 0.5},
    "dppo_kl": {"divergence_low": 0.01, "divergence_high": 0.01},
    "dro": {"beta": 0.5},
} | {k: v for k, v in COMPUTED.items() if k != "m2po"}


def softmax(logits):
    exp = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return exp / np.sum(exp, axis=-1, keepdims=True)


def draw():
    """(logits, tokens, behavior_logp) in double precision, with the ratios above."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 0.5, (ROWS, COLUMNS, VOCABULARY))
    tokens = rng.integers(0, VOCABULARY, (ROWS, COLUMNS))
    behavior_logp = token_logp(logits, tokens) - np.log(RATIO)
    assert np.all(behavior_logp < 0), "probabilities are wanted"
    return logits, tokens, behavior_logp


def token_logp(logits, tokens):
    """Of logits with any number of leading axes."""
    tokens = np.broadcast_to(tokens[..., None], (*logits.shape[:-1], 1))
    return np.take_along_axis(np.log(softmax(logits)), tokens, axis=-1)[..., 0]


def through_the_softmax(name, reduction, scope=None):
    """(loss, gradient in the logits)."""
    logits, tokens, behavior_logp = draw()
    hyper = HYPER.get(name, {}) | ({"penalty_scope": scope} if scope else {})

    def loss(logits):
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return losses.get(name)(logp, behavior_logp, ADVANTAGES, MASK, reduction=reduction, **hyper)[0]

    return jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32))


# Formulas -------------------------------------------------------------------------------------------


def row_mean(x):
    return np.sum(np.where(MASK, x, 0), axis=1, keepdims=True) / LENGTH[:, None]


def row_product(r):
    return np.exp(LENGTH[:, None] * row_mean(np.log(r)))


def geometric_mean(r):
    return np.exp(row_mean(np.log(r)))


def outside(r, a, low, high):
    """Where PPO's clip cuts."""
    return ((a > 0) & (r > high)) | ((a < 0) & (r < low))


def geometric_mean_of_clipped(r, a):
    x = np.log(r)
    return np.exp(row_mean(np.where(a > 0, np.minimum(x, 0.25), np.maximum(x, -0.25))))


def binary_kl(mu, pi):
    return mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))


def gppo(r, a):
    g = np.where((a > 0) & (r > 1.28), 1.28 * a, np.where((a < 0) & (r < 0.8), 0.5 * 0.8 * a, r * a))
    return np.where((a < 0) & (r > 1.35), 0, g)


def sapo(r, a):
    tau = np.where(a > 0, 1.0, 1.05)
    return r * a / np.cosh(tau * (r - 1) / 2) ** 2  # 4 p (1 - p) = 1 / cosh(x / 2)^2


def vespo(r, a):
    w = row_product(r)
    return np.where(a > 0, w**2 * np.exp(3 - 3 * w), w**3 * np.exp(2 - 2 * w)) * a


def dppo_kl(r, a, mu):
    return np.where((a * (r - 1) > 0) & (binary_kl(mu, r * mu) > 0.01), 0, r * a)


# g of each token, from its ratio, advantage and probability under the behavior policy.
COEFFICIENTS = {
    "r2vpo": lambda r, a, mu: r * (a - 2 * 2.5 * (r - 1)),
    "policy_gradient": lambda r, a, mu: r * a,
    "ppo_clip": lambda r, a, mu: np.where(outside(r, a, 0.8, 1.2), 0, r * a),
    "cispo": lambda r, a, mu: np.clip(r, 0.8, 1.2) * a,
    "gspo": lambda r, a, mu: np.where(outside(geometric_mean(r), a, 0.9, 1.1), 0, geometric_mean(r) * a),
    "spo": lambda r, a, mu: r * (a - np.abs(a) * (r - 1) / 0.2),
    "m2po": lambda r, a, mu: np.where(outside(r, a, math.exp(-0.25), math.exp(0.25)), 0, r * a),
    "gmpo": lambda r, a, mu: np.where(
        outside(r, a, math.exp(-0.25), math.exp(0.25)), 0, geometric_mean_of_clipped(r, a) * a
    ),
    "sapo": lambda r, a, mu: sapo(r, a),
    "vespo": lambda r, a, mu: vespo(r, a),
    "topr": lambda r, a, mu: np.where(a > 0, 1, np.minimum(row_product(r), 1)) * a,
    "drpo": lambda r, a, mu: r * (a - np.abs(a) * (r * mu - mu) / 0.2),
    "dro": lambda r, a, mu: a - 0.5 * np.log(r),
    "dppo_tv": lambda r, a, mu: np.where(np.sign(a) * (r - 1) * mu > 0.05, 0, r * a) - 0.5 * np.log(r),
    "dppo_kl": dppo_kl,
    "gppo": lambda r, a, mu: gppo(r, a),
    "aspo": lambda r, a, mu: np.where(outside(r, a, 0.8, 1.2), 0, np.minimum(np.where(a > 0, 1 / r, r), 1.35) * a),
    "luspo": lambda r, a, mu: (
        LENGTH[:, None] * np.where(outside(geometric_mean(r), a, 0.9, 1.1), 0, geometric_mean(r) * a)
    ),
}
# What one unit at a token adds to the loss.
SHARE = {
    "token_mean": MASK / np.sum(LENGTH),
    "sequence_mean": MASK / LENGTH[:, None] / ROWS,
    "constant_length": MASK / MASK.size,
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_coefficient_times_the_weight_of_the_token(name, reduction):
    _, _, behavior_logp = draw()
    advantages = np.broadcast_to(ADVANTAGES[:, None], MASK.shape)
    arrays = {"logp": behavior_logp + np.log(RATIO), "behavior_logp": behavior_logp, "advantages": advantages}
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()} | {"mask": MASK}
    _, _, grad = evaluate(name, arrays, reduction, **HYPER.get(name, {}))
    expected = COEFFICIENTS[name](RATIO, advantages, np.exp(behavior_logp))
    np.testing.assert_allclose(-grad, expected * SHARE[reduction], rtol=1e-4, atol=1e-6)
    # As those who read g off the gradient do.
    weights = losses.token_weights(MASK, reduction, given_normalizer(reduction))
    np.testing.assert_allclose(-grad[MASK] / weights[MASK], expected[MASK], rtol=1e-4, atol=2e-5)


def given_normalizer(reduction):
    return MASK.size if reduction == "constant_length" else None


@pytest.mark.parametrize("name", NAMES)
def test_formulas_through_the_softmax(name):
    # d(log pi(a)) / d(logits) = one_hot(a) - pi.
    logits, tokens, behavior_logp = draw()
    coefficient = COEFFICIENTS[name](RATIO, ADVANTAGES[:, None], np.exp(behavior_logp)) * SHARE["sequence_mean"]
    expected = -coefficient[..., None] * (np.eye(VOCABULARY)[tokens] - softmax(logits))
    _, grad = through_the_softmax(name, "sequence_mean")
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(expected)) > 0.02


# Finite differences ---------------------------------------------------------------------------------


def central_differences(function, logits, step):
    """Fourth order, so that a step that float32 resolves still truncates little; `function` takes many points."""
    directions = step * np.eye(logits.size).reshape(-1, *logits.shape)
    offsets = np.asarray([-2.0, -1.0, 1.0, 2.0])[:, None, None, None, None] * directions
    values = np.asarray(function((logits + offsets).reshape(-1, *logits.shape))).reshape(4, -1)
    return (np.asarray([1, -8, 8, -1]) @ values / (12 * step)).reshape(logits.shape)


# The others stop the gradient of a part of their value, which then is no antiderivative of it.
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("name", ["r2vpo", "policy_gradient", "ppo_clip", "spo", "m2po", "sapo", "drpo", "dro"])
def test_finite_differences_through_the_softmax(name, reduction):
    logits, tokens, behavior_logp = draw()

    def loss(points):
        logp = token_logp(points, tokens).astype(np.float32)
        hyper = HYPER.get(name, {}) | {"reduction": reduction}
        return jax.vmap(lambda x: losses.get(name)(x, behavior_logp, ADVANTAGES, MASK, **hyper)[0])(logp)

    _, grad = through_the_softmax(name, reduction)
    np.testing.assert_allclose(grad, central_differences(loss, logits, step=0.02), atol=2e-4)
    assert np.max(np.abs(grad)) > 0.02


def textbook(name, log_ratio):
    """Losses of an objective of whole responses as it is published, one advantage a response. Many points."""
    mean = np.sum(np.where(MASK, log_ratio, 0), axis=-1) / LENGTH
    s = np.exp(mean)
    if name in ("gspo", "luspo"):
        value = np.minimum(s * ADVANTAGES, np.clip(s, 0.9, 1.1) * ADVANTAGES)
        value = value * LENGTH if name == "luspo" else value
    elif name == "gmpo":
        bounded = np.where(ADVANTAGES[:, None] > 0, np.minimum(log_ratio, 0.25), np.maximum(log_ratio, -0.25))
        value = ADVANTAGES * np.exp(np.sum(np.where(MASK, bounded, 0), axis=-1) / LENGTH)
    else:  # r2vpo, with the penalty of the response
        surrogate = np.sum(np.where(MASK, np.exp(log_ratio), 0), axis=-1) / LENGTH * ADVANTAGES
        value = surrogate - 2.5 * (s - 1) ** 2
    return -np.mean(value, axis=-1)


@pytest.mark.parametrize(("name", "scope"), [("gspo", None), ("luspo", None), ("gmpo", None), ("r2vpo", "sequence")])
def test_the_token_form_has_the_gradient_of_the_sequence_level_objective(name, scope):
    logits, tokens, behavior_logp = draw()

    def loss(points):
        return textbook(name, token_logp(points, tokens) - behavior_logp)

    value, grad = through_the_softmax(name, "sequence_mean", scope)
    np.testing.assert_allclose(value, loss(logits), rtol=1e-5)
    np.testing.assert_allclose(grad, central_differences(loss, logits, step=1e-4), rtol=1e-4, atol=1e-6)
    cut = np.all(np.abs(grad) < 1e-7, axis=(1, 2))
    np.testing.assert_array_equal(cut, [name in ("gspo", "luspo")] * 2 + [False] * 2)


# What has a gradient, and under which transformations -------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_only_logp_has_a_gradient(name):
    arrays = batch()
    traced = {"weights": arrays.pop("weights")}
    traced |= {k: np.float32(v) for k, v in COMPUTED.get(name, {}).items()}

    def loss(differentiated):
        return losses.get(name)(**{**arrays, **traced, **differentiated})[0]

    grads = jax.grad(loss)({k: {**arrays, **traced}[k] for k in ("logp", "behavior_logp", "advantages", *traced)})
    assert np.any(grads.pop("logp"))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), grads)


@pytest.mark.parametrize("name", NAMES)
def test_stats_have_no_gradient(name):
    arrays = batch()

    def statistics(logp):
        stats = losses.get(name)(**{**arrays, "logp": logp}, **COMPUTED.get(name, {}))[1]
        return sum(total for total, _ in stats.values())

    np.testing.assert_array_equal(jax.grad(statistics)(arrays["logp"]), 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_jit_of_vmap_of_grad(name):
    batches = [batch(seed) for seed in (1, 2)]
    stacked = {k: np.stack([b[k] for b in batches]) for k in batches[0]}

    def loss(logp, rest):
        return losses.get(name)(logp, **rest, **COMPUTED.get(name, {}), reduction="sequence_mean")[0]

    many, grads = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked.pop("logp"), stacked)
    for i, arrays in enumerate(batches):
        expected, _, expected_grad = evaluate(name, arrays, "sequence_mean")
        np.testing.assert_allclose(many[i], expected, rtol=1e-5, atol=1e-6)
        same_up_to_rounding(grads[i], expected_grad)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_eager_results_agree(name):
    arrays = batch(seed=3)
    compiled, eager = (evaluate(name, arrays, "sequence_mean", jit=jit) for jit in (True, False))
    jax.tree.map(same_up_to_rounding, compiled, eager)


def test_vmap_over_the_variance_coefficient():
    arrays = batch()
    coefs = np.asarray([0.0, 0.5, 2.5])
    many, _ = jax.jit(jax.vmap(lambda c: losses.r2vpo_loss(**arrays, variance_coef=c)))(coefs)
    each = [evaluate("r2vpo", arrays, variance_coef=c)[0] for c in coefs]
    np.testing.assert_allclose(many, each, rtol=1e-6)
    assert len(set(np.asarray(many).tolist())) == 3
