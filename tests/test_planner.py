"""The parts of scripts/compile_for_tpu.py that need no compiler: names, counts, programs as text, the order of meshes."""

import dataclasses
import math
import sys

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from r2vpo_jax import models
from r2vpo_jax.config import LoraConfig
from r2vpo_jax.sharding import MESH_AXES
from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "scripts"))  # as when scripts/compile_for_tpu.py runs

from planner import hlo, search, topologies
from planner.arithmetic import Arithmetic, Bound, Workload

CHIP = topologies.Chip(flops=1e12, memory=1.0, bandwidth=1e9, links=1e8)
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_layers": 3, "num_heads": 4}
DECODER = models.DecoderConfig(
    **SIZES, num_kv_heads=2, head_dim=16, tie_word_embeddings=False, compute_dtype=jnp.bfloat16, remat=True
)
WORK = Workload(
    prompts=8,
    prompts_at_a_time=8,
    group_size=2,
    prompt_length=8,
    response_length=32,
    num_minibatches=2,
    micro_batch_size=4,
    segment_length=4,
)


def arithmetic(*mesh, work=WORK, attention="einsum", **changes):
    return Arithmetic(dataclasses.replace(DECODER, **changes), AbstractMesh(mesh, MESH_AXES), work, attention)


def test_adapters_leave_little_to_train():
    """Frozen weights are there once, in two bytes, and have no gradients; the products of these are not made."""
    whole, adapted = arithmetic(1, 1, 1), arithmetic(1, 1, 1, lora=LoraConfig(rank=2, target_modules=("q_proj",)))
    trained = 3 * 2 * (64 + 4 * 16)
    assert (whole.trained(), adapted.trained()) == (whole.parameters(), trained)
    assert adapted.parameters() == whole.parameters() + trained
    cache = whole.cache_bytes(WORK.columns[-1])
    assert whole.least_memory() == {"sampler": 14 * whole.parameters() + cache, "update": 16 * whole.parameters()}
    frozen = 2 * whole.parameters()
    assert adapted.least_memory() == {"sampler": frozen + 14 * trained + cache, "update": frozen + 16 * trained}
    assert adapted.flops()["update"] == 3 / 4 * whole.flops()["update"]
    assert adapted.flops()["scoring"] == whole.flops()["scoring"]


def test_slices_by_name():
    named = {"v5e-16": 16, "v5litepod-16": 16, "v6e-16": 16, "v5p-16": 8, "v5p-64": 32, "v5p:2x2x4": 16}
    assert {name: topologies.chips_in(name) for name in named} == named
    assert topologies.grid_of("v5p-64") == "v5p:2x4x4"
    assert topologies.chip_of("v5litepod-16") == topologies.CHIPS["v5e"]
    for name, part in {
        "v9:4x4": "not one of v5e, v5p, v6e",
        "v5p-17": "no such slice; one of v5p-8",
        "h100": "v5e",
    }.items():
        with pytest.raises(ValueError, match=part):
            topologies.grid_of(name)
    for name in ("v5e:", "v5e:4xx4", "v5e:4x0"):
        with pytest.raises(ValueError, match="CHIP:AxB"):
            topologies.chips_in(name)


