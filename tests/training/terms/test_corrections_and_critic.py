"""Importance corrections, the critic, and one program for all of it."""

import jax
import numpy as np
import pytest

from r2vpo_jax import sharding
from r2vpo_jax.training import critic
from tests.helpers.compilations import compilations
from tests.helpers.learner import KEY, assert_same
from tests.helpers.terms import (
    KEEP,
    VALUE_RATE,
    corrected,
    garbage,
    per_token,
    start,
    update,
)

# ---- corrections ----

OFFSETS = np.linspace(-1.0, 1.5, 16).astype(np.float32)  # exp: 0.37 to 4.5, and 2 at 0.69


@pytest.fixture(scope="module")
def mismatched(batch, scored):
    """Sampled by a policy whose log-probabilities are off by one number a row."""
    behavior = np.where(batch.response_mask, scored[0] - OFFSETS[:, None], np.nan)
    return per_token(batch).replace(behavior_logp=behavior.astype(np.float32))


def test_weights_are_the_truncated_ratios_of_the_learner_to_the_sampler(learners, params, mismatched, scored):
    """And taken before the first update, by the learner's own scores."""
    learner = learners("critic")
    mask = np.asarray(mismatched.response_mask)
    corrected = learner.correct(learner.init_state(params).params, sharding.put_batch(mismatched, learner.mesh))
    np.testing.assert_allclose(np.asarray(corrected.proximal_logp)[mask], scored[0][mask], rtol=1e-5, atol=1e-5)
    expected = np.where(mask, np.minimum(np.exp(OFFSETS), 2.0)[:, None], 0.0)
    assert (np.exp(OFFSETS) > 2.0).sum() == 5, "some are cut"
    np.testing.assert_allclose(corrected.weights, expected, rtol=1e-4)


def test_the_ratio_is_against_the_proximal_policy(learners, params, head, mismatched, scored):
    """r is 1 in the first minibatch, though the sampler's policy is another: (exp(c) - 1)^2 is 1.7 on average."""
    learner = learners("critic")
    state = start(learner, params, rate=0.0, head=head)
    after, report = learner.train_on_rollout(state, sharding.put_batch(mismatched, learner.mesh), KEY)
    assert report.variance_first < 1e-9
    assert report.variance_last < 1e-9  # nothing was learned
    mask = np.asarray(mismatched.response_mask)
    uncorrected = np.mean(np.square(np.expm1(OFFSETS))[:, None] * np.ones(mask.shape), where=mask)
    assert uncorrected > 1
    weights = np.broadcast_to(np.minimum(np.exp(OFFSETS), 2.0)[:, None], mask.shape)[mask]
    np.testing.assert_allclose(report.stats.mean("weight"), weights.mean(), rtol=1e-4)
    np.testing.assert_allclose(report.stats.mean("weight_squared"), np.square(weights).mean(), rtol=1e-4)
    # The anchor stays where it is while the parameters move.
    state = start(learner, params, rate=1e-3, head=head)
    after, report = learner.train_on_rollout(state, sharding.put_batch(mismatched, learner.mesh), KEY)
    assert report.variance_first < 1e-9 < 1e-7 < report.variance_last < 0.1
    assert int(after.version) == 2


# ---- the critic ----


def test_policy_value_kl_and_correction_add_up(learners, params, head, batch, scored, formula):
    """-w r A + beta x^2 / 2 + 0.7 value loss, r against the proximal policy; weights are the surrogate's alone."""
    batch = corrected(per_token(batch), scored).replace(keep=KEEP)
    share = np.where(batch.learning_mask, batch.weights, 0.0)
    loss, (expected, head_grads) = formula((params, head), batch, share=share, reference_kl=3.0, value=0.7)
    grads, stats, after = update(learners("critic"), params, batch, head=head, kl_coef=3.0)
    assert_same(grads, expected)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves((expected, head_grads))))
    np.testing.assert_allclose(stats.mean("grad_norm"), norm, rtol=1e-5)
    # The head has an Adam of its own, whose first step is its rate against the sign of the gradient.
    assert min(np.abs(g).min() for g in head_grads) > 1e-4
    for new, old, grad in zip((after.critic.kernel, after.critic.bias), head, head_grads, strict=True):
        np.testing.assert_allclose(new, old - VALUE_RATE * np.sign(grad), rtol=1e-4, atol=1e-4)


def test_what_a_dropped_row_holds_changes_nothing_for_a_critic(learners, params, head, batch, scored):
    batch = corrected(per_token(batch), scored).replace(keep=KEEP)
    clean, spoiled = (update(learners("critic"), params, b, head=head) for b in (batch, garbage(batch)))
    jax.tree.map(np.testing.assert_array_equal, spoiled[1:], clean[1:])


