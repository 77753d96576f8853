"""The learner: gradients of the objective that was asked for, however the batch is split, permuted or padded."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2vpo_jax import learner, losses, models, sharding
from r2vpo_jax.config import ObjectiveConfig, OptimizerConfig
from r2vpo_jax.learner import Learner
from tests.conftest import jaxpr_sizes, random_params, with_config

# A step that swamps the parameters: the new ones are -RATE * gradient to float32's last digits.
RATE = 2.0**20
COEF = 2.5
KL_COEFS = {"token_mean": 0.0, "sequence_mean": 30.0, "constant_length": 0.0}


@pytest.fixture(scope="module")
def learners(tiny_model, tiny_config, mesh):
    """Learners with plain SGD and one update of 16 rows an epoch, made once for each reduction and micro-batch.

    The one with sequence_mean has a KL term too: every program costs seconds.
    """
    made = {}

    def make(reduction, micro_batch_size=4):
        if (reduction, micro_batch_size) not in made:
            objective = {"name": "r2vpo_fixed", "variance_coef": COEF, "reduction": reduction}
            objective["kl_coef"] = KL_COEFS[reduction]
            trainer = {"micro_batch_size": micro_batch_size, "num_minibatches": 1}
            config = tiny_config(objective=objective, trainer=trainer)
            made[reduction, micro_batch_size] = Learner(tiny_model[0], config, mesh, optimizer=optax.sgd(RATE))
        return made[reduction, micro_batch_size]

    return make


@pytest.fixture(scope="module")
def params(tiny_model):
    """Random ones, flat: a trained model is sure of itself, and its gradients are small differences of large numbers."""
    params = random_params(tiny_model[0])
    params["embed"] *= 0.5
    return params


@pytest.fixture(scope="module")
def batch(rollout, learners, params):
    """Off-policy rows: ratios around 1 +- 0.2, junk wherever nothing counts."""
    generator = np.random.default_rng(0)
    shape = rollout.behavior_logp.shape
    mask = rollout.response_mask
    learner = learners("token_mean")
    logp = learner.score(learner.init_state(params).params, sharding.put_batch(rollout, learner.mesh))
    noisy = logp + 0.2 * generator.standard_normal(shape)
    return rollout.replace(
        behavior_logp=np.where(mask, noisy, np.nan).astype(np.float32),
        # Large: rounding in log r, times 2 lambda, is noise in the gradient that no order of sums explains.
        advantage=(100 * generator.standard_normal(shape[0])).astype(np.float32),
        reference_logp=np.where(mask, noisy + 0.2 * generator.standard_normal(shape), -7.0).astype(np.float32),
    )


def update(learner, params, batch):
    """(gradients, Stats) of one update, from the parameters it leaves."""
    state = learner.init_state(params)
    after, stats = learner.update(state, sharding.put_batch(batch, learner.mesh))
    assert int(after.version) == 1
    grads = jax.tree.map(lambda new, old: (old - np.asarray(new)) / RATE, after.params, params)
    return grads, jax.tree.map(np.asarray, stats)


def assert_same(actual, expected):
    """Gradients at the tolerance of float32 sums in another order.

    It is a sum over up to 224 tokens of terms as large as itself, which rounding moves by up to 224 units of 2^-24,
    or 1.3e-5 of the largest; two machines were 2e-6 apart. Leaving out the token that matters least moves it by 1e-4.
    """
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(e).max() > 1e-3 * largest, path
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))


def assert_same_updates(actual, expected, factor=1.0):
    """Gradients and numbers of two updates; `factor` is that between their losses."""
    assert_same(actual[0], jax.tree.map(lambda g: factor * g, expected[0]))
    for name, scale in (("loss", factor), ("ratio_variance", 1.0), ("entropy", 1.0)):
        np.testing.assert_allclose(actual[1].mean(name), scale * expected[1].mean(name), rtol=1e-5)


@pytest.fixture(scope="module")
def formula(tiny_model, params, batch):
    """(reduction, KL coefficient) -> ((loss, (V, KL)), gradients), from the formulas and a full forward pass."""
    model, _ = tiny_model
    prompt = batch.prompt_size
    column = np.arange(batch.tokens.shape[1])
    valid = (column >= prompt - batch.prompt_length[:, None]) & (column < prompt + batch.response_length[:, None])
    mask = valid[:, prompt:]
    behavior, reference = (np.where(mask, x, 0.0) for x in (batch.behavior_logp, batch.reference_logp))

    def loss(params, weight, kl_coef):
        logits = model.apply({"params": params}, batch.tokens, mask=valid)[:, prompt - 1 : -1]
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, prompt:, None], axis=-1)[..., 0]
        ratio = jnp.exp(jnp.where(mask, logp - behavior, 0.0))
        terms = -ratio * batch.advantage[:, None] + COEF * (ratio - 1) ** 2
        log_ratio = jnp.where(mask, logp - reference, 0.0)
        kl = jnp.exp(-log_ratio) - 1 + log_ratio
        variance = jnp.sum(weight * (ratio - 1) ** 2) / jnp.sum(weight)
        return jnp.sum(weight * (terms + kl_coef * kl)), (variance, jnp.sum(kl) / mask.sum())

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    weights = {
        "token_mean": mask / mask.sum(),
        "sequence_mean": mask / mask.sum(axis=1, keepdims=True) / len(mask),
        "constant_length": mask / mask.size,
    }
    return lambda reduction, kl_coef: value_and_grad(params, weights[reduction].astype(np.float32), kl_coef)


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_the_update_follows_the_gradient_of_the_formula(reduction, learners, params, batch, formula):
    """Four micro-batches and chunked scoring against jax.grad of the whole batch at once."""
    (loss, (variance, kl)), expected = formula(reduction, KL_COEFS[reduction])
    grads, stats = update(learners(reduction), params, batch)
    assert_same(grads, expected)
    assert variance > 0.01
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    np.testing.assert_allclose(stats.mean("ratio_variance"), variance, rtol=1e-5)
    if reduction == "sequence_mean":
        assert kl > 0.005
        np.testing.assert_allclose(stats.mean("kl"), kl, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(expected)))
    np.testing.assert_allclose(stats.mean("grad_norm"), norm, rtol=1e-5)
    np.testing.assert_allclose(stats.mean("update_norm"), RATE * norm, rtol=1e-5)


def test_the_kl_to_oneself_is_nothing(learners, params, batch, formula):
    """At the reference the KL is at its minimum: value and gradient are zero."""
    learner = learners("sequence_mean")
    reference = learner.sampler_params(learner.init_state(params))
    scored = sharding.to_host(learner.score(reference, sharding.put_batch(batch, learner.mesh)))
    grads, stats = update(learner, params, batch.replace(reference_logp=scored))
    assert abs(stats.mean("kl")) < 1e-9
    (loss, _), expected = formula("sequence_mean", 0.0)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "reduction",
    [
        "token_mean",
        pytest.param("sequence_mean", marks=pytest.mark.slow),
        pytest.param("constant_length", marks=pytest.mark.slow),
    ],
)
def test_the_split_into_micro_batches_changes_nothing(reduction, learners, params, batch):
    whole, split = (update(learners(reduction, size), params, batch) for size in (16, 4))
    assert_same_updates(split, whole)


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_the_order_of_the_rows_changes_nothing(reduction, learners, params, batch):
    order = np.random.default_rng(1).permutation(16)
    straight, permuted = (
        update(learners(reduction), params, b) for b in (batch, jax.tree.map(lambda x: x[order], batch))
    )
    assert_same_updates(permuted, straight)


@pytest.mark.parametrize(
    "reduction",
    [
        pytest.param("token_mean", marks=pytest.mark.slow),
        pytest.param("sequence_mean", marks=pytest.mark.slow),
        "constant_length",
    ],
)
def test_padding_changes_nothing(reduction, learners, params, batch):
    """Two more columns in the prompts and three more in the responses, with junk in them.

    Only constant_length divides by the size of the batch, and says so.
    """
    rows = len(batch.tokens)
    junk = np.random.default_rng(2).integers(0, 32, (rows, 2))
    padded = batch.replace(
        tokens=np.concatenate([junk, batch.tokens, np.full((rows, 3), 5)], axis=1).astype(np.int32),
        behavior_logp=np.pad(batch.behavior_logp, ((0, 0), (0, 3)), constant_values=np.nan),
        reference_logp=np.pad(batch.reference_logp, ((0, 0), (0, 3)), constant_values=-7.0),
    )
    size = batch.response_size
    factor = size / (size + 3) if reduction == "constant_length" else 1.0
    after, before = (update(learners(reduction), params, b) for b in (padded, batch))
    assert_same_updates(after, before, factor)


@pytest.mark.parametrize(("chunk_size", "whole"), [(5, False), (14, True)])
def test_an_update_never_holds_the_logits_of_a_micro_batch(chunk_size, whole, tiny_config, mesh):
    """V = 300, 16 rows in micro-batches of 4, 14 columns in chunks of 5."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    model = models.Decoder(models.DecoderConfig(vocab_size=300, head_dim=4, **sizes))
    config = tiny_config(trainer={"num_minibatches": 1, "micro_batch_size": 4, "scoring_chunk_size": chunk_size})
    learner = Learner(model, config, mesh)
    jaxpr = jax.make_jaxpr(learner._update)(learner.abstract_state, _empty_rollout(16, 6, 14))
    assert (max(jaxpr_sizes(jaxpr.jaxpr)) >= 4 * 14 * 300) == whole


