"""Rows that take no part, and what depends on the whole minibatch."""

import functools

import jax
import numpy as np
import pytest

from r2vpo_jax import dual, losses, sharding
from r2vpo_jax.config import make_objective
from r2vpo_jax.training.learner import Learner
from tests.helpers.learner import KEY, assert_same
from tests.helpers.terms import (
    COEF,
    KEEP,
    OBJECTIVES,
    garbage,
    start,
    update,
    weights_of,
)


def arguments(name, batch):
    """(keyword arguments of `start`, of `formula`) for the objective of that reduction, on that batch."""
    mask = weights_of(batch, "token_mean") > 0
    if name == "token_mean":
        return {}, {"variance": COEF}
    if name == "constant_length":  # times the root mean square of the advantages of all tokens kept
        advantage = np.broadcast_to(batch.advantage[:, None], mask.shape)[mask].astype(np.float64)
        return {}, {"variance": COEF * np.sqrt(np.mean(advantage**2))}
    return {"kl_coef": 300.0}, {"behavior_kl": 300.0}


@pytest.mark.parametrize("keep", [KEEP, np.ones(16, bool)], ids=["dropped", "all"])
@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_an_update_is_that_of_the_rows_kept(reduction, keep, learners, params, head, batch, scored, formula):
    """The multipliers are those of the state: 300, where the configuration starts at 1, for the KL."""
    batch = batch.replace(keep=keep)
    state, coefs = arguments(reduction, batch)
    loss, (expected, _) = formula((params, head), batch, reduction, **coefs)
    grads, stats, _ = update(learners(reduction), params, batch, **state)
    assert_same(grads, expected)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    # V over the rows kept: its sum and its count, in the weights of the loss (those of a token mean else).
    mask = np.asarray(batch.response_mask) & keep[:, None]
    excess = np.where(mask, np.expm1(np.where(mask, scored[0] - batch.behavior_logp, 0.0).astype(np.float64)), 0.0)
    total, number = stats.sums["ratio_variance"]
    if reduction == "sequence_mean":
        assert number == keep.sum()
        np.testing.assert_allclose(total, np.sum((excess**2).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)), rtol=1e-4)
    else:
        assert number == mask.sum()
        np.testing.assert_allclose(total, np.sum(excess**2), rtol=1e-4)
    assert stats.histogram.sum() == mask.sum()


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_what_a_dropped_row_holds_changes_nothing(reduction, learners, params, batch):
    """NaN, infinite advantages: parameters, loss and every statistic stay the same bit for bit."""
    batch = batch.replace(keep=KEEP)
    clean, spoiled = (update(learners(reduction), params, b) for b in (batch, garbage(batch)))
    assert np.isnan(garbage(batch).behavior_logp[1]).all()
    jax.tree.map(np.testing.assert_array_equal, spoiled[2].params, clean[2].params)
    jax.tree.map(np.testing.assert_array_equal, spoiled[1], clean[1])


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean"])
def test_a_batch_of_which_nothing_is_kept_moves_nothing(name, learners, params, batch):
    """The multipliers neither: nothing was measured. The same batch with all rows does move both."""
    learner = learners(name)
    state = dict.fromkeys(("lambda", "beta"))
    for keep in (np.zeros(16, bool), np.ones(16, bool)):
        rows = sharding.put_batch(batch.replace(keep=keep), learner.mesh)
        after, report = learner.train_on_rollout(start(learner, params, rate=1e-6), rows, KEY)
        after, report = sharding.to_host((after, report))
        stats = report.stats
        np.testing.assert_array_equal(report.skipped, [0, 0])
        state = float(after.dual.variance_coef), float(after.kl_coef)
        begin = (COEF, 0.0) if name == "token_mean" else (0.0, 1.0)
        moved = any(np.any(a != b) for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(params), strict=True))
        if keep.any():
            assert moved
            assert state[name == "sequence_mean"] != begin[name == "sequence_mean"]
        else:
            assert not moved
            assert state == begin
            assert stats.mean("loss") == stats.mean("grad_norm") == report.variance_last == 0
    assert int(after.version) == 2


