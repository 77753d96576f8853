"""The value head and its clipped loss, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2vpo_jax import losses
from r2vpo_jax.train_stats import TrainStats
from r2vpo_jax.training import critic

# One token each, clip 0.2:
#   V    V_old  R    (V - R)^2 / 2   moved by at most 0.2   the larger, and its gradient
#   1.1  1.0    2.0  0.405           the same               0.405   V - R = -0.9
#   1.5  1.0    2.0  0.125           1.2: 0.32              0.32    0: it is far enough on its way
#   1.5  1.0    0.0  1.125           1.2: 0.72              1.125   1.5: it went the wrong way
#   0.5  1.0    0.9  0.08            0.8: 0.005             0.08    -0.4: it overshot
VALUES, OLD, TARGETS = (np.array(x, np.float32) for x in ([1.1, 1.5, 1.5, 0.5], [1, 1, 1, 1], [2, 2, 0, 0.9]))
CLIPPED = ([0.405, 0.32, 1.125, 0.08], [-0.9, 0, 1.5, -0.4])
UNCLIPPED = ([0.405, 0.125, 1.125, 0.08], [-0.9, -0.5, 1.5, -0.4])


def as_rows(*arrays):
    """The four tokens as one row of three and one of one, with junk where nothing counts."""
    return [np.array([x[:3], [x[3], np.nan, np.inf]], np.float32) for x in arrays]


MASK = np.array([[True, True, True], [True, False, False]])
# Weight of each token in the mean: 1/4; 1/2 of 1/3 or of 1; 1/6 for all B T = 6 positions.
WEIGHTS = {
    "token_mean": (np.full(4, 1 / 4), None),
    "sequence_mean": (np.array([1 / 6, 1 / 6, 1 / 6, 1 / 2]), None),
    "constant_length": (np.full(4, 1 / 6), 6.0),
}


def mean(stats, name):
    total, number = stats[name]
    return float(total / number)


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
@pytest.mark.parametrize(("clip", "expected"), [(0.2, CLIPPED), (0.0, UNCLIPPED)])
def test_the_loss_and_its_gradient(clip, expected, reduction):
    values, old, targets = as_rows(VALUES, OLD, TARGETS)
    weights, normalizer = WEIGHTS[reduction]

    def loss(values, old, targets):
        return critic.value_loss(values, old, targets, MASK, clip=clip, reduction=reduction, normalizer=normalizer)

    (value, stats), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(values, old, targets)
    per_token, slope = expected
    np.testing.assert_allclose(value, np.dot(weights, per_token), rtol=1e-6)
    np.testing.assert_allclose(grads[0][MASK], weights * slope, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grads[0][~MASK], [0, 0])
    for grad in grads[1:]:
        np.testing.assert_array_equal(grad, np.zeros_like(grad))  # neither the target nor the old value learns
    # Statistics are means over tokens, whatever the reduction.
    np.testing.assert_allclose(mean(stats, "value_loss"), np.mean(per_token), rtol=1e-6)
    assert mean(stats, "value_clip_fraction") == (0.25 if clip else 0)
    np.testing.assert_allclose(mean(stats, "value_target"), 4.9 / 4, rtol=1e-6)
    np.testing.assert_allclose(mean(stats, "value_target_squared"), (4 + 4 + 0 + 0.81) / 4, rtol=1e-6)
    np.testing.assert_allclose(mean(stats, "value_error"), (-0.9 - 0.5 + 1.5 - 0.4) / 4, rtol=1e-5)
    np.testing.assert_allclose(mean(stats, "value_error_squared"), (0.81 + 0.25 + 2.25 + 0.16) / 4, rtol=1e-6)


def test_the_defaults():
    rows = as_rows(VALUES, OLD, TARGETS)
    value, _ = critic.value_loss(*rows, MASK)
    np.testing.assert_allclose(value, np.mean(CLIPPED[0]), rtol=1e-6)


def test_a_move_within_the_clip_is_not_counted_as_clipped():
    """Moves of at most 0.15 where the clip is at 0.2: rounding in V_old + (V - V_old) is no clip."""
    generator = np.random.default_rng(0)
    old = generator.uniform(-0.1, 0.1, (20, 50)).astype(np.float32)
    values = generator.uniform(-0.05, 0.05, old.shape).astype(np.float32)
    targets = generator.standard_normal(old.shape).astype(np.float32)
    assert np.abs(values - old).max() < 0.2
    _, stats = critic.value_loss(values, old, targets, np.ones(old.shape, bool), clip=0.2)
    assert mean(stats, "value_clip_fraction") == 0


def test_what_is_masked_changes_nothing_at_all():
    rows = as_rows(VALUES, OLD, TARGETS)
    clean = [np.where(MASK, x, 0.0) for x in rows]
    (value, stats), (expected, expected_stats) = (critic.value_loss(*x, MASK) for x in (rows, clean))
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, stats, expected_stats)
    # And nothing at all is nothing.
    value, stats = critic.value_loss(*rows, np.zeros_like(MASK))
    assert value == 0
    assert all(total == number == 0 for total, number in stats.values())


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_losses_gradients_and_statistics_of_micro_batches_add_up(reduction):
    generator = np.random.default_rng(1)
    arrays = [generator.standard_normal((6, 5)).astype(np.float32) for _ in range(3)]
    mask = np.arange(5) < np.array([5, 1, 3, 2, 4, 5])[:, None]
    normalizer = {"token_mean": 20.0, "sequence_mean": 6.0, "constant_length": 30.0}[reduction]

    @jax.jit
    def of(*arrays):
        loss = functools.partial(critic.value_loss, reduction=reduction, normalizer=normalizer)
        return jax.value_and_grad(loss, has_aux=True)(*arrays)

    (whole, stats), grad = of(*arrays, mask)
    parts = [of(*(x[i : i + 2] for x in (*arrays, mask))) for i in (0, 2, 4)]
    np.testing.assert_allclose(sum(part[0][0] for part in parts), whole, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), grad, rtol=1e-6)
    added = jax.tree.map(lambda *x: sum(x), *(part[0][1] for part in parts))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5), added, stats)
    if reduction != "constant_length":  # the global count is the default on the whole batch
        np.testing.assert_allclose(critic.value_loss(*arrays, mask, reduction=reduction)[0], whole, rtol=1e-6)


def test_refusals():
    rows, mask = [np.zeros((2, 3), np.float32)] * 3, np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="value clip must be >= 0"):
        critic.value_loss(*rows, mask, clip=-0.1)
    with pytest.raises(ValueError, match="value clip must be >= 0"):
        critic.value_loss(*rows, mask, clip=float("nan"))
    with pytest.raises(ValueError, match="constant_length"):
        critic.value_loss(*rows, mask, reduction="constant_length")
    with pytest.raises(AssertionError):
        critic.value_loss(rows[0], rows[1][:1], rows[2], mask)
    with pytest.raises(AssertionError):
        critic.value_loss(*(x[0] for x in rows), mask[0])


# ---- explained variance ----


def explained(values, targets):
    values, targets = (np.array([x], np.float32) for x in (values, targets))
    _, stats = critic.value_loss(values, values, targets, np.ones(values.shape, bool))
    return critic.explained_variance(TrainStats(stats, {}, np.zeros(1), {}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 2, 5], 1.0),  # perfect
        ([3, 4, 5, 8], 1.0),  # a constant offset is no lack of explanation
        ([2, 2, 2, 2], 0.0),  # their mean
        ([0, 0, 0, 0], 0.0),  # any constant
        # R - V = 2 R has four times the variance.
        ([0, -1, -2, -5], -3.0),
        # R - V = [0, 1, 0, 1] has variance 1/4; R has 30/4 - 4 = 7/2.
        ([0, 0, 2, 4], 1 - 1 / 14),
    ],
)
def test_explained_variance(values, expected):
    np.testing.assert_allclose(explained(values, [0, 1, 2, 5]), expected, atol=1e-6)


@pytest.mark.parametrize("target", [0.0, 1.0, 0.7, 0.9])
@pytest.mark.parametrize("number", [1, 7, 1000])
def test_targets_that_do_not_vary_explain_nothing(target, number):
    """The mean square less the squared mean of equal numbers is rounding, not variance."""
    values = np.random.default_rng(0).standard_normal(number)
    assert np.isnan(explained(values, np.full(number, target)))


# ---- the head ----


def test_a_fresh_head_says_nothing():
    optimizer = critic.make_optimizer(1e-3, 1.0)
    state = critic.init(3, optimizer)
    hidden = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    values = critic.values((state.kernel, state.bias), hidden)
    np.testing.assert_array_equal(values, np.zeros((2, 5)))
    assert (state.kernel.shape, state.bias.shape) == ((3,), ())
    # But it can learn: its gradient is not zero.
    grads = jax.grad(lambda head: jnp.sum((critic.values(head, hidden) - 1) ** 2))((state.kernel, state.bias))
    assert all(np.any(np.abs(g) > 0.1) for g in grads)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_one_linear_map_in_float32(dtype):
    """The mean of the products, plus the bias; bfloat16 has three digits at best."""
    hidden = jnp.asarray([[[1.0, 2.0], [0.5, -1.0]]], dtype)
    head = (jnp.array([1.001, -2.003]), jnp.array(0.25))
    values = critic.values(head, hidden)
    assert values.dtype == jnp.float32
    # (1.001 - 4.006) / 2 + 0.25 and (0.5005 + 2.003) / 2 + 0.25
    np.testing.assert_allclose(values, [[-1.2525, 1.50175]], rtol=1e-6)


def test_the_head_has_a_rate_and_a_norm_clip_of_its_own():
    """Adam's first step is the rate times the sign; the clip shows in its first moment, 0.1 of the gradient."""
    optimizer = critic.make_optimizer(0.25, 1.0)
    head = (jnp.zeros(1), jnp.zeros(()))
    updates, state = optimizer.update((jnp.array([30.0]), jnp.array(-40.0)), optimizer.init(head), head)
    np.testing.assert_allclose([updates[0][0], updates[1]], [-0.25, 0.25], rtol=1e-5)
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([mu[0][0], mu[1]], [0.06, -0.08], rtol=1e-5)
