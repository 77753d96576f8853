r"""Compile a run's sampler, scoring and update for a TPU pod, on a machine without one.

    python scripts/compile_for_tpu.py --model=qwen2-1.5b --topology=v5e:4x4 --mesh=1,16,1
    python scripts/compile_for_tpu.py --model=qwen3-8b --topology=v5p:2x2x4 \
        --config=experiments/configs/math_reasoning.py:qwen3_8b,grpo

With --config the sizes, and how the model is computed, are those of a run's configuration. The programs are the project's
own, compiled by the TPU compiler (libtpu) from shapes and shardings alone: nothing is allocated and nothing runs. The answer is whether they compile for that pod, whether they fit into
the memory of its chips, and what they communicate. Weights and optimizer state are float32; without --config, computation
and the sampler's copy of the weights are bfloat16, and layers are scanned and rematerialized.

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configuration files import each other

os.environ["JAX_PLATFORMS"] = "cpu"  # the pod is described, not attached
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is taken, so several may compile at a time
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu warns that it finds no pod
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

from r2vpo_jax import config, models, sampler, sharding
from r2vpo_jax.config.run import ATTENTION
from r2vpo_jax.models.base import find_directory
from r2vpo_jax.training import learner

QWEN2 = {"head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 131_072}
QWEN3 = QWEN2 | {"qkv_bias": False, "qk_norm": True, "family": "qwen3"}
PANGU = QWEN2 | {"o_bias": True, "family": "pangu"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
MODELS = {
    # The shapes of DeepSeek-R1-Distill-Qwen-1.5B and -7B.
    "qwen2-1.5b": QWEN2 | dict(zip(SIZES, (151_936, 1536, 8960, 28, 12, 2), strict=True)),
    "qwen2-7b": QWEN2 | dict(zip(SIZES, (152_064, 3584, 18_944, 28, 28, 4), strict=True)),
    # From the models' cards; of openPangu, which states no width of the MLP, 4 and 3.125 times the hidden size.
    "qwen3-0.6b": QWEN3
    | dict(zip(SIZES, (151_936, 1024, 3072, 28, 16, 8), strict=True))
    | {"tie_word_embeddings": True},
    "qwen3-1.7b": QWEN3
    | dict(zip(SIZES, (151_936, 2048, 6144, 28, 16, 8), strict=True))
    | {"tie_word_embeddings": True},
    "qwen3-4b": QWEN3 | dict(zip(SIZES, (151_936, 2560, 9728, 36, 32, 8), strict=True)) | {"tie_word_embeddings": True},
    "qwen3-8b": QWEN3 | dict(zip(SIZES, (151_936, 4096, 12_288, 36, 32, 8), strict=True)),
    "openpangu-1b": PANGU | dict(zip(SIZES, (153_376, 1536, 6144, 26, 12, 6), strict=True)),
    "openpangu-7b": PANGU | dict(zip(SIZES, (153_376, 4096, 12_800, 34, 32, 8), strict=True)),
}
SHIPPED = {"arithmetic": "arithmetic_base"}  # --model -> the checkpoint whose config.json has the shape
# GiB that the compiler lets a program use ("available HBM" in its messages), of 16, 95 and 32 on the chip.
HBM = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2}

jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices are written, never read

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "configuration of a run of task text; sizes come from it")
flags.DEFINE_string(
    "model", "qwen2-1.5b", f"shape of the decoder: {', '.join([*MODELS, *SHIPPED])}, or a directory with a config.json"
)
flags.DEFINE_string("topology", "v5e:4x4", f"chip and grid; chips: {', '.join(HBM)}")
flags.DEFINE_string("mesh", "1,-1,1", "devices along data,fsdp,tensor; one may be -1: all that is left")
flags.DEFINE_enum("attention", None, ATTENTION, "as model.attention of a run (default: that of --config, or auto)")
flags.DEFINE_integer("prompts", 32, "prompts a rollout batch", lower_bound=1)
flags.DEFINE_integer("prompts_at_a_time", None, "prompts sampled at one time (default: all)", lower_bound=1)
flags.DEFINE_integer("group_size", 8, "samples a prompt", lower_bound=2)
flags.DEFINE_integer("prompt_length", 512, "prompt tokens", lower_bound=1)
flags.DEFINE_integer("response_length", 1536, "response tokens", lower_bound=1)
flags.DEFINE_integer("num_minibatches", 4, "optimizer updates a rollout batch", lower_bound=1)
flags.DEFINE_integer("micro_batch_size", None, "rows at one time; default one a device of data * fsdp", lower_bound=1)


class BadFlagError(ValueError):
    """A flag that cannot be; the message says which and why."""


def take_sizes_from_config() -> config.Config | None:
    """The configuration behind --config, if there is one; its sizes become those of the flags that were not given."""
    if CONFIG.value is None:
        return None
    try:
        run = config.from_flags(CONFIG.value)
    except (OSError, TypeError, ValueError) as error:
        raise BadFlagError(f"--config: {' '.join(str(error).split())}") from error
    if run.task.name != "text":
        raise BadFlagError("--config: sizes can be taken from runs of task.name=text only; give them as flags")
    sizes = {
        "prompts": run.trainer.prompts_per_rollout,
        "prompts_at_a_time": run.sampler.batch_size // run.sampler.group_size,
        "group_size": run.sampler.group_size,
        "prompt_length": run.task.prompt.max_length,
        "response_length": run.task.text.max_response_length,
        "num_minibatches": run.trainer.num_minibatches,
        "micro_batch_size": run.trainer.micro_batch_size,
        "mesh": f"{run.mesh.data},{run.mesh.fsdp},{run.mesh.tensor}",
    }
    for name, value in sizes.items():
        if not FLAGS[name].present:
            FLAGS[name].value = value
    return run


def decoder_config(how: dict) -> models.DecoderConfig:
    """The shape that --model names."""
    if FLAGS.model in MODELS:
        return models.DecoderConfig(**MODELS[FLAGS.model], **how)
    directory, _ = find_directory(SHIPPED.get(FLAGS.model, FLAGS.model))
    if not directory.is_dir():
        known = ", ".join([*MODELS, *SHIPPED])
        raise BadFlagError(f"--model={FLAGS.model} is unknown; one of {known}, or a directory")
    try:
        return dataclasses.replace(models.read_config(directory), **how)
    except (OSError, ValueError) as error:
        raise BadFlagError(f"--model: {error}") from error


def make_learner() -> learner.Learner:
    """The learner that the flags describe, on the devices of the described pod."""
    base = take_sizes_from_config() or config.Config()
    if importlib.util.find_spec("libtpu") is None:
        raise BadFlagError("the TPU compiler (libtpu) is not installed: pip install -e '.[libtpu]'")
    if FLAGS.topology.partition(":")[0] not in HBM:
        raise BadFlagError(f"--topology={FLAGS.topology}: the chip is not one of {', '.join(HBM)} (example: v5e:4x4)")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=FLAGS.topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise BadFlagError(f"--topology={FLAGS.topology}: {str(error).splitlines()[0]}") from error
    try:
        mesh = sharding.make_mesh([int(size) for size in FLAGS.mesh.split(",")], devices)
    except ValueError as error:
        raise BadFlagError(f"--mesh={FLAGS.mesh}: {str(error).partition(';')[0]}") from error
    sizes = {
        "prompts_per_rollout": FLAGS.prompts,
        "num_minibatches": FLAGS.num_minibatches,
        "micro_batch_size": FLAGS.micro_batch_size or mesh.shape["data"] * mesh.shape["fsdp"],
    }
    how = {"compute_dtype": jnp.bfloat16, "scan_layers": True, "remat": True}
    if CONFIG.value is not None:
        how = {name: getattr(base.model, name) for name in (*how, "param_dtype", "attention", "attention_block_size")}
    if FLAGS.attention is not None:
        how["attention"] = FLAGS.attention
    model = models.Decoder(decoder_config(how))
    try:
        trainer = dataclasses.replace(base.trainer, **sizes, allow_single_update=True)
        rollouts = dataclasses.replace(base.sampler, group_size=FLAGS.group_size)
        return learner.Learner(model, dataclasses.replace(base, trainer=trainer, sampler=rollouts), mesh)
    except ValueError as error:
        raise BadFlagError(str(error)) from error


def prompts_at_a_time() -> int:
    """Prompts of one call of the sampler."""
    return min(FLAGS.prompts_at_a_time or FLAGS.prompts, FLAGS.prompts)


def lower(run: learner.Learner):
    """Yields (name, lowered program) in the order of an iteration; the arguments are shapes with shardings."""

    def abstract(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def rows(x, size):
        shape = (size, *x.shape[1:])
        return abstract(shape, x.dtype, sharding.batch_sharding(shape, run.mesh))

    state = jax.tree.map(lambda x, where: abstract(x.shape, x.dtype, where), run.abstract_state, run.state_shardings)
    weights = jax.tree.map(lambda x: abstract(x.shape, run.model.config.compute_dtype, x.sharding), state.params)
    key = abstract((), jax.random.key(0).dtype, sharding.replicated(run.mesh))
    prompts = prompts_at_a_time()
    number = rows(jnp.zeros(1, jnp.int32), prompts)
    tokens = rows(jnp.zeros((1, FLAGS.prompt_length), jnp.int32), prompts)
    sampling = sampler.Sampling(group_size=FLAGS.group_size, max_response_length=FLAGS.response_length, eos_ids=(0,))

    def sample(weights, tokens, lengths, key, sampling, problem_ids):
        with sharding.activate(run.mesh):
            return sampler.sample(run.model, weights, tokens, lengths, key, sampling, problem_ids=problem_ids)

    lowered = jax.jit(sample).lower(weights, tokens, number, key, sampling, number)
    yield "sampler", lowered
    rollout, size = lowered.out_info, FLAGS.prompts * FLAGS.group_size  # what it makes is what the learner takes
    yield "scoring", run.score.lower(state.params, jax.tree.map(lambda x: rows(x, size), rollout))
    size //= FLAGS.num_minibatches
    yield "update", run.update.lower(state, jax.tree.map(lambda x: rows(x, size), rollout))


@dataclasses.dataclass
class Report:
    """What the compiler says about one program: bytes and FLOPs of one device."""

    seconds: float
    error: str | None = None
    arguments: int = 0
    temporaries: int = 0
    rest: int = 0  # outputs that do not take the place of an argument, and the program itself
    flops: float = 0.0
    collectives: dict = dataclasses.field(default_factory=dict)  # kind -> (how many, bytes of the largest)


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
        temporaries=memory.temp_size_in_bytes,
        rest=memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        flops=compiled.cost_analysis()["flops"],
        collectives=collectives(compiled.as_text()),
    )


def collectives(program: str) -> dict:
    """Kind -> (how many, bytes of the largest result on a device)."""
    counts, largest, seen, function = collections.Counter(), collections.Counter(), set(), ""
    for line in program.splitlines():
        if line.startswith("%"):
            function = line
        found = re.match(rf"\s+(?:ROOT )?%?\S+ = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if found is None:
            continue
        # On TPUs a reduce-scatter is spelled as a function of its own around an all-reduce.
        kind = "reduce-scatter" if function.startswith("%all-reduce-scatter") else found[2]
        # A collective that is cut up to run beside computation carries the same name in each part.
        part = re.search(r'(?:chain_id|async_collective_name)="[^"]*"', line)
        counts[kind] += part is None or part[0] not in seen
        seen.add(part and part[0])
        for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", found[1]):
            largest[kind] = max(largest[kind], ITEM_BYTES.get(dtype, 4) * math.prod(map(int, shape.split(","))))
    return {kind: (counts[kind], largest[kind]) for kind in counts}


def device_bytes(tree, shardings, dtype=None) -> int:
    """Bytes of one device's part."""

    def part(x, where):
        return math.prod(where.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(part, tree, shardings)))


