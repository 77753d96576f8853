"""One device against eight. Run by test_sharding.py in a process of its own, which has eight CPU devices:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.run_on_eight_devices [placement]

Prints one line of JSON: {"check on mesh": null, or what went wrong}. `placement` leaves out all that compiles.
"""

import dataclasses
import functools
import json
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2vpo_jax import config, models, sampler, sharding
from r2vpo_jax.config import LoraConfig, RunMeshConfig
from r2vpo_jax.models import attention, flash, lora
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.training import sampler_mesh
from r2vpo_jax.training.learner import Learner
from tests.helpers.attempts import attempt
from tests.helpers.compilations import compilations
from tests.helpers.learner import assert_same_stats
from tests.helpers.params import random_params

RATE = 2.0**20  # swamps the parameters: the new ones are -RATE * gradient
ROWS, MICRO, PROMPT, RESPONSE = 16, 8, 6, 5
LENGTHS = np.array([6, 3, 1, 5, 2, 4, 6, 2], np.int32)
LORA = LoraConfig(rank=4, alpha=8.0)


def make_model(num_kv_heads, adapters=None):
    """Eight heads; its output matrix is its own when there are two key-value heads."""
    return models.Decoder(
        models.DecoderConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_layers=1,
            num_heads=8,
            num_kv_heads=num_kv_heads,
            head_dim=2,
            num_tokens=17,
            tie_word_embeddings=num_kv_heads == 8,
            lora=adapters,
        )
    )


def make_config(micro_batch_size=MICRO, packing=False):
    trainer = {"prompts_per_rollout": 8, "num_minibatches": 1, "num_epochs": 2, "scoring_chunk_size": 3}
    trainer["packing"] = packing
    objective = {"name": "r2vpo_fixed", "loss": {"reduction": "sequence_mean"}}
    return config.from_flags(
        config.make(
            objective=objective, trainer=trainer | {"micro_batch_size": micro_batch_size}, sampler={"group_size": 2}
        )
    )


def make_rollout():
    """16 rows with ratios well away from 1."""
    generator = np.random.default_rng(0)
    integers = np.arange(ROWS, dtype=np.int32)
    return Rollout(
        tokens=generator.integers(0, 17, (ROWS, PROMPT + RESPONSE)).astype(np.int32),
        prompt_length=np.repeat(LENGTHS, 2),
        response_length=generator.integers(1, RESPONSE + 1, ROWS).astype(np.int32),
        truncated=np.zeros(ROWS, bool),
        behavior_logp=(-3 + 0.2 * generator.standard_normal((ROWS, RESPONSE))).astype(np.float32),
        temperature=np.ones(ROWS, np.float32),
        reward=np.zeros(ROWS, np.float32),
        outcome=np.zeros(ROWS, np.int32),
        advantage=(100 * generator.standard_normal(ROWS)).astype(np.float32),
        keep=np.ones(ROWS, bool),
        group_id=integers,
        rollout_id=integers,
        version=np.zeros(ROWS, np.int32),
    )


