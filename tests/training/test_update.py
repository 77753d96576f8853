"""A rollout batch: two epochs of two minibatches, then one step of the multiplier; and the same functions by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import dual, losses, scoring, sharding
from r2vpo_jax.config import OptimizerConfig, make_objective
from r2vpo_jax.train_stats import TrainStats
from r2vpo_jax.training import update
from r2vpo_jax.training.learner import Learner, settings_of
from r2vpo_jax.training.optimizer import make_optimizer
from r2vpo_jax.training.update import UpdateSettings
from tests.helpers.learner import KEY
from tests.helpers.rollouts import empty


@pytest.fixture(scope="module")
def run(tiny_model, tiny_config, mesh):
    """The learner of a tiny run, as the trainer makes it."""
    return Learner(tiny_model[0], tiny_config(objective={"name": "r2vpo_before"}), mesh)


@pytest.fixture(scope="module")
def device_rollout(rollout, mesh):
    return sharding.put_batch(rollout, mesh)


def test_scoring_agrees_with_the_sampler(run, tiny_model, rollout, device_rollout):
    logp = run.score(run.init_state(tiny_model[1]).params, device_rollout)
    difference = np.abs(np.asarray(logp) - rollout.behavior_logp)[rollout.response_mask]
    assert difference.max() <= 5e-5
    assert difference.mean() <= 5e-6


def test_an_epoch_uses_each_group_once_and_tears_none(run, device_rollout):
    epochs = []
    for epoch in range(2):
        parts = [np.asarray(run.minibatch(device_rollout, KEY, 2 * epoch + i).rollout_id) for i in range(2)]
        assert [len(part) for part in parts] == [8, 8]
        groups = np.concatenate(parts).reshape(4, 4)
        np.testing.assert_array_equal(groups, groups[:, :1] // 4 * 4 + np.arange(4))
        assert sorted(groups[:, 0] // 4) == [0, 1, 2, 3]
        epochs.append(tuple(groups[:, 0] // 4))
    other = np.asarray(run.minibatch(device_rollout, jax.random.key(1), 0).rollout_id)[::4] // 4
    assert epochs[0] != epochs[1], "each epoch has a shuffle of its own"
    assert tuple(other) != epochs[0][:2], "and so has each key"


def test_the_multiplier_steps_once_on_the_last_minibatch(run, tiny_model, rollout, device_rollout):
    """Against four updates by hand, with V in NumPy from the parameters before the last of them."""
    state = run.init_state(tiny_model[1])
    variances = []
    for number in range(4):
        minibatch = run.minibatch(device_rollout, KEY, number)
        chosen = np.asarray(minibatch.rollout_id)
        logp = np.asarray(run.score(state.params, device_rollout))[chosen]
        mask = rollout.response_mask[chosen]
        ratio = np.exp((logp - rollout.behavior_logp[chosen])[mask].astype(np.float64))
        variances.append(np.mean((ratio - 1) ** 2))
        state, _ = run.update(state, minibatch)
    assert variances[0] < 1e-8, "nothing has moved yet"
    assert variances[3] > 1e-5
    by_hand = sharding.to_host(state)

    after, report = run.train_on_rollout(run.init_state(tiny_model[1]), device_rollout, KEY)
    np.testing.assert_allclose(report.variance_first, variances[0], atol=1e-9)
    np.testing.assert_allclose(report.variance_last, variances[3], rtol=1e-3)
    np.testing.assert_allclose(
        report.stats.mean("ratio_variance"), np.mean(variances), rtol=0.2
    )  # tokens, not minibatches
    assert abs(variances[3] / np.mean(variances) - 1) > 0.3, "the mean would be another number"
    np.testing.assert_array_equal(report.skipped, np.zeros(4))
    # lambda <- 1 + clip(c (V / delta - 1), -1, 1) with c = 0.1 and delta = 0.01
    step = np.clip(0.1 * (variances[3] / 0.01 - 1), -1, 1)
    assert 1e-3 < abs(step) < 1, "neither nothing nor at the bound"
    np.testing.assert_allclose(after.dual.variance_coef, 1 + step, rtol=1e-3)
    assert int(after.version) == 4
    # The rest of the state is that of the four updates.
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(after.params), by_hand.params)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(after.opt_state), by_hand.opt_state)
    assert by_hand.dual.variance_coef == 1.0, "an update leaves the multiplier alone"


def test_a_fixed_coefficient_stays(run, tiny_model, tiny_config, device_rollout, mesh):
    fixed = Learner(tiny_model[0], tiny_config(objective={"name": "r2vpo_fixed"}), mesh)
    state, report = fixed.train_on_rollout(fixed.init_state(tiny_model[1]), device_rollout, KEY)
    assert float(state.dual.variance_coef) == 2.5
    assert report.variance_last > 1e-5


def test_the_sampler_gets_buffers_of_its_own(run, tiny_model, device_rollout):
    """The state is donated; what the sampler or a reference holds must survive that."""
    state = run.init_state(tiny_model[1])
    copy = run.sampler_params(state)
    state, _ = run.update(state, run.minibatch(device_rollout, KEY, 0))
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(copy), tiny_model[1])
    assert np.any(np.asarray(state.params["embed"]) != copy["embed"])


# ---- updates that are not finite ----


def spoil(rollout, row):
    """NaN at the first response token of a row."""
    logp = rollout.behavior_logp.copy()
    logp[row, 0] = np.nan
    return rollout.replace(behavior_logp=logp)


def test_a_minibatch_that_was_skipped_moves_no_multiplier(run):
    """Not even where its own V is finite: only its gradient was not."""
    one = jnp.ones(2)
    settings = dataclasses.replace(
        run.settings, objective=make_objective("r2vpo_before", kl={"coef": 0.1, "target": 0.01})
    )
    for nonfinite, moves in (([0, 0], True), ([1, 0], True), ([0, 1], False)):
        sums = {"ratio_variance": (0.5 * one, one), "kl": (one, one), "nonfinite": (jnp.float32(nonfinite), one)}
        stats = TrainStats(sums, {}, jnp.zeros((2, 1)), {})
        after, kl_coef, _ = update.step_multipliers(dual.init(1.0), jnp.float32(0.1), stats, settings)
        assert (float(after.variance_coef) != 1.0) == moves == (float(kl_coef) != np.float32(0.1)), nonfinite


def test_an_update_keeps_the_dtypes_of_the_state(tiny_model, rollout):
    """With bfloat16 weights too: moments are float32 from the beginning, as they are restored."""
    model, params = tiny_model
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    settings = UpdateSettings(objective=make_objective("r2vpo"), group_size=4, num_minibatches=2, micro_batch_size=4)
    optimizers = update.Optimizers(make_optimizer(OptimizerConfig(weight_decay=0.1)))

    def dtypes(state):
        return jax.tree.map(lambda x: x.dtype, state)

    state = jax.eval_shape(lambda p: update.init_state(p, model, optimizers, settings), params)
    batch = jax.tree.map(lambda x: x[:8], rollout)
    after, _ = jax.eval_shape(lambda s, b: update.update(s, b, model, optimizers, settings), state, batch)
    assert dtypes(after) == dtypes(state)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim} == {np.dtype(np.float32)}


def test_a_non_finite_update_is_skipped_and_counted(run, tiny_model, rollout, device_rollout):
    good = run.minibatch(device_rollout, KEY, 0)
    bad = spoil(jax.tree.map(np.asarray, good), 3)
    state, stats = run.update(run.init_state(tiny_model[1]), good)
    assert stats.mean("nonfinite") == 0
    before = sharding.to_host(state)
    state, stats = run.update(state, sharding.put_batch(bad, run.mesh))
    assert stats.mean("nonfinite") == 1
    after = sharding.to_host(state)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    assert int(after.version) == 2
    state, stats = run.update(state, good)
    assert stats.mean("nonfinite") == 0
    assert np.any(np.asarray(state.params["embed"]) != before.params["embed"])


def test_the_multiplier_survives_a_non_finite_update(run, tiny_model, rollout, mesh):
    """Wherever in the epoch it comes, the last place included."""
    skipped = []
    for row in range(0, 16, 4):
        bad = sharding.put_batch(spoil(rollout, row), mesh)
        state, report = run.train_on_rollout(run.init_state(tiny_model[1]), bad, KEY)
        skipped.append(tuple(np.asarray(report.skipped)))
        assert np.isfinite(state.dual.variance_coef), skipped[-1]
    assert all(sum(s) == 2 for s in skipped), "once an epoch"
    assert {s[-1] for s in skipped} == {0, 1}, "in the last minibatch and elsewhere"


# ---- the functions without a learner ----


def test_the_functions_by_hand_are_the_learner(tiny_model, tiny_config, rollout, device_rollout, mesh):
    """As in the docstring of the module, jitted in one piece or called as a scan over minibatches."""
    model, params = tiny_model
    run = Learner(model, tiny_config(), mesh)
    settings = settings_of(tiny_config())
    assert settings == UpdateSettings(
        tiny_config().objective, 4, 2, num_epochs=2, micro_batch_size=4, scoring_chunk_size=5
    )
    assert hash(settings) == hash(settings_of(tiny_config())), "it can be a static argument"
    optimizers = run.optimizers

    def whole(params, rollout, key):
        def one(state, number):
            minibatch = update.take_minibatch(rollout, key, number, settings)
            return update.update(state, minibatch, model, optimizers, settings)

        state = update.init_state(params, model, optimizers, settings)
        state, stacked = jax.lax.scan(one, state, np.arange(settings.num_updates))
        all_stats = [jax.tree.map(lambda x: x[i], stacked) for i in range(settings.num_updates)]  # noqa: B023
        after = update.variance(state, rollout, model, settings)
        dual, kl_coef, report = update.step_multipliers(
            state.dual, state.kl_coef, all_stats, settings, variance_after=after
        )
        return state.replace(dual=dual, kl_coef=kl_coef), report

    state, report = jax.jit(whole)(params, rollout, KEY)
    expected_state, expected = run.train_on_rollout(run.init_state(params), device_rollout, KEY)
    assert int(state.version) == settings.num_updates == 4
    np.testing.assert_allclose(report.variance_last, expected.variance_last, rtol=1e-3)
    np.testing.assert_allclose(state.dual.variance_coef, expected_state.dual.variance_coef, rtol=1e-4)
    # As a whole: Adam turns a gradient of the size of rounding into a step of either sign.
    wanted = sharding.to_host(expected_state.params)
    difference, moved = (
        np.sqrt(sum(np.sum(np.square(a - b)) for a, b in zip(*map(jax.tree.leaves, trees), strict=True)))
        for trees in ((sharding.to_host(state.params), wanted), (wanted, params))
    )
    assert difference < 0.02 * moved


def test_scores_and_values_by_hand(run, tiny_model, tiny_config, rollout, device_rollout):
    """Jitted functions of the module, in micro-batches or as one."""
    model, params = tiny_model
    settings = settings_of(tiny_config())
    expected = np.asarray(run.score(run.init_state(params).params, device_rollout))
    score = jax.jit(update.score, static_argnums=(2, 3))
    mask = np.asarray(rollout.response_mask)
    for micro in (settings.micro_batch_size, None):
        whole = UpdateSettings(settings.objective, 4, 2, micro_batch_size=micro, scoring_chunk_size=5)
        np.testing.assert_allclose(score(params, rollout, model, whole)[mask], expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("r2vpo", {"penalty_scope": "sequence"}),
        ("ppo_clip", {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5}),
        ("policy_gradient", {}),
        ("spo", {"epsilon": 0.3}),
        ("ce_gppo", {"keep_high": 0.7}),
        ("m2po", {"budget": 0.02}),
    ],
)
def test_the_objective_gets_its_hyper_parameters(name, hyper, monkeypatch):
    """With log-probabilities by hand in place of the decoder's."""
    generator = np.random.default_rng(0)
    logp, behavior = (generator.standard_normal((3, 4)).astype(np.float32) for _ in range(2))
    advantages, mask = np.array([1.0, -1.0, -2.0], np.float32), np.ones((3, 4), bool)
    monkeypatch.setattr(update, "score_rows", lambda *_: scoring.Scores(logp, np.zeros_like(logp), None))
    objective = make_objective(name, loss={"reduction": "sequence_mean", "options": hyper}, dual={"coef": 3.0})
    settings = UpdateSettings(objective, group_size=3, num_minibatches=1)
    batch = empty(3, 2, 4, behavior_logp=behavior, advantage=advantages, response_length=np.full(3, 4))
    state = update.LearnerState(
        params={},
        opt_state=(),
        dual=update.dual.init(3.0),
        kl_coef=np.float32(0),
        critic=None,
        version=np.int32(0),
    )
    computed = update.computed_arguments(state, batch, None, settings)
    assert set(computed) == set(losses.computed(objective.loss.name))
    loss, _ = update.micro_batch_loss(
        ({}, None), batch, state=state, model=None, settings=settings, normalizer=7.0, computed=computed
    )
    if name == "ce_gppo":
        hyper = hyper | {"keep_low": 0.5, "clip_high": 0.2, "dual_clip": 10.0}
    given = {"variance_coef": 3.0} if name == "r2vpo" else {}
    expected, _ = losses.get(objective.loss.name)(
        logp, behavior, advantages, mask, reduction="sequence_mean", normalizer=7.0, **given, **hyper
    )
    assert loss == expected
    assert abs(loss) > 1e-3