def _empty_rollout(rows, prompt, size):
    integer, number = jnp.zeros(rows, jnp.int32), jnp.zeros(rows)
    return learner.Rollout(
        tokens=jnp.zeros((rows, prompt + size), jnp.int32),
        prompt_length=integer,
        response_length=integer,
        truncated=jnp.zeros(rows, bool),
        behavior_logp=jnp.zeros((rows, size)),
        temperature=number,
        reward=number,
        outcome=integer,
        advantage=number,
        keep=jnp.ones(rows, bool),
        group_id=integer,
        rollout_id=integer,
        version=integer,
    )


def test_a_nan_in_the_reference_under_the_mask_changes_nothing(learners, params, batch):
    learner = learners("sequence_mean")
    reference = np.where(batch.response_mask, batch.reference_logp, np.nan)
    after, before = (update(learner, params, b) for b in (batch.replace(reference_logp=reference), batch))
    assert_same_updates(after, before)


# ---- a rollout batch: two epochs of two minibatches, then the multiplier ----


@pytest.fixture(scope="module")
def run(tiny_model, tiny_config, mesh):
    """The learner of the tiny run, as the trainer makes it."""
    return Learner(tiny_model[0], tiny_config(), mesh)


@pytest.fixture(scope="module")
def device_rollout(rollout, mesh):
    return sharding.put_batch(rollout, mesh)


