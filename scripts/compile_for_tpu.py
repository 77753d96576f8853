"""Compile a run's sampler, scoring and update for a TPU pod, on a machine without one.

    python scripts/compile_for_tpu.py --model=qwen2-1.5b --topology=v5e:4x4 --mesh=1,16,1

The programs are the project's own, compiled by the TPU compiler (libtpu) from shapes and shardings alone:
nothing is allocated and nothing runs. The answer is whether they compile for that pod, whether they fit into
the memory of its chips, and what they communicate. Weights and optimizer state are float32, computation and
the sampler's copy of the weights bfloat16, layers scanned and rematerialized.

Exit code 0: everything fits; 1: something does not; 2: a flag that cannot be.
"""

import collections
import dataclasses
import importlib.util
import math
import os
import re
import resource
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # the pod is described, not attached
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu warns that it found no pod
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies

from r2vpo_jax import config, learner, models, pretraining, sampler, sharding

_ARITHMETIC = pretraining.PretrainConfig()  # the shape of the checkpoint that ships
_QWEN2 = {"head_dim": 128, "tie_word_embeddings": False, "num_layers": 28, "max_position_embeddings": 131_072}
MODELS = {
    "qwen2-1.5b": _QWEN2  # DeepSeek-R1-Distill-Qwen-1.5B
    | {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_heads": 12, "num_kv_heads": 2},
    "qwen2-7b": _QWEN2  # DeepSeek-R1-Distill-Qwen-7B
    | {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_heads": 28, "num_kv_heads": 4},
    "arithmetic": {
        "vocab_size": _ARITHMETIC.vocab_size,
        "hidden_size": _ARITHMETIC.hidden_size,
        "intermediate_size": _ARITHMETIC.intermediate_size,
        "num_layers": _ARITHMETIC.num_layers,
        "num_heads": _ARITHMETIC.num_heads,
        "num_kv_heads": _ARITHMETIC.num_kv_heads,
        "head_dim": _ARITHMETIC.hidden_size // _ARITHMETIC.num_heads,
    },
}
GIB = 2**30
# Memory of a chip in GiB: what it has, and what the compiler allows a program ("available HBM" in its messages).
HBM = {"v5e": (16, 15.75), "v5p": (95.74, 95.74), "v6e": (32, 31.25)}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "qwen2-1.5b", f"shape of the decoder: {', '.join(MODELS)}")
flags.DEFINE_string("topology", "v5e:4x4", f"chip and its grid; chips: {', '.join(HBM)}")
flags.DEFINE_string("mesh", "1,-1,1", "devices along data,fsdp,tensor; one may be -1: all that is left")
flags.DEFINE_integer("prompts", 32, "prompts a rollout batch")
flags.DEFINE_integer("group_size", 8, "samples a prompt")
flags.DEFINE_integer("prompt_length", 512, "prompt tokens")
flags.DEFINE_integer("response_length", 1536, "response tokens")
flags.DEFINE_integer("num_minibatches", 4, "optimizer updates a rollout batch")
flags.DEFINE_integer("micro_batch_size", None, "rows at one time; default one for each of the data * fsdp devices")


class BadFlagError(ValueError):
    """A flag that cannot be; the message says which and why."""


@dataclasses.dataclass
class Report:
    """What the compiler said about one program. Bytes and FLOPs are those of one device."""

    seconds: float
    error: str | None = None
    arguments: int = 0
    outputs: int = 0  # those that do not take the place of a donated argument
    temporaries: int = 0
    code: int = 0
    counted_flops: float = 0.0
    collectives: dict = dataclasses.field(default_factory=dict)  # kind -> (how many, bytes of the largest)


def make_learner() -> learner.Learner:
    """The learner that the flags describe, on the devices of the described pod.

    Raises:
      BadFlagError: with the flag at fault.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise BadFlagError(f"the TPU compiler is not installed; pip install 'jax[tpu]=={jax.__version__}' brings it")
    if FLAGS.model not in MODELS:
        raise BadFlagError(f"--model={FLAGS.model} is unknown; one of {', '.join(MODELS)}")
    if FLAGS.topology.partition(":")[0] not in HBM:
        raise BadFlagError(f"--topology={FLAGS.topology}: the chip is not one of {', '.join(HBM)} (example: v5e:4x4)")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=FLAGS.topology).devices
    except Exception as error:  # the compiler's own error types
        raise BadFlagError(f"--topology={FLAGS.topology}: {str(error).splitlines()[0]}") from error
    try:
        mesh = sharding.make_mesh([int(n) for n in FLAGS.mesh.split(",")], devices)
    except ValueError as error:
        raise BadFlagError(f"--mesh={FLAGS.mesh}: {str(error).split(';')[0]}") from error
    rows = FLAGS.micro_batch_size or mesh.shape["data"] * mesh.shape["fsdp"]
    try:
        for name in ("group_size", "prompt_length", "response_length"):
            if FLAGS[name].value < 1:
                raise ValueError(f"--{name} must be at least 1, got {FLAGS[name].value}")
        run = config.Config(
            trainer=config.TrainerConfig(
                prompts_per_rollout=FLAGS.prompts, num_minibatches=FLAGS.num_minibatches, micro_batch_size=rows
            ),
            sampler=config.SamplerConfig(group_size=FLAGS.group_size),
        )
        decoder = models.Decoder(
            models.DecoderConfig(
                **MODELS[FLAGS.model], param_dtype=jnp.float32, compute_dtype=jnp.bfloat16, scan_layers=True, remat=True
            )
        )
        return learner.Learner(decoder, run, mesh)
    except ValueError as error:
        raise BadFlagError(str(error)) from error


def lower(run: learner.Learner):
    """Yields (name, lowered program) in the order of an iteration; arguments are shapes with shardings."""

    def place(x, where, dtype=None, shape=None):
        return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, sharding=where)

    def rows(x, size):
        shape = (size, *x.shape[1:])
        return place(x, sharding.batch_sharding(shape, run.mesh), shape=shape)

    state = jax.tree.map(place, run.abstract_state, run.state_shardings)
    weights = jax.tree.map(lambda x: place(x, x.sharding, run.model.config.compute_dtype), state.params)
    prompts = FLAGS.prompts
    number = rows(jax.ShapeDtypeStruct((prompts,), jnp.int32), prompts)
    tokens = rows(jax.ShapeDtypeStruct((prompts, FLAGS.prompt_length), jnp.int32), prompts)
    key = place(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(run.mesh))
    sampling = sampler.Sampling(
        group_size=FLAGS.group_size, max_response_length=FLAGS.response_length, eos_ids=(run.model.config.vocab_size - 1,)
    )
    lowered = sampler._sample.lower(run.model, weights, tokens, number, key, sampling, number, 0, run.mesh)
    yield "sampler", lowered
    # What the sampler makes is what the learner takes.
    size = prompts * FLAGS.group_size
    yield "scoring", run._score.lower(state.params, jax.tree.map(lambda x: rows(x, size), lowered.out_info))
    size //= FLAGS.num_minibatches
    yield "update", run.update.lower(state, jax.tree.map(lambda x: rows(x, size), lowered.out_info))


def collectives(hlo: str) -> dict:
    """Kind -> (how many, bytes of the largest result on one device). A loop's are counted once."""
    counts, largest, seen = collections.Counter(), collections.Counter(), set()
    for line in hlo.splitlines():
        found = re.match(rf"\s+(?:ROOT )?%?\S+ = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if not found:
            continue
        kind = found[2]
        chain = re.search(r'(?:chain_id|async_collective_name)="[^"]*"', line)  # one, cut up to overlap with compute
        if chain is None or (kind, chain[0]) not in seen:
            counts[kind] += 1
        seen.add((kind, chain and chain[0]))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", found[1]):
            size = ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(","))
            largest[kind] = max(largest[kind], size)
    return {kind: (counts[kind], largest[kind]) for kind in COLLECTIVES if counts[kind]}


def compile_program(lowered) -> Report:
    start = time.time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Report(time.time() - start, error=str(error).splitlines()[0])
    memory = compiled.memory_analysis()
    return Report(
        time.time() - start,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        counted_flops=compiled.cost_analysis()["flops"],
        collectives=collectives(compiled.as_text()),
    )


def device_bytes(tree, shardings, dtype=None) -> int:
    """Bytes of one device's part."""
    parts = jax.tree.map(
        lambda x, where: math.prod(where.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(parts))


def cache_bytes(run: learner.Learner) -> int:
    """Bytes of one device's part of the keys and values, when rows and heads are split as far as they divide."""
    sizes = FLAGS.prompts, FLAGS.prompt_length, FLAGS.group_size, FLAGS.response_length
    cache = jax.eval_shape(lambda: models.init_cache(run.model.config, *sizes))
    arrays = cache.prompt_key, cache.prompt_value, cache.response_key, cache.response_value

    def where(x):
        return sharding.named_sharding((None, "batch", *(None,) * (x.ndim - 4), "kv_heads", None), x.shape, run.mesh)

    return device_bytes(arrays, tuple(map(where, arrays)))


def matmul_flops(run: learner.Learner) -> dict:
    """FLOPs of a device's share, from shapes: matrix products, attention to all columns, what remat repeats."""
    c = run.model.config
    layer = 2 * c.hidden_size * (2 * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.intermediate_size)
    prompt, response, batch = FLAGS.prompt_length, FLAGS.response_length, FLAGS.prompts * FLAGS.group_size

    def forward(tokens, columns, unembedded):
        attention = 4 * c.num_heads * c.head_dim * columns
        return c.num_layers * tokens * (layer + attention) + unembedded * 2 * c.hidden_size * c.vocab_size

    row = forward(prompt + response, prompt + response, response)
    sampled = FLAGS.prompts * forward(prompt, prompt, 1) + batch * forward(response, prompt + response, response)
    update = 4 * row * batch // FLAGS.num_minibatches  # forward, again for the backward pass, and that costs two
    return {k: v / run.mesh.size for k, v in {"sampler": sampled, "scoring": batch * row, "update": update}.items()}


def main(argv):
    if argv[1:]:
        raise BadFlagError(f"unexpected argument {argv[1]!r}")
    run = make_learner()
    shape = " ".join(f"{name}={size}" for name, size in run.mesh.shape.items())
    rows = FLAGS.prompts * FLAGS.group_size // FLAGS.num_minibatches
    print(f"{FLAGS.model} on {FLAGS.topology}: {run.mesh.size} devices, mesh {shape}")
    print(f"{FLAGS.prompts} prompts x {FLAGS.group_size} samples, {FLAGS.prompt_length} + {FLAGS.response_length} tokens; ")
    print(f"updates of {rows} rows, {run.config.trainer.micro_batch_size} at one time", flush=True)
    reports = {name: compile_program(lowered) for name, lowered in lower(run)}

    chip = FLAGS.topology.partition(":")[0]
    memory, usable = HBM[chip]
    weights = device_bytes(run.abstract_params, run.param_shardings)
    optimizer = device_bytes(run.abstract_state.opt_state, run.state_shardings.opt_state)
    copy = device_bytes(run.abstract_params, run.param_shardings, run.model.config.compute_dtype)
    # What a program reads of the run's state; the rest of what the learner keeps lies beside it meanwhile.
    reads = {"sampler": (copy, 0), "scoring": (weights, 0), "update": (weights, optimizer)}
    beside = {"sampler": weights + optimizer, "scoring": optimizer, "update": 0}
    cache = {"sampler": cache_bytes(run)}
    flops = matmul_flops(run)

    def line(label, cell):
        print(f"  {label:44s}" + "".join(f"{cell(name, r) if r.error is None else '-':>16s}" for name, r in reports.items()))

    def gib(value):
        return f"{value / GIB:.2f}"

    print("\n" + " " * 46 + "".join(f"{name:>16s}" for name in reports))
    print("GiB a device")
    line("weights", lambda name, r: gib(reads[name][0]))
    line("optimizer state", lambda name, r: gib(reads[name][1]))
    line("batch, and padding of all arguments", lambda name, r: gib(r.arguments - sum(reads[name])))
    line("KV cache (part of the program's temporaries)", lambda name, r: gib(cache.get(name, 0)))
    line("other temporaries: activations, gradients, …", lambda name, r: gib(r.temporaries - cache.get(name, 0)))
    line("outputs (not in place), program", lambda name, r: gib(r.outputs + r.code))
    line("beside it: the learner's weights, optimizer", lambda name, r: gib(beside[name]))
    total = {name: r.arguments + r.outputs + r.temporaries + r.code + beside[name] for name, r in reports.items()}
    fits = {name: r.error is None and total[name] <= usable * GIB for name, r in reports.items()}
    line("total", lambda name, r: gib(total[name]))
    line(f"of {usable} usable ({chip}: {memory})", lambda name, r: "fits" if fits[name] else "DOES NOT FIT")
    print("TFLOP a device")
    line("matrix products, from shapes", lambda name, r: f"{flops[name] / 1e12:.1f}")
    line("compiler's count, each loop body once", lambda name, r: f"{r.counted_flops / 1e12:.2f}")
    print("collectives: how many (largest result on a device, MB); each loop body once")
    for kind in COLLECTIVES:
        if any(kind in r.collectives for r in reports.values()):
            line(kind, lambda name, r: "{} ({:.1f})".format(*r.collectives.get(kind, (0, 0))))  # noqa: B023
    print("compilation")
    line("seconds", lambda name, r: f"{r.seconds:.0f}")
    print(f"  peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    for name, r in reports.items():
        if not fits[name]:
            print(f"{name} does not fit: {r.error or f'{gib(total[name])} GiB of {usable} GiB'}", file=sys.stderr)
    return 0 if all(fits.values()) else 1


def parse_flags(argv):
    try:
        return FLAGS(argv)
    except flags.Error as error:
        raise BadFlagError(error) from error


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except BadFlagError as error:
        print(f"compile_for_tpu: {error}", file=sys.stderr)
        sys.exit(2)
