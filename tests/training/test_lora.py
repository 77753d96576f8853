"""Runs that train adapters: their gradients, what stays as it is, and what is left behind."""

import json

import jax
import numpy as np
import optax
import pytest

from r2vpo_jax import models, sharding
from r2vpo_jax.config import LoraConfig
from r2vpo_jax.evaluation import exports, model_source
from r2vpo_jax.models import lora
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import checkpoints
from r2vpo_jax.training import trainer
from r2vpo_jax.training.learner import Learner
from tests.helpers.evaluations import silent, tiny
from tests.helpers.learner import RATE
from tests.helpers.params import random_params, with_config
from tests.helpers.runs import assert_same_run, stop

LORA = {"rank": 2, "alpha": 4.0}
SCALE = 2.0


# ---- one update ----


@pytest.fixture(scope="module")
def adapted(tiny_model):
    """(model, parameters): nothing is at a value that hides it."""
    model = with_config(tiny_model[0], lora=LoraConfig(**LORA))
    params = random_params(model)
    params["embed"] *= 0.5
    return model, params


@pytest.fixture(scope="module")
def off_policy(rollout):
    """Ratios well away from 1."""
    noise = 0.2 * np.random.default_rng(0).standard_normal(rollout.behavior_logp.shape)
    return rollout.replace(
        behavior_logp=(-3 + noise).astype(np.float32),
        advantage=(100 * np.random.default_rng(1).standard_normal(16)).astype(np.float32),
    )


def learner_of(model, tiny_config, mesh, optimizer=None, **trainer):
    config = tiny_config(objective={"name": "r2vpo_fixed"}, trainer={"num_minibatches": 1, **trainer})
    return Learner(model, config, mesh, optimizer=optimizer or optax.sgd(RATE))


def updated(learner, params, rollout):
    state, _ = learner.update(learner.init_state(params), sharding.put_batch(rollout, learner.mesh))
    return sharding.to_host(state.params)


@pytest.fixture(scope="module")
def slopes(adapted, off_policy, tiny_model, tiny_config, mesh):
    """Gradients of the weights of the merged model."""
    weights = jax.tree.map(
        lambda x: lora.merged(x.kernel[0], x.a[0], x.b[0], x.scale)[None] if isinstance(x, lora.Adapted) else x,
        lora.adapted(adapted[1], SCALE),
    )
    after = updated(learner_of(tiny_model[0], tiny_config, mesh), weights, off_policy)
    return jax.tree.map(lambda new, old: (old - new) / RATE, after, weights)


@pytest.mark.parametrize("packing", [False, True])
def test_an_update_follows_the_gradients_of_the_weights(packing, adapted, slopes, off_policy, tiny_config, mesh):
    """Of the weights that they are merged into: dA = s dW B^T, dB = s A^T dW; the frozen ones stay."""
    model, params = adapted
    after = updated(learner_of(model, tiny_config, mesh, packing=packing), params, off_policy)
    jax.tree.map(np.testing.assert_array_equal, *map(lora.without_adapters, (after, params)))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(slopes["layers"]))
    for module in ("attention", "mlp"):
        for name, factors in lora.split(after)[0]["layers"][module].items():
            a, b = (params["layers"][module][name][factor][0] for factor in lora.FACTORS)
            slope = slopes["layers"][module][name]["kernel"][0].reshape(a[..., 0].size, b[0].size)
            flat_a, flat_b = a.reshape(-1, 2), b.reshape(2, -1)
            for factor, expected in (("lora_a", SCALE * slope @ flat_b.T), ("lora_b", SCALE * flat_a.T @ slope)):
                found = -factors[factor][0].reshape(expected.shape) / RATE
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * largest, err_msg=f"{name} {factor}")


def test_the_frozen_weights_are_there_once(adapted, rollout, tiny_config, mesh):
    """The update donates what is trained only, so sampler and reference hold the frozen weights themselves."""
    model, params = adapted
    learner = learner_of(model, tiny_config, mesh, optax.adam(1e-2))
    state = learner.init_state(params)
    sampling, reference = learner.sampler_params(state), learner.reference_params(state)
    frozen = jax.tree.leaves(lora.without_adapters(state.params))
    assert all(x is y for x, y in zip(jax.tree.leaves(reference), frozen, strict=True))
    assert all(x is y for x, y in zip(jax.tree.leaves(lora.without_adapters(sampling)), frozen, strict=True))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(lora.split(params)[0]))
    batch = sharding.put_batch(rollout, mesh)
    base = learner_of(with_config(model, lora=None), tiny_config, mesh)
    expected = sharding.to_host(base.score(base.init_state(lora.without_adapters(params)).params, batch))
    np.testing.assert_array_equal(sharding.to_host(learner.score(reference, batch)), expected)
    after, _ = learner.update(state, batch)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(sampling), params)
    np.testing.assert_array_equal(sharding.to_host(learner.score(reference, batch)), expected)
    moved = lora.split(after.params)[0]
    jax.tree.map(lambda x, y: np.testing.assert_array_less(0, np.abs(x - y).max()), moved, lora.split(params)[0])