# ---- what depends on the whole minibatch ----


@pytest.fixture(scope="module")
def m2po_batch(batch):
    return batch.replace(keep=KEEP)


def test_m2po_cuts_at_the_threshold_of_the_whole_minibatch(learners, params, head, m2po_batch, scored, formula):
    mask = np.asarray(m2po_batch.response_mask) & KEEP[:, None]
    arrays = (scored[0], m2po_batch.behavior_logp, m2po_batch.advantage, mask)
    threshold_of = jax.jit(functools.partial(losses.m2po_threshold, budget=0.01))
    threshold = threshold_of(*arrays)
    loss, expected_stats = jax.jit(losses.m2po_loss)(*arrays, threshold=threshold)
    parts = [threshold_of(*(x[i::4] for x in arrays)) for i in range(4)]
    assert all(abs(part / threshold - 1) > 0.05 for part in parts), "that of a micro-batch would be another one"

    grads, stats, _ = update(learners("m2po"), params, m2po_batch)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    for name in ("clip_fraction_low", "clip_fraction_high"):
        assert stats.sums[name][0] == expected_stats[name][0] > 0
    # g is r A, and 0 for the tokens cut.
    log_ratio = np.where(mask, scored[0] - m2po_batch.behavior_logp, 0.0)
    cut = (m2po_batch.advantage[:, None] * log_ratio > 0) & (np.abs(log_ratio) > threshold)
    _, (expected, _) = formula((params, head), m2po_batch, share=~cut)
    assert_same(grads, expected)


def test_m2po_does_not_depend_on_the_split_into_micro_batches(learners, params, m2po_batch):
    split, whole = (update(learners("m2po", size), params, m2po_batch) for size in (4, 16))
    assert_same(split[0], whole[0])
    for name in ("loss", "ratio_variance", "clip_fraction_low", "clip_fraction_high"):
        np.testing.assert_allclose(split[1].mean(name), whole[1].mean(name), rtol=1e-5)


def test_m2po_has_a_budget_however_it_is_chosen(tiny_model, tiny_config, mesh, batch):
    """A loss can be set on top of any preset; what is not set then has the default of `losses`."""
    objective = {"name": "ppo_clip", "loss": {"name": "m2po"}}
    learner = Learner(tiny_model[0], tiny_config(objective=objective, trainer={"num_minibatches": 1}), mesh)
    jax.eval_shape(learner.update, learner.abstract_state, batch)


def test_a_normalized_multiplier_makes_the_loss_proportional_to_the_advantages(learners, params, batch):
    batch = batch.replace(keep=KEEP)
    one, ten = (
        update(learners("constant_length"), params, batch.replace(advantage=f * batch.advantage)) for f in (1, 10)
    )
    assert_same(ten[0], jax.tree.map(lambda g: 10 * g, one[0]))
    np.testing.assert_allclose(ten[1].mean("loss"), 10 * one[1].mean("loss"), rtol=1e-5)
    np.testing.assert_allclose(ten[1].mean("penalty"), 10 * one[1].mean("penalty"), rtol=1e-5)
    sigma = dual.advantage_scale(batch.advantage, batch.learning_mask)
    np.testing.assert_allclose(one[1].mean("penalty"), COEF * sigma * one[1].mean("ratio_variance"), rtol=1e-5)
    assert abs(one[1].mean("penalty") / one[1].mean("loss")) > 0.01, "a penalty that counts"


def test_the_objectives_here_are_what_they_are_taken_for():
    """So that no default turns a comparison into one of nothing."""
    made = {name: make_objective(**fields) for name, fields in OBJECTIVES.items()}
    assert {made[name].loss.reduction for name in losses.REDUCTIONS} == set(losses.REDUCTIONS)
    assert made["token_mean"].dual.adaptive
    assert not made["constant_length"].dual.adaptive
    assert (made["sequence_mean"].kl.to, made["sequence_mean"].kl.target) == ("behavior", 0.01)
    assert made["critic"].critic
    assert made["critic"].needs_reference
    assert made["bonus"].kl.estimator == "k3"
    assert made["critic"].advantage.value_clip == 0.2