# A loop over tokens with a loop over three layers inside; before it a loop over layers, in parts that run beside others.
PROGRAM = """HloModule jit_sample, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%layer (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %tuple = (s32[], bf16[4,8]{1,0}) tuple(%i, %all-reduce.1)
}

%few (p: (s32[], bf16[4,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %constant.1), direction=LT, metadata={op_name="cond/lt"}
}

%token (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %while.1 = (s32[], /*index=1*/bf16[4,8]{1,0}) while(%t), condition=%few, body=%layer, metadata={op_name="while/body/while"}
  %cond = f32[16]{0} conditional(%k, %z, %z), branch_computations={%whole, %truncated}
  %all-gather.1 = f32[16]{0} all-gather(%z), channel_id=2, replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, dimensions={0}
  ROOT %tuple = (s32[], bf16[4,8]{1,0}) tuple(%i, %y)
}

%whole (p: f32[16]) -> f32[16] {
  ROOT %p = f32[16]{0} parameter(0)
}

%truncated (p: f32[16]) -> f32[16] {
  ROOT %all-gather.4 = f32[16]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%unfinished (p: (s32[], bf16[4,8])) -> pred[] {
  %all-reduce.2 = f32[1]{0} all-reduce(%d), channel_id=3, replica_groups={}, to_apply=%add
  %constant.2 = s32[] constant(64)
  ROOT %some = pred[] and(%less, %more)
}

%part.1 (p: bf16[4]) -> bf16[16] {
  ROOT %all-gather.2 = bf16[16]{0} all-gather(%p), replica_groups=[2,4]<=[8], frontend_attributes={async_collective_name="w"}
}

%part.2 (p: bf16[4]) -> bf16[16] {
  ROOT %all-gather.3 = bf16[16]{0} all-gather(%p), replica_groups=[2,4]<=[8], frontend_attributes={async_collective_name="w"}
}

%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %all-reduce.3 = f32[16]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %fusion.1 = bf16[16]{0} fusion(%a), kind=kCustom, calls=%part.1
  %fusion.2 = bf16[16]{0} fusion(%a), kind=kCustom, calls=%part.2
  %fusion.3 = f32[4]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %custom-call.1 = bf16[4]{0} custom-call(%c), custom_call_target="tpu_custom_call"
  %collective-permute-start = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}
  %reduce-scatter = f32[4]{0} reduce-scatter(%c), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %while.2 = (s32[], bf16[4,8]{1,0}) while(%t), condition=%unfinished, body=%token
  ROOT %out = f32[2]{0} copy(%e)
}
"""


def test_collectives_count_as_often_as_they_run():
    program = hlo.Program(PROGRAM)
    assert program.open_loop().name == "while.2"
    step = program.of_step()
    # Three layers of 2 x 64 bytes x 1/2; 64 bytes of which 3/4 are others'; 2 x 4 bytes x 7/8 to see who is done.
    assert (step.count, step.received) == (5, 3 * 64 + 48 + 7)
    rest = program.traffic(without=program.open_loop())
    # Two parts of one all-gather, 3/4 of 32 bytes; a reduce-scatter of 64 as TPUs spell it; 20 bytes; 3 times 16.
    assert (rest.count, rest.received) == (4, 24 + 48 + 20 + 48)
    assert program.traffic().received == step.received + rest.received  # a loop of unknown length counts once
    assert program.kernels() == 1
    assert hlo.Program(PROGRAM.replace("custom-call(", "copy(")).kernels() == 0
    assert hlo.Program("HloModule x\n\nENTRY %main (p: f32[]) -> f32[] {\n}\n").of_step() == hlo.Traffic()


def test_bytes_by_hand():
    layers = 3 * (64 * 4 * 16 * 2 + 2 * 64 * 2 * 16 + 3 * 64 * 128)  # q and o, k and v, the MLP
    small = 3 * (4 * 16 + 2 * 2 * 16 + 2 * 64) + 64  # biases and norms: never split over fsdp
    embeddings = 2 * 512 * 64
    assert arithmetic(1, 1, 1).parameters() == layers + small + embeddings
    assert arithmetic(2, 1, 1).parameters() == layers + small + embeddings
    assert arithmetic(1, 4, 1).parameters() == (layers + embeddings) / 4 + small
    # A step reads whole layers, and its part of the unembedding; the norm after them is left out.
    assert arithmetic(1, 4, 1).gathered() == layers + small - 64 + 512 * 64 / 4
    # Keys and values, 3 layers, 2 heads of 16, bfloat16, of 8 prompts and 16 responses; split over prompts and heads.
    cache = 2 * 3 * 2 * 16 * 2 * 8 * (8 + 2 * 32)
    assert arithmetic(1, 1, 1).cache_bytes(32) == cache
    assert arithmetic(2, 2, 2).cache_bytes(32) == cache / 8
    assert arithmetic(1, 1, 4).cache_bytes(32) == cache  # 2 key-value heads do not divide over 4
    count = arithmetic(1, 4, 1)
    learner = 12 * count.parameters()
    expected = {
        "sampler": learner + 2 * count.parameters() + 2 * count.gathered() + cache / 4,
        "update": learner + 4 * count.parameters(),
    }
    assert count.least_memory() == expected


