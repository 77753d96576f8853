"""The learner: gradients of the objective that was asked for, however the batch is split, permuted or padded."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2vpo_jax import losses, models, sharding
from r2vpo_jax.training.learner import Learner
from tests.helpers.learner import RATE, assert_same
from tests.helpers.params import jaxpr_sizes, random_params
from tests.helpers.rollouts import empty

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
            objective = {
                "name": "r2vpo_fixed",
                "loss": {"reduction": reduction},
                "dual": {"coef": COEF},
                "kl": {"coef": KL_COEFS[reduction]},
            }
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
    jaxpr = jax.make_jaxpr(learner.update)(learner.abstract_state, empty(16, 6, 14))
    assert (max(jaxpr_sizes(jaxpr.jaxpr)) >= 4 * 14 * 300) == whole


def test_a_nan_in_the_reference_under_the_mask_changes_nothing(learners, params, batch):
    learner = learners("sequence_mean")
    reference = np.where(batch.response_mask, batch.reference_logp, np.nan)
    after, before = (update(learner, params, b) for b in (batch.replace(reference_logp=reference), batch))
    assert_same_updates(after, before)


def test_a_micro_batch_that_does_not_divide_over_the_devices_is_refused(tiny_model, tiny_config):
    mesh = types.SimpleNamespace(shape={"data": 4, "fsdp": 2, "tensor": 1})
    with pytest.raises(ValueError, match="micro_batch_size=4 is not a multiple of the 8 data-parallel devices"):
        Learner(tiny_model[0], tiny_config(), mesh)
