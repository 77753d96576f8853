"""KL divergences and the entropy bonus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import sharding
from tests.helpers.learner import KEY, assert_same
from tests.helpers.terms import (
    KEEP,
    per_token,
    start,
    update,
)


def at_distance(batch, scored, spread):
    """The batch as if sampled from a policy whose log-probabilities are `spread` away on average."""
    noise = np.random.default_rng(5).standard_normal(scored[0].shape)
    return batch.replace(behavior_logp=(scored[0] + spread * noise).astype(np.float32))


@pytest.mark.parametrize(
    ("spread", "factor"),
    [
        (0.5, 2.0),  # KL about 0.5^2 / 2 = 0.12, far above 1.5 times the target of 0.01
        (0.14, 1.0),  # 0.0098: near it
        (0.05, 0.5),  # 0.0013: below 2/3 of it
    ],
)
def test_beta_follows_the_kl_to_the_behavior_policy(spread, factor, learners, params, batch, scored):
    """Nothing is learned here (the rate is 0), so both minibatches measure mean(r - 1 - log r) of the batch."""
    learner, batch = learners("sequence_mean"), at_distance(batch, scored, spread)
    log_ratio = (scored[0] - batch.behavior_logp)[np.asarray(batch.response_mask)].astype(np.float64)
    divergence = np.mean(np.expm1(log_ratio) - log_ratio)
    state = start(learner, params, rate=0.0, kl_coef=3.0)
    after, report = learner.train_on_rollout(state, sharding.put_batch(batch, learner.mesh), KEY)
    np.testing.assert_allclose(report.stats.mean("kl"), divergence, rtol=1e-3)
    # Away from the edges of the rule, so that rounding decides nothing.
    assert (divergence > 0.02, 0.0075 < divergence < 0.0135, divergence < 0.005) == (
        factor == 2.0,
        factor == 1.0,
        factor == 0.5,
    )
    assert float(after.kl_coef) == 3.0 * factor


def test_beta_stays_where_the_last_minibatch_measured_nothing(learners, params, batch, scored):
    """Far above the target in the first minibatch and nothing kept, or NaN, in the last."""
    learner, far = learners("sequence_mean"), at_distance(batch, scored, 0.5)

    def measured(batch):
        return learner.update(start(learner, params, rate=0.0), sharding.put_batch(batch, learner.mesh))[1]

    spoiled = far.behavior_logp.copy()
    spoiled[0, 0] = np.nan
    good, empty, nan = (
        measured(b) for b in (far, far.replace(keep=np.zeros(16, bool)), far.replace(behavior_logp=spoiled))
    )
    state = learner.init_state(params)
    for stats, expected in (([good, empty], 1.0), ([good, nan], 1.0), ([empty, good], 2.0), ([nan, good], 2.0)):
        _, kl_coef, _ = learner.step_multipliers(state.dual, state.kl_coef, stats)
        assert float(kl_coef) == expected


def test_a_corrected_kl_and_an_entropy_bonus_follow_the_formula(learners, params, head, batch, scored, formula):
    """-r A + beta r k3 - c H with advantages of tokens; beta is 5, where the configuration starts at 1."""
    batch = per_token(batch).replace(keep=KEEP)
    loss, (expected, _) = formula((params, head), batch, corrected_kl=5.0, entropy=2.0)
    grads, stats, _ = update(learners("bonus"), params, batch, kl_coef=5.0)
    assert_same(grads, expected)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    mask = np.asarray(batch.response_mask) & KEEP[:, None]
    x, log_ratio = (
        (scored[0] - other)[mask].astype(np.float64) for other in (batch.reference_logp, batch.behavior_logp)
    )
    corrected = np.mean(np.exp(log_ratio) * (np.exp(-x) - 1 + x))
    assert abs(corrected / np.mean(np.exp(-x) - 1 + x) - 1) > 0.01, "uncorrected it is another number"
    np.testing.assert_allclose(stats.mean("kl"), corrected, rtol=1e-4)
    np.testing.assert_allclose(stats.mean("entropy"), np.mean(scored[1][mask]), rtol=1e-5)


def test_a_step_along_the_bonus_alone_raises_the_entropy(learners, params, head, batch, forward):
    """No advantage and no KL: the gradient is -c dH, so a step of size e raises H by e |g|^2 / c at first order."""
    batch = per_token(batch)
    nothing = batch.replace(advantage=np.zeros_like(batch.advantage))
    grads, stats, _ = update(learners("bonus"), params, nothing, kl_coef=0.0)
    np.testing.assert_allclose(stats.mean("loss"), -2.0 * stats.mean("entropy"), rtol=1e-6)
    squared = sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))
    size = 0.01 / squared
    mask = np.asarray(batch.response_mask)
    entropy = jax.jit(lambda params: jnp.mean(forward(params, head)[1], where=mask))
    moved = entropy(jax.tree.map(lambda p, g: p - size * g, params, grads))
    np.testing.assert_allclose(moved - entropy(params), size * squared / 2.0, rtol=0.05)
