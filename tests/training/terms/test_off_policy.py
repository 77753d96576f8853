"""Data of another policy in a real update: the KL under a correction, filters, masks, shorter steps, the moved baseline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import kl, losses, sharding
from r2vpo_jax.config import make_objective
from r2vpo_jax.tasks.base import Outcome
from r2vpo_jax.training import terms
from tests.helpers.learner import KEY, assert_same
from tests.helpers.rollouts import empty
from tests.helpers.terms import KEEP, corrected, start, update, weights_of


def test_a_divergence_from_the_proximal_policy_is_unbiased():
    """mu = (0.7, 0.2, 0.1) drew the tokens: each of the three is a response, weighed here by its probability.

    KL(proximal || policy) = sum proximal log(proximal / policy) = 0.00805; without the weights it would be 0.01934.
    """
    mu, proximal, policy = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5]), np.array([0.25, 0.3, 0.45])
    logps = [jnp.log(jnp.asarray(p, jnp.float32))[:, None] for p in (mu, proximal, policy)]
    batch = empty(3, 2, 1, behavior_logp=logps[0], proximal_logp=logps[1], response_length=np.ones(3, np.int32))
    objective = make_objective("ppo_kl", correction={"mode": "truncate", "max_weight": 1.5})
    exact = np.sum(proximal * np.log(proximal / policy))
    np.testing.assert_allclose(exact, 0.00805, atol=1e-5)

    def measured(logp):
        return jnp.sum(mu[:, None] * terms.divergence(batch, logp, objective))

    np.testing.assert_allclose(measured(logps[2]), exact, rtol=1e-4)
    np.testing.assert_allclose(np.sum(mu * kl.estimate(logps[1], logps[2], "k3")[:, 0]), 0.01934, atol=1e-5)
    # d KL / d log policy(a), with the policy a softmax: policy - proximal. Of the estimate r - 1 - log r it is the same.
    slope = jax.grad(lambda x: measured(jax.nn.log_softmax(x, axis=0)))(logps[2])
    np.testing.assert_allclose(slope[:, 0], policy - proximal, atol=1e-6)
    # Without a correction the tokens are the behavior policy's own.
    plain = batch.replace(proximal_logp=None)
    kl_of_mu = np.sum(mu * np.log(mu / policy))
    np.testing.assert_allclose(
        jnp.sum(mu[:, None] * terms.divergence(plain, logps[2], make_objective("ppo_kl"))), kl_of_mu, rtol=1e-4
    )


def test_the_update_takes_the_weighed_divergence(learners, params, batch, scored):
    """-w r A + beta w' (r - 1 - log r), r against the proximal policy, w' its untruncated ratio to the sampler's."""
    batch = corrected(batch, scored).replace(keep=KEEP)
    grads, stats, _ = update(learners("corrected_behavior_kl"), params, batch, kl_coef=3.0)
    mask = np.asarray(batch.response_mask) & KEEP[:, None]
    log_ratio, log_weight = ((a - b)[mask].astype(np.float64) for a, b in _pairs(batch, scored))
    expected = np.mean(np.exp(log_weight) * (np.expm1(log_ratio) - log_ratio))
    np.testing.assert_allclose(stats.mean("kl"), expected, rtol=1e-4)
    unweighed = np.mean(np.expm1(log_ratio) - log_ratio)
    assert abs(expected / unweighed - 1) > 0.01
    surrogate = stats.mean("surrogate")
    np.testing.assert_allclose(stats.mean("loss"), -surrogate + 3.0 * expected, rtol=1e-4)
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 0


def _pairs(batch, scored):
    return (scored[0], batch.proximal_logp), (batch.proximal_logp, batch.behavior_logp)


# ---- imitation ----


RIGHT = np.arange(16) % 3 == 0


def judged(batch):
    outcome = np.where(RIGHT, int(Outcome.RIGHT), int(Outcome.WRONG)).astype(np.int32)
    return batch.replace(outcome=outcome, keep=KEEP)