def cache_bytes(run: learner.Learner) -> int:
    """Bytes of one device's part of the keys and values, when split as the rules say."""
    c, sizes = run.model.config, (prompts_at_a_time(), run.model.config.num_kv_heads)
    rows, heads = sharding.named_sharding(("batch", "kv_heads"), sizes, run.mesh).shard_shape(sizes)
    columns = FLAGS.prompt_length + FLAGS.group_size * FLAGS.response_length
    return 2 * c.num_layers * rows * columns * heads * c.head_dim * jnp.dtype(c.compute_dtype).itemsize


def matmul_flops(run: learner.Learner) -> dict:
    """FLOPs of a device's share of the matrix products: attention to all columns, recomputation included."""
    c = run.model.config
    layer = 2 * c.hidden_size * (2 * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.intermediate_size)
    prompt, response, batch = FLAGS.prompt_length, FLAGS.response_length, FLAGS.prompts * FLAGS.group_size

    def forward(tokens, columns, unembedded):
        attention = 4 * c.num_heads * c.head_dim * columns
        return c.num_layers * tokens * (layer + attention) + unembedded * 2 * c.hidden_size * c.vocab_size

    row = forward(prompt + response, prompt + response, response)
    group = FLAGS.group_size * forward(response, prompt + response, response)
    sampled = prompts_at_a_time() * (forward(prompt, prompt, 1) + group)
    update = 4 * row * batch // FLAGS.num_minibatches  # forward twice, and backward costs two
    return {k: v / run.mesh.size for k, v in {"sampler": sampled, "scoring": batch * row, "update": update}.items()}


