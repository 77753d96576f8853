"""Responses that are left out, and steps that are shortened, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import corrections

NAN = np.nan


def rows(log_ratios):
    """(proximal, behavior, mask) of ragged rows of log proximal - log behavior; junk behind their ends."""
    width = max(map(len, log_ratios))
    mask = np.array([[i < len(row) for i in range(width)] for row in log_ratios])
    ratio = np.array([[*row, *[NAN] * (width - len(row))] for row in log_ratios], np.float32)
    return np.float32(-2.0) + ratio, np.full(mask.shape, -2.0, np.float32), mask


# Means 0, 0.1, -0.1, 0.001 and (no token) 0. Of the first k3 is (e - 2 + 1/e) / 2 = 0.543, of the others about x^2 / 2.
ROWS = [[1.0, -1.0], [0.1, 0.1, 0.1], [-0.1], [0.001, 0.001], []]


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"kind": "geometric", "low": 0.999, "high": 1.002}, [1, 0, 0, 1, 1]),
        ({"kind": "geometric", "low": 0.0, "high": 1.002}, [1, 0, 1, 1, 1]),
        ({"kind": "geometric", "low": 0.9, "high": 1.2}, [1, 1, 1, 1, 1]),  # e^-0.1 = 0.905, e^0.1 = 1.105
        ({"kind": "mean_k3", "high": 0.5}, [0, 1, 1, 1, 1]),
        ({"kind": "mean_k3", "high": 0.55}, [1, 1, 1, 1, 1]),
        ({"kind": "mean_k3", "high": 0.0050}, [0, 0, 1, 1, 1]),  # e^0.1 - 1.1 = 0.00517, e^-0.1 - 0.9 = 0.00484
        ({"kind": "max_k2", "high": 0.49}, [0, 1, 1, 1, 1]),
        ({"kind": "max_k2", "high": 0.004}, [0, 0, 0, 1, 1]),
    ],
)
def test_filters_by_hand(given, kept, jit):
    function = corrections.sequence_filter
    function = jax.jit(function, static_argnames=("kind", "low", "high")) if jit else function
    arrays = rows(ROWS)
    np.testing.assert_array_equal(function(*arrays, **given), np.where(arrays[2], np.array(kept)[:, None], 0))


def test_a_nan_that_counts_is_not_hidden_by_a_filter():
    proximal, behavior, mask = rows([[0.0, NAN], [0.0, 0.0]])
    for kind in corrections.FILTERS:
        kept = np.asarray(corrections.sequence_filter(proximal, behavior, mask, kind=kind, high=1.0))
        np.testing.assert_array_equal(kept, [[NAN, NAN], [1, 1]])


def test_masked_sequence_importance_sampling_keeps_raw_weights():
    """NeMo-RL's seq-mask-tis: a filter on the geometric mean, and weights of tokens that nothing truncates."""
    arrays = rows([[1.0, -1.0], [0.5, 0.5]])
    kept = corrections.sequence_filter(*arrays, kind="geometric", low=0.999, high=1.002)
    weights = corrections.importance_weights(*arrays, max_weight=np.inf)
    np.testing.assert_allclose(weights * kept, [[np.e, 1 / np.e], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "median", "high": 1.0}, "unknown sequence filter 'median'"),
        ({"kind": "geometric", "low": 0.5, "high": 0.9}, "0 <= low <= 1 <= high is needed"),
        ({"kind": "mean_k3", "high": 0.0}, "high must be > 0"),
    ],
)
def test_filters_refuse(given, message):
    with pytest.raises(ValueError, match=message):
        corrections.sequence_filter(*rows(ROWS), **given)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_bad_responses_left_behind_by_hand(jit):
    """Mean falls of 0.6, 0.6, 0.4, -3 nats, and one whose first token alone fell by 1; threshold 0.5."""
    logp, behavior, mask = rows([[-0.6], [-0.2, -1.0], [-0.4, -0.4], [3.0], [-1.0, 0.2]])
    function = corrections.off_policy_mask
    function = jax.jit(function, static_argnames="threshold") if jit else function
    actual = function(logp, behavior, jnp.array([0.0, -1.0, -1.0, -1.0, -1.0]), mask, threshold=0.5)
    np.testing.assert_array_equal(actual, [[1, 0], [0, 0], [1, 1], [1, 0], [1, 1]])
    # With an advantage of each token, those of the bad ones go.
    per_token = jnp.array([[1.0, 0.0], [-1.0, 2.0], [-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0]])
    actual = function(logp, behavior, per_token, mask, threshold=0.5)
    np.testing.assert_array_equal(actual, [[1, 0], [0, 1], [1, 1], [1, 0], [1, 1]])


def test_the_mask_has_no_gradient_and_a_threshold():
    logp, behavior, mask = rows([[-0.6, 0.1]])
    slope = jax.grad(lambda x: corrections.off_policy_mask(x, behavior, -jnp.ones(1), mask, threshold=0.5).sum())(logp)
    np.testing.assert_array_equal(slope, [[0, 0]])
    with pytest.raises(ValueError, match="threshold must be > 0"):
        corrections.off_policy_mask(logp, behavior, -jnp.ones(1), mask, threshold=0.0)