def test_the_value_loss_alone_moves_the_trunk(learners, params, head, batch, scored, formula):
    batch = corrected(per_token(batch), scored)
    nothing = batch.replace(advantage=np.zeros_like(batch.advantage))
    loss, (expected, _) = formula((params, head), nothing, value=0.7)
    grads, stats, _ = update(learners("critic"), params, nothing, head=head, kl_coef=0.0)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    assert largest > 1e-3
    for a, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    np.testing.assert_allclose(0.7 * stats.mean("value_loss"), loss, rtol=1e-5)
    mask = np.asarray(batch.response_mask)
    targets, errors = batch.value_target[mask], (scored[2] - batch.value_target)[mask]
    np.testing.assert_allclose(critic.explained_variance(stats), 1 - np.var(errors) / np.var(targets), rtol=1e-3)
    bounded = np.abs(scored[2] - batch.value)[mask] > 0.2
    assert 0 < stats.mean("value_clip_fraction") < bounded.mean()


def test_a_critic_of_weight_zero_leaves_the_policy_alone(learners, params, head, batch):
    batch = per_token(batch)
    without = update(learners("bonus"), params, batch, kl_coef=5.0)
    with_one = update(learners("idle_critic"), params, batch, kl_coef=5.0, head=head)
    assert_same(with_one[0], without[0])
    for name in ("loss", "kl", "entropy", "surrogate"):
        np.testing.assert_allclose(with_one[1].mean(name), without[1].mean(name), rtol=1e-6)
    np.testing.assert_array_equal(with_one[2].critic.kernel, head[0])  # no gradient reaches the head
    assert without[2].critic is None
    assert with_one[1].mean("value_loss") > 0.01, "it is measured all the same"


def test_values_are_those_of_the_head(learners, params, head, batch, scored):
    learner = learners("critic")
    rows = sharding.put_batch(batch, learner.mesh)
    values = learner.values(params, start(learner, params, head=head).critic, rows)
    mask = np.asarray(batch.response_mask)
    np.testing.assert_allclose(np.asarray(values)[mask], scored[2][mask], rtol=1e-4, atol=1e-5)
    fresh = learner.values(params, learner.init_state(params).critic, rows)
    np.testing.assert_array_equal(np.asarray(fresh), np.zeros_like(values))


def test_the_critic_learns_what_can_be_learned(learners, params, head, batch, scored):
    """Targets are those of another head: from 0, where a fresh one starts, towards 1. The decoder stands still.

    The first step of Adam is its rate in every number that has a gradient, so that no weight may be left out.
    """
    learner = learners("critic")
    target = np.where(batch.response_mask, scored[2], np.nan).astype(np.float32)
    # The old values are the targets, so that the clip never binds on the way there.
    batch = corrected(per_token(batch), scored).replace(value=target, value_target=target)
    rows, state, history = sharding.put_batch(batch, learner.mesh), start(learner, params, rate=0.0), []
    for _ in range(60):
        state, stats = learner.update(state, rows)
        history.append(critic.explained_variance(jax.tree.map(np.asarray, stats)))
        if len(history) == 1:
            np.testing.assert_allclose(np.abs(state.critic.kernel), VALUE_RATE, rtol=1e-2)
            np.testing.assert_allclose(np.abs(state.critic.bias), VALUE_RATE, rtol=1e-2)
    np.testing.assert_allclose(history[0], 0.0, atol=1e-5)
    assert history[0] < history[20] < history[-1]
    assert history[-1] > 0.7
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(state.params), params)


# ---- one program for all of it ----


def test_nothing_compiles_after_the_first_rollout(learners, tiny_model, params, rollout, mesh):
    """Critic, adaptive KL to a reference and correction, as the trainer calls them; other rows the second time."""
    learner = learners("critic")
    reference = learner.sampler_params(learner.init_state(tiny_model[1]))
    state, compiled, order = start(learner, params, rate=1e-3), [], np.arange(16)
    for number in range(3):
        order = np.roll(order, 4)
        drawn = jax.tree.map(lambda x: x[order], rollout)  # noqa: B023
        rows = sharding.put_batch(drawn, mesh)
        key = jax.random.key(number)
        with compilations() as names:
            drawn = drawn.replace(
                reference_logp=sharding.to_host(learner.score(reference, rows)),
                value=sharding.to_host(learner.values(state.params, state.critic, rows)),
                value_target=np.ones(drawn.behavior_logp.shape, np.float32),
                advantage=np.ones(drawn.behavior_logp.shape, np.float32),
            )
            state, _ = learner.train_on_rollout(state, sharding.put_batch(drawn, mesh), key)
            learner.sampler_params(state)
        compiled.append(names)
    assert compiled[1:] == [[], []]
    assert int(state.version) == 6