def main(argv):
    if argv[1:]:
        raise BadFlagError(f"unexpected argument {argv[1]!r}")
    run, chip = make_learner(), FLAGS.topology.partition(":")[0]
    batch = FLAGS.prompts * FLAGS.group_size
    mesh = ", ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    lengths = f"{FLAGS.prompt_length} + {FLAGS.response_length} tokens"
    print(f"{FLAGS.model} on {FLAGS.topology}, {run.mesh.size} devices: {mesh}")
    print(
        f"{FLAGS.prompts} prompts x {FLAGS.group_size} samples of {lengths}, {prompts_at_a_time()} prompts at one time"
    )
    print(f"updates of {batch // FLAGS.num_minibatches} rows, {run.settings.micro_batch_size} at one time")
    if prompts_at_a_time() % (run.mesh.shape["data"] * run.mesh.shape["fsdp"]):
        print("note: the number of prompts does not divide over data * fsdp, so that some devices sample the same rows")
    reports = {name: compile_program(lowered) for name, lowered in lower(run)}

    def show(label, cell):
        cells = [cell(name, report) if report.error is None else "-" for name, report in reports.items()]
        print(f"  {label:46s}" + "".join(f"{text:>15s}" for text in cells))

    def mib(size):
        return f"{size / 2**20:,.1f}"

    weights = device_bytes(run.abstract_params, run.param_shardings)
    copy = device_bytes(run.abstract_params, run.param_shardings, run.model.config.compute_dtype)
    optimizer = device_bytes(run.abstract_state.opt_state, run.state_shardings.opt_state)
    cache, flops = cache_bytes(run), matmul_flops(run)
    reads = {"sampler": (copy, 0), "scoring": (weights, 0), "update": (weights, optimizer)}
    # What the program does not read stays on the device all the same.
    beside = {"sampler": weights + optimizer, "scoring": optimizer, "update": 0}
    total = {name: r.arguments + r.temporaries + r.rest + beside[name] for name, r in reports.items()}
    fits = {name: r.error is None and total[name] <= HBM[chip] * 2**30 for name, r in reports.items()}

    print(f"\n{'':48s}" + "".join(f"{name:>15s}" for name in reports) + "\nMiB a device")
    show("parameters", lambda name, _: mib(reads[name][0]))
    show("optimizer state", lambda name, _: mib(reads[name][1]))
    show("batch, and padding of the arguments", lambda name, r: mib(r.arguments - sum(reads[name])))
    show("temporaries: activations, gradients, …", lambda _, r: mib(r.temporaries))
    show("  of which KV cache, from its shape: at most", lambda name, _: mib(cache if name == "sampler" else 0))
    show("outputs, program", lambda _, r: mib(r.rest))
    show("learner's weights and optimizer beside it", lambda name, _: mib(beside[name]))
    show("total", lambda name, _: mib(total[name]))
    show(f"of {HBM[chip] * 1024:,.0f} on {chip}", lambda name, _: "fits" if fits[name] else "DOES NOT FIT")
    print("TFLOP a device")
    show("matrix products, from shapes", lambda name, _: f"{flops[name] / 1e12:,.2f}")
    show("compiler's count (body of a loop once)", lambda _, r: f"{r.flops / 1e12:,.2f}")
    print("collectives: how many (largest result, MiB); body of a loop once")
    for kind in COLLECTIVES:
        found = {name: r.collectives.get(kind, (0, 0)) for name, r in reports.items()}
        show(kind, lambda name, _, found=found: f"{found[name][0]} ({mib(found[name][1])})")
    print("compilation")
    show("seconds", lambda _, r: f"{r.seconds:.0f}")
    print(f"  peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    for name in (name for name, good in fits.items() if not good):
        print(f"{name} does not fit: {reports[name].error or mib(total[name]) + ' MiB a device'}")
    return 0 if all(fits.values()) else 1


def parse_flags(argv):
    try:
        return FLAGS(argv)
    except (flags.Error, ImportError, OSError, ValueError) as error:
        raise BadFlagError(str(error).strip().splitlines()[-1]) from error


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except BadFlagError as error:
        print(f"compile_for_tpu: {error}", file=sys.stderr)
        sys.exit(2)