class Subject:
    """One model on one mesh, and what comes out of it."""

    def __init__(self, num_kv_heads, mesh, adapters=None):
        self.model, self.mesh = make_model(num_kv_heads, adapters), mesh
        self.params = random_params(self.model)
        self.rollout = make_rollout()

    def learner(self, packing=False):
        return Learner(self.model, make_config(packing=packing), self.mesh, optimizer=optax.sgd(RATE))

    def update(self, packing=False):
        learner = self.learner(packing)
        state = learner.init_state(self.params)
        state, stats = learner.update(state, sharding.put_batch(self.rollout, self.mesh))
        after, stats = sharding.to_host((state.params, stats))
        return jax.tree.map(lambda new, old: (old - new) / RATE, after, self.params), stats

    def score(self, packing=False):
        learner = self.learner(packing)
        params = learner.init_state(self.params).params
        return sharding.to_host(learner.score(params, sharding.put_batch(self.rollout, self.mesh)))

    def minibatch(self):
        batch = sharding.put_batch(self.rollout, self.mesh)
        return sharding.to_host(self.learner().minibatch(batch, jax.random.key(1), 1))

    def draws(self, num_prompts=8, longest=RESPONSE, **how):
        learner = self.learner()
        return sampler.generate(
            self.model,
            learner.sampler_params(learner.init_state(self.params)),
            self.rollout.tokens[:num_prompts, :PROMPT],
            LENGTHS[:num_prompts],
            jax.random.key(2),
            sampler.Sampling(group_size=2, max_response_length=longest, eos_ids=(3, 5, 7, 11)),
            mesh=self.mesh,
            problem_ids=np.arange(num_prompts),
            **how,
        )

    def draws_in_segments(self):
        """On one device in one loop, elsewhere in segments, twice: then nothing is compiled any more."""
        if self.mesh.size == 1:
            return self.draws(longest=24, segment_length=0)
        how = {"longest": 24, "segment_length": 3, "batch_size": 4}
        once = self.draws(**how)
        with compilations() as compiled:
            again = self.draws(**how)
        assert not {"jit(_start)", "jit(_advance)", "jit(_regroup)", "jit(_widen)"} & set(compiled), compiled
        jax.tree.map(np.testing.assert_array_equal, once, again)
        return again


def same_update(actual, expected):
    (grads, stats), (expected_grads, expected_stats) = actual, expected
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_grads))
    assert largest > 0.1
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))
    assert_same_stats(stats, expected_stats)


def same_score(actual, expected):
    mask = make_rollout().response_mask
    np.testing.assert_allclose(actual[mask], expected[mask], rtol=1e-5, atol=1e-5)


def same_minibatch(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert sorted(actual.rollout_id) == list(range(ROWS))
    assert list(actual.rollout_id) != list(range(ROWS))


def same_draws(actual, expected):
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.response_length, expected.response_length)
    assert len(set(expected.response_length.tolist())) > 1
    np.testing.assert_allclose(actual.behavior_logp, expected.behavior_logp, rtol=1e-5, atol=1e-5)


CHECKS = {
    "update": (Subject.update, same_update),
    "score": (Subject.score, same_score),
    "minibatch": (Subject.minibatch, same_minibatch),
    "draws": (Subject.draws, same_draws),
}
# Packed on eight devices is unpacked on one.
PACKED_CHECKS = ("update", "score")
# Mesh and number of key-value heads. Two of them do not divide over eight devices, nor do three prompts.
CASES = {
    "8,1,1": ((8, 1, 1), 8),
    "2,2,2": ((2, 2, 2), 8),
    "1,1,8": ((1, 1, 8), 8),
    "1,1,8 with 2 kv heads": ((1, 1, 8), 2),
}


def compare():
    one = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    expected, results = {}, {}
    for case, (shape, num_kv_heads) in CASES.items():
        subject = Subject(num_kv_heads, sharding.make_mesh(shape))
        checks = dict(CHECKS)
        if case == "8,1,1":
            checks["three draws"] = (lambda s: s.draws(3), same_draws)
        if case in ("8,1,1", "2,2,2"):
            checks["segments"] = (Subject.draws_in_segments, same_draws)
        for name, (compute, same) in checks.items():
            if (name, num_kv_heads) not in expected:
                expected[name, num_kv_heads] = compute(Subject(num_kv_heads, one))
            results[f"{name} on {case}"] = attempt(
                lambda: same(compute(subject), expected[name, num_kv_heads])  # noqa: B023
            )
            if name in PACKED_CHECKS:
                results[f"packed {name} on {case}"] = attempt(
                    lambda: same(compute(subject, packing=True), expected[name, num_kv_heads])  # noqa: B023
                )
    adapted = [Subject(8, mesh, LORA) for mesh in (sharding.make_mesh((2, 2, 2)), one)]
    results["update of adapters on 2,2,2"] = attempt(lambda: same_update(*(subject.update() for subject in adapted)))
    for way in WAYS:
        results |= {f"{way} on {case}": attempt(attention_in_parts, way, case) for case in HEADS}
    return results


# ---- attention ----