def test_right_responses_are_imitated(learners, params, head, batch, forward):
    """The gradient is that without the term plus c times that of the mean -log pi of right responses that count."""
    batch = judged(batch)
    with_it = update(learners("imitation"), params, batch)
    without = update(learners("imitation"), params, batch.replace(outcome=0 * batch.outcome))
    weight = weights_of(batch.replace(keep=KEEP & RIGHT), "token_mean")
    assert 0 < (weight > 0).any(axis=1).sum() < KEEP.sum()
    imitated, slope = jax.jit(
        jax.value_and_grad(lambda p: -jnp.sum(jnp.where(weight > 0, weight * forward(p, head)[0], 0.0)))
    )(params)
    assert_same(with_it[0], jax.tree.map(lambda a, b: a + 0.7 * np.asarray(b), without[0], slope))
    np.testing.assert_allclose(with_it[1].mean("loss"), without[1].mean("loss") + 0.7 * imitated, rtol=1e-4)
    np.testing.assert_allclose(with_it[1].mean("imitation"), imitated, rtol=1e-5)
    assert without[1].mean("imitation") == 0, "none is right"


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_imitation_is_reduced_as_the_loss_over_right_responses(reduction, batch, scored):
    """In micro-batches that add up, though one may have no right response."""
    objective = make_objective("policy_gradient", loss={"reduction": reduction, "imitation_coef": 1.0})
    batch = judged(batch)
    number = terms.imitation_normalizer(batch, objective)
    weight = weights_of(batch.replace(keep=KEEP & RIGHT), reduction)
    expected = -np.sum(np.where(weight > 0, weight * scored[0], 0.0))
    np.testing.assert_allclose(terms.imitation(batch, scored[0], reduction, number), expected, rtol=1e-5)
    parts = [
        terms.imitation(jax.tree.map(lambda x: x[i::4], batch), scored[0][i::4], reduction, number)  # noqa: B023
        for i in range(4)
    ]
    assert 0 in parts
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-5)
    assert terms.imitation_normalizer(batch, make_objective("policy_gradient")) is None


# ---- whole responses ----


def moved(batch, scored, shift):
    """The batch as if the policy's log-probabilities had changed by `shift` [B] at each token since it was sampled."""
    mask = np.asarray(batch.response_mask)
    behavior = np.where(mask, scored[0] - np.asarray(shift)[:, None], np.nan)
    return batch.replace(behavior_logp=behavior.astype(np.float32))


def test_bad_responses_left_behind_have_no_gradient(learners, params, head, batch, scored, formula):
    """Threshold 0.5: half of the rows fell by 0.6 nats a token, the others by 0.4; half of each are bad."""
    shift = np.where(np.arange(16) % 2, -0.6, -0.4)
    advantage = np.where(np.arange(16) % 4 < 2, 1.0, -1.0).astype(np.float32)
    batch = moved(batch, scored, shift).replace(advantage=advantage)
    gone = (shift < -0.5) & (advantage < 0)
    assert gone.sum() == 4
    grads, stats, _ = update(learners("left_out"), params, batch)
    loss, (expected, _) = formula((params, head), batch, share=np.where(gone, 0.0, 1.0)[:, None])
    assert_same(grads, expected)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    mask = np.asarray(batch.response_mask)
    np.testing.assert_allclose(stats.mean("left_out"), mask[gone].sum() / mask.sum(), rtol=1e-6)


def test_a_filter_leaves_out_whole_responses(learners, params, batch, scored):
    """Before the first update, by the learner's own scores: 4 rows moved by 1 %, the bounds are 0.999 and 1.002."""
    shift = np.where(np.arange(16) % 4 == 1, 0.01, 0.0005)
    learner = learners("left_out")
    rows = sharding.put_batch(moved(batch, scored, shift), learner.mesh)
    weighed = learner.correct(learner.init_state(params).params, rows)
    expected = np.where(batch.response_mask & (shift < 0.002)[:, None], np.exp(shift)[:, None], 0.0)
    np.testing.assert_allclose(weighed.weights, expected, rtol=1e-4, atol=1e-6)
    _, report = learner.train_on_rollout(start(learner, params, rate=0.0), rows, KEY)
    mask = np.asarray(batch.response_mask)
    np.testing.assert_allclose(report.stats.mean("left_out"), mask[shift > 0.002].sum() / mask.sum(), rtol=1e-6)