KEY = jax.random.key(0)


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

    after, stats, variance = run.train_on_rollout(run.init_state(tiny_model[1]), device_rollout, KEY)
    np.testing.assert_allclose(variance["first"], variances[0], atol=1e-9)
    np.testing.assert_allclose(variance["last"], variances[3], rtol=1e-3)
    np.testing.assert_allclose(stats.mean("excess_squared"), np.mean(variances), rtol=0.2)  # tokens, not minibatches
    assert abs(variances[3] / np.mean(variances) - 1) > 0.3, "the mean would be another number"
    np.testing.assert_array_equal(variance["nonfinite"], np.zeros(4))
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
    state, _, variance = fixed.train_on_rollout(fixed.init_state(tiny_model[1]), device_rollout, KEY)
    assert float(state.dual.variance_coef) == 2.5
    assert variance["last"] > 1e-5


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
        state, _, variance = run.train_on_rollout(run.init_state(tiny_model[1]), bad, KEY)
        skipped.append(tuple(np.asarray(variance["nonfinite"])))
        assert np.isfinite(state.dual.variance_coef), skipped[-1]
    assert all(sum(s) == 2 for s in skipped), "once an epoch"
    assert {s[-1] for s in skipped} == {0, 1}, "in the last minibatch and elsewhere"


# ---- what a learner is made of ----