WAYS = {
    "einsum": attention._einsum,
    "blockwise": attention._blockwise,
    "splash": functools.partial(flash.splash, interpret=True),
}
# Mesh, key-value heads and query heads of each: where the first do not divide over "tensor", the second are split.
HEADS = {"8,1,1": ((8, 1, 1), 1, 2), "2,2,2": ((2, 2, 2), 2, 1), "1,1,8": ((1, 1, 8), 8, 1), "2,1,4": ((2, 1, 4), 2, 4)}


def attention_in_parts(way, case):
    """The same outputs and gradients as on one device, and nothing gathered: each device keeps its rows and heads."""
    shape, kv_heads, group = HEADS[case]
    mesh = sharding.make_mesh(shape)
    config = dataclasses.replace(
        make_model(8).config, num_kv_heads=kv_heads, num_heads=kv_heads * group, head_dim=16, attention_block_size=16
    )
    rng, rows, columns = np.random.default_rng(0), 8, 40
    shapes = [(rows, columns, kv_heads, *more, 16) for more in ((group,), (), ())]
    given = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    given[0] /= 4
    segments = np.sort(rng.integers(0, 3, (rows, columns)), axis=1).astype(np.int32)  # padding is on the left
    kv = "kv_heads" if kv_heads % mesh.shape["tensor"] == 0 else None
    axes = [("batch", None, kv, None if kv else "heads", None), ("batch", None, kv, None), ("batch", None, kv, None)]

    def gradients(attend, mesh, *qkv):
        def loss(*qkv):
            out = jnp.where((segments != 0)[..., None, None, None], attend(*qkv, jnp.asarray(segments), config), 0)
            return jnp.sum(out**3), out

        with sharding.activate(mesh):
            return jax.grad(loss, (0, 1, 2), has_aux=True)(*qkv)

    expected = jax.jit(functools.partial(gradients, attention._einsum, None))(*given)
    placed = [jax.device_put(x, sharding.named_sharding(a, x.shape, mesh)) for x, a in zip(given, axes, strict=True)]
    compiled = jax.jit(functools.partial(gradients, WAYS[way], mesh)).lower(*placed).compile()
    actual = sharding.to_host(compiled(*placed))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), actual, expected)
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {kind}(" not in compiled.as_text(), kind


# ---- placement: nothing but small programs ----


def shard_shape(array):
    """The shape that each device holds, the same for all."""
    (shape,) = {shard.data.shape for shard in array.addressable_shards}
    return shape


def parameters_are_sharded():
    """data 2, fsdp 2, tensor 2: an eighth of nothing, a quarter of each matrix, all of each norm."""
    model, mesh = make_model(8), sharding.make_mesh((2, 2, 2))
    learner = Learner(model, make_config(), mesh)
    state = learner.init_state(random_params(model))
    expected = {
        "embed": (16, 8),  # vocabulary over tensor, hidden over fsdp
        "q_proj": (1, 8, 4, 2),
        "o_proj": (1, 4, 2, 8),
        "gate_proj": (1, 8, 16),
        "down_proj": (1, 16, 8),
    }
    layers = state.params["layers"]
    kernels = {n: layers["attention"][n]["kernel"] for n in ("q_proj", "o_proj")}
    kernels |= {n: layers["mlp"][n]["kernel"] for n in ("gate_proj", "down_proj")}
    shapes = {"embed": shard_shape(state.params["embed"]), **{n: shard_shape(k) for n, k in kernels.items()}}
    assert shapes == expected, shapes
    assert shard_shape(layers["attention"]["q_proj"]["bias"]) == (1, 4, 2)
    assert shard_shape(state.params["final_norm"]["scale"]) == (16,)
    # Adam's moments live where their parameters do; so do the sampler's copies.
    for tree in (
        optax.tree_utils.tree_get(state.opt_state, "mu"),
        optax.tree_utils.tree_get(state.opt_state, "nu"),
        learner.sampler_params(state),
    ):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(state.params), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(state.params), random_params(model))