def test_operations_by_hand():
    layer = 2 * (64 * 4 * 16 * 2 + 2 * 64 * 2 * 16 + 3 * 64 * 128)  # of a token
    row = 3 * 40 * (layer + 4 * 4 * 16 * 40) + 32 * 2 * 64 * 512  # 40 columns, all attended to; 32 unembedded
    flops = arithmetic(1, 2, 1).flops()
    assert flops["scoring"] == 16 * row / 2
    assert flops["update"] == 4 * 8 * row / 2
    assert arithmetic(1, 2, 1, remat=False).flops()["update"] == 3 * 8 * row / 2
    prompt = 3 * 8 * (layer + 4 * 4 * 16 * 8) + 2 * 64 * 512
    response = 3 * 32 * (layer + 4 * 4 * 16 * 40) + 32 * 2 * 64 * 512
    assert flops["sampler"] == 8 * (prompt + 2 * response) / 2
    assert arithmetic(1, 1, 1, attention="splash").attended(2048) == (2048 + 512) / 2
    assert arithmetic(1, 1, 1).attended(2048) == 2048


def test_least_times_by_hand():
    bound = Bound(products=1.0, memory=3.0, links=2.0)
    assert (bound.overlapped, bound.serial) == (3.0, 5.0)
    count = arithmetic(1, 2, 1)
    step = count.decode_step(CHIP, received=1e6)
    logits = 8 * 16 * 512 / 2
    assert step.memory == pytest.approx((2 * count.gathered() + count.cache_bytes(32) + logits) / 1e9)
    layer = 2 * (64 * 4 * 16 * 2 + 2 * 64 * 2 * 16 + 3 * 64 * 128) + 4 * 4 * 16 * 40
    assert step.products == pytest.approx((8 * 3 * layer + 2 * 64 * 16 * 512 / 2) / 1e12)
    assert step.links == 1e6 / 1e8
    update = count.update(CHIP, received=5e6)
    assert update.products == count.flops()["update"] / 1e12
    part = count.parameters()
    assert update.memory == pytest.approx((2 * (4 * 2 * part * 2 + 8 * part) + 28 * part) / 1e9)
    half = arithmetic(1, 2, 1, work=dataclasses.replace(WORK, prompts_at_a_time=4))
    assert half.iteration(CHIP, 0.5, 3.0, 4.0) == 2 * 32 * 0.5 + 3.0 + 2 * 4.0


def test_meshes_are_ruled_out_by_arithmetic_and_ordered():
    assert search.meshes(4) == [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
    found = {}
    work = dataclasses.replace(WORK, micro_batch_size=0)
    for candidate in search.candidates(DECODER, CHIP, 16, work, "einsum", fewer=True):
        found[candidate.mesh] = candidate
    assert set(found) == set(search.meshes(16))
    assert found[1, 2, 8].reason == "4 heads do not divide over 8"
    assert "updates of 8 rows do not divide over 16 devices" in found[16, 1, 1].reason
    good = [candidate for candidate in found.values() if candidate.reason is None]
    assert list(found.values())[: len(good)] == good == sorted(good, key=lambda candidate: candidate.seconds)
    assert all(math.isfinite(c.seconds) and c.workload.micro_batch_size == c.mesh[0] * c.mesh[1] for c in good)
    one = search.judge(DECODER, CHIP, (4, 2, 1), dataclasses.replace(work, prompts=16, prompts_at_a_time=4), "einsum")
    assert one.reason == "4 prompts do not divide over 8 devices"


def test_fewer_prompts_are_sampled_together_where_all_do_not_fit():
    work = dataclasses.replace(WORK, micro_batch_size=0, response_length=512)
    count = arithmetic(1, 1, 1, work=work)
    memory = count.least_memory()["sampler"] - count.cache_bytes(512) / 2
    room = dataclasses.replace(CHIP, memory=memory / 2**30)
    (all_at_once,) = search.candidates(DECODER, room, 1, work, "einsum", fewer=False)
    assert all_at_once.reason.startswith("sampler: at least")
    (halves,) = search.candidates(DECODER, room, 1, work, "einsum", fewer=True)
    assert (halves.reason, halves.workload.prompts_at_a_time) == (None, 4)