def test_a_micro_batch_that_does_not_divide_over_the_devices_is_refused(tiny_model, tiny_config):
    mesh = types.SimpleNamespace(shape={"data": 4, "fsdp": 2, "tensor": 1})
    with pytest.raises(ValueError, match="micro_batch_size=4 is not a multiple of the 8 data-parallel devices"):
        Learner(tiny_model[0], tiny_config(), mesh)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("r2vpo", {"penalty_scope": "sequence"}),
        ("ppo_clip", {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5}),
        ("policy_gradient", {}),
        ("spo", {"epsilon": 0.3}),
        ("ce_gppo", {"keep_high": 0.7}),
    ],
)
def test_the_objective_gets_its_hyper_parameters(name, hyper):
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((3, 4)).astype(np.float32) for _ in range(2)]
    arrays += [np.array([1.0, -1.0, -2.0], np.float32), np.ones((3, 4), bool)]
    given = {"normalizer": 7.0} | ({"variance_coef": 3.0} if name == "r2vpo" else {})
    objective = ObjectiveConfig(name=name, reduction="sequence_mean", **hyper)
    loss, _ = learner.policy_loss(objective)(*arrays, **given)
    if name == "ce_gppo":
        hyper = hyper | {"keep_low": 0.5}
    expected, _ = losses.get(objective.loss)(*arrays, reduction="sequence_mean", **given, **hyper)
    assert loss == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Peak 8. Warm-up over 4 updates is 2, 4, 6, 8; 20 updates in all.
        ({"schedule": "constant"}, {0: 2, 1: 4, 2: 6, 3: 8, 4: 8, 12: 8, 20: 8}),
        # Then from 8 to 2 over 16 updates: halfway at 12.
        ({"schedule": "linear"}, {0: 2, 3: 8, 4: 8, 8: 6.5, 12: 5, 20: 2, 30: 2}),
        # 2 + 6 (1 + cos(pi t)) / 2 with t = 1/4, 1/2, 1.
        ({"schedule": "cosine"}, {0: 2, 3: 8, 4: 8, 8: 2 + 3 * (1 + np.sqrt(0.5)), 12: 5, 20: 2, 30: 2}),
        ({"schedule": "linear", "warmup_updates": 0}, {0: 8, 10: 5, 20: 2}),
        ({"schedule": "constant", "warmup_updates": 1}, {0: 8, 1: 8}),
    ],
)
def test_learning_rate(settings, expected):
    config = OptimizerConfig(**{"learning_rate": 8.0, "warmup_updates": 4, "final_fraction": 0.25} | settings)
    schedule = learner.learning_rate_schedule(config, num_updates=20)
    np.testing.assert_allclose([schedule(i) for i in expected], list(expected.values()), rtol=1e-6)


def test_weight_decay_is_for_matrices_only(tiny_model):
    """At gradient zero Adam does nothing, so what moves is decayed: by rate x decay = 0.05."""
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1, warmup_updates=0)
    optimizer = learner.make_optimizer(config, 10)
    untied = with_config(tiny_model[0], tie_word_embeddings=False)
    params = random_params(untied)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p))(params, zeros)
    moved = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = path[-1].key
        if np.any(leaf != 0):
            moved.add(name)
            value = params
            for key in path:
                value = value[key.key]
            np.testing.assert_allclose(leaf, -0.05 * value, rtol=1e-5)
    assert moved == {"kernel", "embed", "lm_head"}


def test_the_gradient_is_clipped_by_its_global_norm():
    """(30, 40) has norm 50; clipped to 1 it is (0.6, 0.8). Seen in Adam's first moment, 0.1 of it."""
    config = OptimizerConfig(max_grad_norm=1.0, b1=0.9, warmup_updates=0)
    optimizer = learner.make_optimizer(config, 10)
    params = {"a": {"kernel": jnp.zeros(1)}, "b": {"bias": jnp.zeros(1)}}
    grads = {"a": {"kernel": jnp.array([30.0])}, "b": {"bias": jnp.array([40.0])}}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([mu["a"]["kernel"][0], mu["b"]["bias"][0]], [0.06, 0.08], rtol=1e-5)