def adapters_are_sharded():
    """As the kernels that they are added to; the rank is whole everywhere. So are their moments, and the frozen have none."""
    model, mesh = make_model(8, LORA), sharding.make_mesh((2, 2, 2))
    learner = Learner(model, make_config(), mesh)
    state = learner.init_state(random_params(model))
    layers = state.params["layers"]
    shapes = {
        name: tuple(shard_shape(layers[module][name][factor]) for factor in lora.FACTORS)
        for module, name in (("attention", "q_proj"), ("attention", "o_proj"), ("mlp", "down_proj"))
    }
    assert shapes == {
        "q_proj": ((1, 8, 4), (1, 4, 4, 2)),
        "o_proj": ((1, 4, 2, 4), (1, 4, 8)),
        "down_proj": ((1, 16, 4), (1, 4, 8)),
    }, shapes
    trained = lora.split(state.params)[0]
    for moments in ("mu", "nu"):
        tree = optax.tree_utils.tree_get(state.opt_state, moments)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(trained), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
    begun = lora.init(model, 3, mesh)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(begun), lora.init(model, 3))
    for a, b in zip(jax.tree.leaves(begun), jax.tree.leaves(trained), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def frozen_weights_go_to_a_mesh_of_the_sampler_once():
    model = make_model(2, LORA)
    mesh, other = sampler_mesh.make_meshes(RunMeshConfig(fsdp=2, tensor=2, sampler_devices=4, sampler_tensor=2))
    learner = Learner(model, make_config(), mesh)
    weights = sampler_mesh.SamplerWeights(learner, other, Timers())
    state = learner.init_state(random_params(model))
    moved, again = weights.for_rollouts(state, 0), weights.for_rollouts(state, 1)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(again), sharding.to_host(state.params))
    (trained, frozen), (trained_again, frozen_again) = lora.split(moved), lora.split(again)
    for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(frozen_again), strict=True):
        assert x is y
    assert not any(x is y for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(trained_again), strict=True))
    assert weights.num_bytes == sum(
        shard.data.nbytes for x in jax.tree.leaves(trained) for shard in x.addressable_shards
    )


def heads_that_do_not_divide_are_replicated():
    model, mesh = make_model(2), sharding.make_mesh((1, 1, 8))
    learner = Learner(model, make_config(), mesh)
    params = learner.init_state(random_params(model)).params
    layers = params["layers"]["attention"]
    assert shard_shape(layers["q_proj"]["kernel"]) == (1, 16, 1, 2)
    assert shard_shape(layers["k_proj"]["kernel"]) == (1, 16, 2, 2)  # all of it
    assert shard_shape(params["lm_head"]) == (16, 4)
    table = sharding.placement_table(learner.logical_axes, learner.abstract_params, mesh)
    lines = {line.split()[0]: line for line in table.splitlines()}
    for name in ("k_proj", "v_proj"):
        assert "does not divide: kv_heads" in lines[f"layers/attention/{name}/kernel"]
    assert "does not divide" not in lines["layers/attention/q_proj/kernel"]
    assert "tensor" in lines["layers/attention/q_proj/kernel"]


def batches_are_sharded():
    mesh = sharding.make_mesh((2, 2, 2))
    rows = sharding.put_batch({"even": np.arange(24).reshape(8, 3), "odd": np.arange(6), "scalar": np.int32(3)}, mesh)
    assert shard_shape(rows["even"]) == (2, 3)  # over data and fsdp
    assert shard_shape(rows["odd"]) == (3,)  # over fsdp alone
    assert shard_shape(rows["scalar"]) == ()
    host = sharding.to_host(rows)
    np.testing.assert_array_equal(host["even"], np.arange(24).reshape(8, 3))
    np.testing.assert_array_equal(host["odd"], np.arange(6))


def activations_are_constrained():
    mesh = sharding.make_mesh((2, 2, 2))

    @jax.jit
    def inside(x):
        with sharding.activate(mesh):
            return sharding.constrain(x, "batch", None, "vocab")

    assert shard_shape(inside(jnp.zeros((8, 3, 4)))) == (2, 3, 2)
    assert sharding.constrain(5, "batch") == 5  # outside nothing happens