def test_the_normalizer_is_the_count_of_the_reduction_over_the_rows_kept():
    """Rows of 1, 3, 0 and 4 tokens of 5, the last of which takes no part."""
    lengths, keep = np.array([1, 3, 0, 4], np.int32), np.array([True, True, True, False])
    batch = empty(4, 2, 5, response_length=lengths, keep=keep)
    counts = {"token_mean": 4, "sequence_mean": 2, "constant_length": 3 * 5}
    assert set(counts) == set(losses.REDUCTIONS)
    for reduction, count in counts.items():
        assert update.normalizer(batch, make_objective(loss={"reduction": reduction})) == count


def test_the_multiplier_can_step_on_what_the_whole_batch_measures_afterwards(tiny_model, tiny_config, rollout, mesh):
    """V of all tokens that count, in NumPy, from the parameters after four updates; two rows do not count."""
    config = tiny_config(objective={"dual": {"measure": "after", "carry": 0.0}})
    run = Learner(tiny_model[0], config, mesh)
    keep = np.arange(len(rollout.keep)) % 8 != 3
    batch = sharding.put_batch(rollout.replace(keep=keep), mesh)
    after, report = run.train_on_rollout(run.init_state(tiny_model[1]), batch, KEY)
    counts = rollout.response_mask & keep[:, None]
    log_ratio = (np.asarray(run.score(after.params, batch)) - rollout.behavior_logp)[counts].astype(np.float64)
    by_hand = np.mean(np.expm1(log_ratio) ** 2)
    np.testing.assert_allclose(report.variance_after, by_hand, rtol=1e-5)
    np.testing.assert_allclose(run.variance(after, batch), by_hand, rtol=1e-5)
    assert abs(by_hand / float(report.variance_last) - 1) > 0.1, "another number than before the last update"
    assert float(report.dual_signal) == float(report.variance_after)
    np.testing.assert_allclose(after.dual.variance_coef, 1 + np.clip(0.1 * (by_hand / 0.01 - 1), -1, 1), rtol=1e-5)