# ---- VCPO ----


def test_a_step_on_stale_responses_is_shorter(learners, params, head, batch, scored, formula):
    """Weights of whole responses, of 16 rows: e^(T x); the gradient is what it is, and the step sqrt(rho) of it."""
    shift = np.linspace(-0.1, 0.3, 16)
    batch = moved(batch, scored, shift).replace(keep=KEEP)
    w = np.exp(shift * batch.response_length)[KEEP]
    rho = w.sum() ** 2 / (len(w) * np.square(w).sum())
    assert 0.2 < rho < 0.9
    loss, (expected, _) = formula((params, head), batch)
    grads, stats, _ = update(learners("vcpo"), params, batch)
    np.testing.assert_allclose(stats.mean("step_scale"), np.sqrt(rho), rtol=1e-4)
    assert_same(grads, jax.tree.map(lambda g: np.sqrt(rho) * g, expected))
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    # Nothing is shorter where the data is fresh.
    _, fresh, _ = update(learners("vcpo"), params, moved(batch, scored, 0 * shift))
    np.testing.assert_allclose(fresh.mean("step_scale"), 1.0, rtol=1e-5)


def test_the_baseline_is_moved_to_where_the_variance_is_least(learners, params, head, batch, scored, forward):
    """W = w^2 |grad log pi|^2 of each response, by gradients of the whole batch's forward pass."""
    shift = np.random.default_rng(2).uniform(-0.1, 0.1, 16)
    batch = moved(batch, scored, shift).replace(
        keep=KEEP, advantage=np.tile([1.5, -0.5, -0.5, -0.5], 4).astype(np.float32)
    )
    learner = learners("vcpo")
    rows = sharding.put_batch(batch, learner.mesh)
    found = np.asarray(learner.move_baseline(learner.init_state(params).params, rows).advantage)
    mask = np.asarray(batch.response_mask)

    def log_probability(params, row):
        return jnp.sum(jnp.where(mask, forward(params, head)[0], 0.0)[row])

    def squared_norm(row):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.grad(log_probability)(params, row)))

    squares = np.asarray(jax.jit(lambda: jax.lax.map(squared_norm, jnp.arange(16)))())
    weight = np.where(KEEP, np.exp(2 * shift * batch.response_length) * squares, 0.0).reshape(4, 4)
    advantage = np.where(KEEP, batch.advantage, 0.0).reshape(4, 4)
    total = weight.sum(axis=1)
    baseline = np.where(total > 0, (weight * advantage).sum(axis=1) / np.where(total > 0, total, 1), 0.0)
    assert np.abs(baseline).max() > 0.05, "it was somewhere else"
    expected = batch.advantage.reshape(4, 4) - baseline[:, None]
    np.testing.assert_allclose(found[KEEP], expected.reshape(-1)[KEEP], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_whole_of_vcpo_trains(learners, params, batch, scored):
    """Weights of responses up to 8, a moved baseline, a shorter step: all of it in one batch of two updates."""
    learner = learners("vcpo")
    stale = moved(batch, scored, np.linspace(-0.2, 0.4, 16)).replace(
        advantage=np.tile([1.5, -0.5, -0.5, -0.5], 4).astype(np.float32)
    )
    after, report = learner.train_on_rollout(
        start(learner, params, rate=1e-3), sharding.put_batch(stale, learner.mesh), KEY
    )
    assert int(after.version) == 2
    assert not np.any(np.asarray(report.skipped))
    assert 0 < report.stats.mean("step_scale") < 1
    largest = np.exp(0.4 * batch.response_length.max())
    assert largest > 8 >= report.stats.mean("weight")