def test_steps_by_hand():
    """w = 1, 1, 1, 9: 144 / (4 * 84) = 3/7. Equal weights: 1. None: 1. One of n: 1/n."""
    for (*sums, rule, reference), expected in {
        (12, 84, 4, "sqrt", 1.0): np.sqrt(3 / 7),
        (12, 84, 4, "linear", 1.0): 3 / 7,
        (12, 84, 4, "linear", 0.6): 5 / 7,
        (12, 84, 4, "sqrt", 0.4): 1.0,
        (10, 20, 5, "sqrt", 1.0): 1.0,
        (0, 0, 0, "sqrt", 1.0): 1.0,
        (7, 49, 16, "sqrt", 1.0): 0.25,
    }.items():
        actual = corrections.step_scale(*map(jnp.float32, sums), rule=rule, reference=reference)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, err_msg=f"{sums} {rule} {reference}")
    sums = [jnp.float32(x) for x in (12, 84, 4)]
    with pytest.raises(ValueError, match="unknown step scaling 'cubic'"):
        corrections.step_scale(*sums, rule="cubic")
    with pytest.raises(ValueError, match="reference must be in"):
        corrections.step_scale(*sums, reference=0.0)


def test_weights_of_responses():
    """Products of ratios; what is masked counts nothing; beyond e^20 they are clamped."""
    logp, behavior, mask = rows([[1.0, 0.5], [-2.0], [30.0], []])
    actual = corrections.sequence_weights(logp, behavior, mask)
    np.testing.assert_allclose(actual, np.exp([1.5, -2.0, 20.0, 0.0]), rtol=1e-5)
    assert np.isfinite(np.sum(np.square(np.asarray(actual))))


# ---- score centering ----

P, Q = np.array([0.5, 0.2, 0.15, 0.1, 0.05]), np.array([0.3, 0.3, 0.2, 0.15, 0.05])


def logits_and_head(size):
    """(logits of P, function of them to (head log p, log q) of the likeliest tokens of Q)."""
    head = np.argsort(-Q, kind="stable")[:size]

    def arrays(logits):
        return jax.nn.log_softmax(logits)[head][None, None], jnp.log(jnp.asarray(Q[head], jnp.float32))[None, None]

    return jnp.log(jnp.asarray(P, jnp.float32)), arrays


@pytest.mark.parametrize("max_weight", [None, 0.8, 1.5, 1e9])
def test_centering_takes_off_the_expected_score(max_weight):
    """By logits, dlog p(v) is e_v - p: E_q[w dlog p] = q w - p sum(q w), with w = min(p / q, max_weight) or 1."""
    logits, arrays = logits_and_head(5)
    slope = jax.grad(lambda x: corrections.centering_term(*arrays(x), jnp.ones((1, 1)), max_weight=max_weight).sum())(
        logits
    )
    mass = Q if max_weight is None else np.minimum(P, max_weight * Q)
    np.testing.assert_allclose(slope, mass - P * mass.sum(), atol=1e-6)
    if max_weight == 1e9:
        np.testing.assert_allclose(slope, np.zeros(5), atol=1e-6)  # weights that nothing truncates have no drift


def test_a_centered_gradient_is_a_covariance():
    """Any constant added to the advantages cancels: E_q[(A + c) dlog p] - (A + c)-weighted centering is Cov_q(A, dlog p)."""
    logits, arrays = logits_and_head(5)
    advantages = np.array([1.0, -0.5, 0.3, 2.0, -1.0])

    def loss(x, shift):
        log_p = jax.nn.log_softmax(x)
        center = corrections.centering_term(*arrays(x), jnp.ones((1, 1)))[0, 0]
        return jnp.sum(Q * (advantages + shift) * (center - log_p))

    score = np.eye(5) - P
    covariance = (Q * (advantages - Q @ advantages)) @ score
    for shift in (0.0, 7.0):
        np.testing.assert_allclose(-jax.grad(loss)(logits, shift), covariance, atol=1e-5)


@pytest.mark.parametrize("max_weight", [None, 0.8, 1.5])
def test_the_tail_is_the_policys_own(max_weight):
    """H has the first three of Q; of the others q is rho p, rho = 0.2 / 0.15."""
    logits, arrays = logits_and_head(3)
    head = [0, 1, 2]
    rho = (1 - Q[head].sum()) / (1 - P[head].sum())
    q = rho * P
    q[head] = Q[head]
    np.testing.assert_allclose(q.sum(), 1)
    mass = q if max_weight is None else np.minimum(P, max_weight * q)
    slope = jax.grad(lambda x: corrections.centering_term(*arrays(x), jnp.ones((1, 1)), max_weight=max_weight).sum())(
        logits
    )
    np.testing.assert_allclose(slope, mass - P * mass.sum(), atol=1e-6)


def test_centering_masks_and_refuses():
    mask = np.array([[1, 0]])
    logp = np.log(np.array([[[0.6, 0.4], [NAN, NAN]]], np.float32))
    sampler = np.log(np.array([[[0.5, 0.5], [NAN, NAN]]], np.float32))
    value, slope = jax.value_and_grad(lambda x: corrections.centering_term(x, sampler, mask).sum())(logp)
    np.testing.assert_allclose(value, 0.5 * np.log(0.24), rtol=1e-6)
    np.testing.assert_allclose(slope, [[[0.5, 0.5], [0, 0]]], rtol=1e-6)
    with pytest.raises(ValueError, match="max_weight must be > 0"):
        corrections.centering_term(logp, sampler, mask, max_weight=0.0)
    with pytest.raises(AssertionError):
        corrections.centering_term(logp, sampler[..., :1], mask)
