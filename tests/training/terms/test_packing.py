"""Packed, each term of a loss is what it is of whole rows."""

import jax
import numpy as np
import pytest

from r2vpo_jax import sharding
from tests.helpers.learner import KEY, assert_same, assert_same_stats
from tests.helpers.terms import KEEP, OBJECTIVES, corrected, garbage, per_token, start, update


@pytest.mark.parametrize(
    "name", [name if name == "critic" else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
def test_packing_changes_no_term(name, learners, params, head, batch, scored):
    """Gradients, value head, loss and statistics, with rows that take no part and hold garbage."""
    critic = name in ("critic", "idle_critic")
    batch = garbage((per_token(batch) if critic else batch).replace(keep=KEEP))
    if name in ("critic", "corrected_behavior_kl", "left_out", "vcpo"):
        batch = corrected(batch, scored)
    changes = {"head": head} if critic else {}
    (grads, stats, after), (expected, expected_stats, expected_after) = (
        update(learners(name, packing=packing), params, batch, **changes) for packing in (True, False)
    )
    assert_same(grads, expected)
    assert_same_stats(stats, expected_stats, loss_atol=1e-5 if name == "sequence_mean" else 1e-6)
    if critic:
        for new, old in zip(after.critic.opt_state[1][0].mu, expected_after.critic.opt_state[1][0].mu, strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_rollout_batch_packed(learners, params, head, batch):
    """Corrections, values, two epochs and V, of a batch half of which takes no part; nothing compiles for other lengths."""
    batch = per_token(batch).replace(keep=KEEP)
    mask = np.asarray(batch.response_mask)
    found = {}
    for packing in (False, True):
        learner = learners("critic", packing=packing)
        placed = sharding.put_batch(batch, learner.mesh)
        state = start(learner, params, rate=1e-3, head=head)
        estimates = learner.correct(state.params, placed), learner.values(state.params, state.critic, placed)
        variance = learner.variance(state, placed)
        after, report = learner.train_on_rollout(state, placed, KEY)
        found[packing] = sharding.to_host((estimates, variance, report, after.params))
    (packed, packed_values), (whole, values) = found[True][0], found[False][0]
    for a, b in ((packed.proximal_logp, whole.proximal_logp), (packed.weights, whole.weights), (packed_values, values)):
        np.testing.assert_allclose(a[mask], b[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[True][1], found[False][1], rtol=1e-5)
    for name in ("variance_last", "dual_signal"):
        np.testing.assert_allclose(getattr(found[True][2], name), getattr(found[False][2], name), rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[True][3], found[False][3])

    functions = [getattr(learner, name) for name in ("correct", "values", "variance", "update")]
    compiled = [function._cache_size() for function in functions]
    shorter = sharding.put_batch(batch.replace(response_length=np.minimum(batch.response_length, 3)), learner.mesh)
    state = start(learner, params, rate=1e-3, head=head)
    learner.values(state.params, state.critic, shorter)
    learner.train_on_rollout(state, shorter, KEY)
    assert [function._cache_size() for function in functions] == compiled