# ---- a run ----


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(
        model={"lora": LORA}, optimizer={"learning_rate": 1e-2}, objective={"kl": {"coef": 0.05}, "name": "r2vpo"}
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """(workdir, iterations, lines for people) of a run from start to end."""
    workdir, seen, said = tmp_path_factory.mktemp("adapters") / "run", [], []

    def keep(done):
        seen.append((done.batch, jax.tree.map(np.array, done.state.params), done.row))

    trainer.train(config, workdir, on_iteration=keep, say=said.append)
    return workdir, seen, said


def test_a_run_trains_adapters_alone(finished, config, tiny_model, mesh):
    workdir, seen, said = finished
    base = open_base_model(config.model)
    begun = base.load_params(seed=config.seed)
    for _, params, _ in seen:
        jax.tree.map(np.testing.assert_array_equal, *map(lora.without_adapters, (params, begun)))
        assert all(x.any() for x in jax.tree.leaves(lora.split(params)[0])), "B too has left zero"
    (line,) = (line for line in said if line.startswith("adapters of rank 2 beside q_proj"))
    trained = sum(x.size for x in jax.tree.leaves(lora.split(begun)[0]))
    assert f"{trained:,} parameters are trained" in line
    assert "are frozen in float32" in line

    # The first policy is the base model, and so the reference is the policy that sampled; later on it still is.
    first, last = seen[0][0], seen[-1][0]
    mask = first.response_mask
    np.testing.assert_allclose(first.reference_logp[mask], first.behavior_logp[mask], rtol=0, atol=5e-5)
    learner = trainer.Learner(base.model, config, mesh)
    placed = sharding.put_batch(last, mesh)
    reference = sharding.to_host(learner.score(learner.init_state(begun).params, placed))
    np.testing.assert_allclose(
        last.reference_logp[last.response_mask], reference[last.response_mask], rtol=0, atol=1e-5
    )
    assert np.abs(last.reference_logp - last.behavior_logp)[last.response_mask].max() > 1e-3
    assert 0 < seen[0][2]["kl/mean"] < seen[-1][2]["kl/mean"]

    listed = json.loads(checkpoints.manifest(workdir / "checkpoints", 4).read_text())["arrays"]
    names = [name for name in listed if ".params" in name or "mu" in name or "nu" in name]
    assert len(names) == 3 * len(jax.tree.leaves(lora.split(begun)[0]))
    assert all("lora_a" in name or "lora_b" in name for name in names), names


def test_what_it_leaves_is_its_policy(finished, config, mesh, tmp_path):
    """hf/ and both exports say what the last state says; the same weights are evaluated."""
    workdir, seen, _ = finished
    params, batch = seen[-1][1], sharding.put_batch(seen[-1][0], mesh)
    base = open_base_model(config.model)
    learner = trainer.Learner(base.model, config, mesh)
    expected = sharding.to_host(learner.score(learner.init_state(params).params, batch))
    model, merged = models.from_pretrained(workdir / "hf", num_tokens=base.model.config.num_tokens)
    plain = Learner(model, config, mesh)
    found = sharding.to_host(plain.score(plain.init_state(merged).params, batch))
    mask = seen[-1][0].response_mask
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-4, atol=1e-5)

    source = model_source.find(str(workdir), "last")
    assert source.lora == config.model.lora
    assert model_source.find(str(workdir)).lora.rank == 0, "in hf/ they have been merged"
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(source.load_params(base, mesh)), params)

    said = []
    exports.export(str(workdir), "last", tmp_path / "merged", say=said.append)
    exports.export(str(workdir), "last", tmp_path / "peft", adapters=True, say=said.append)
    for file in (workdir / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes(), file.name
    assert sorted(file.name for file in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert said[-1].endswith(f"the adapters alone, for {config.model.path}")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (config.model.path, None)


@pytest.mark.slow
def test_a_stop_changes_no_bit(finished, config, tiny_model, mesh, tmp_path):
    stop(config, tmp_path / "run", 2)
    trainer.train(config, tmp_path / "run", say=lambda _: None)
    model = open_base_model(config.model).model
    assert_same_run(tmp_path / "run", finished[0], config, (model, None), mesh)


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_like_the_weights_that_it_is_merged_into(finished, tmp_path):
    """Of 16 problems with 4 samples each: rounding may change a draw, but not the scores by much."""
    workdir = finished[0]
    scores = [silent(tiny(workdir, checkpoint=checkpoint), tmp_path / str(checkpoint)) for checkpoint in ("last", None)]
    one, other = (score["benchmarks"][0]["scores"]["pass_at_1"]["value"] for score in scores)
    assert abs(one - other) < 0.05