def meshes_are_checked():
    assert dict(sharding.make_mesh((-1, 2, 1)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    for shape in ((3, 1, 1), (-1, 3, 1), (4, 1, 1)):
        with pytest.raises(ValueError, match="devices"):
            sharding.make_mesh(shape)
    with pytest.raises(ValueError, match="is not a multiple of the 8 data-parallel devices"):
        Learner(make_model(8), make_config(micro_batch_size=4), sharding.make_mesh((4, 2, 1)))


def weights_go_to_a_mesh_of_the_sampler():
    """Rounded, in the layout of the sampler; and counted."""
    model = make_model(2)
    for own, shape in (
        ({"fsdp": 2, "tensor": 2, "sampler_devices": 4, "sampler_tensor": 2}, {"data": 2, "fsdp": 1, "tensor": 2}),
        ({"sampler_devices": 6, "sampler_tensor": 2}, {"data": 3, "fsdp": 1, "tensor": 2}),
        ({"fsdp": 2, "tensor": 3, "sampler_devices": 2}, {"data": 2, "fsdp": 1, "tensor": 1}),
    ):
        mesh, other = sampler_mesh.make_meshes(RunMeshConfig(**own))
        assert dict(other.shape) == shape
        assert {*mesh.devices.flat, *other.devices.flat} == {*jax.devices()}
        assert not {*mesh.devices.flat} & {*other.devices.flat}
        learner, timers = Learner(model, make_config(), mesh), Timers()
        learner._sampling_weights = "bfloat16"
        weights = sampler_mesh.SamplerWeights(learner, other, timers)
        state = learner.init_state(random_params(model))
        expected = sharding.tree_shardings(learner.logical_axes, learner.abstract_params, other)
        for moved, reference in (
            (weights.for_rollouts(state, 0), jax.jit(learner.as_sampled)(state.params)),
            (weights.for_scores(state), state.params),
        ):
            jax.tree.map(np.testing.assert_array_equal, sharding.to_host(moved), sharding.to_host(reference))
            for x, where in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
                assert x.sharding.is_equivalent_to(where, x.ndim)
        received = sum(shard.data.nbytes for x in jax.tree.leaves(moved) for shard in x.addressable_shards)
        assert weights.num_bytes == received
        assert timers.seconds["weights"] > 0
    one, same = sampler_mesh.make_meshes(RunMeshConfig())
    assert one is same
    assert sampler_mesh.SamplerWeights(Learner(model, make_config(), one), same, Timers()).num_bytes is None


def devices_that_cannot_be_divided_are_refused():
    class Device(NamedTuple):
        id: int
        process_index: int

    two_hosts = [Device(i, i // 4) for i in range(8)]
    for own, devices, message in (
        ({"sampler_devices": 8}, None, "leaves no device to learn on: there are 8"),
        ({"sampler_devices": 8}, two_hosts, "leaves no device to learn on: a process has 4 and would give 4"),
        ({"sampler_devices": 3}, two_hosts, "is not a multiple of the 2 processes"),
        ({"sampler_devices": 4, "sampler_tensor": 4}, two_hosts, "must divide .* of each process: it has 2 and 2"),
        ({"sampler_devices": 6, "sampler_tensor": 3}, None, "must divide .* of each process: it has 6 and 2"),
        ({"sampler_devices": 4, "data": 8}, None, r"needs 8 devices, but there are 4; .*sampler_devices=4 of 8 sample"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler_mesh.make_meshes(RunMeshConfig(**own), devices)


PLACEMENT = (
    parameters_are_sharded,
    adapters_are_sharded,
    frozen_weights_go_to_a_mesh_of_the_sampler_once,
    heads_that_do_not_divide_are_replicated,
    batches_are_sharded,
    activations_are_constrained,
    meshes_are_checked,
    weights_go_to_a_mesh_of_the_sampler,
    devices_that_cannot_be_divided_are_refused,
)


def main():
    assert jax.device_count() == 8, jax.devices()
    only_placement = sys.argv[1:] == ["placement"]
    print(json.dumps({check.__name__: attempt(check) for check in PLACEMENT} if only_placement else compare()))


if __name__ == "__main__":
    main()
