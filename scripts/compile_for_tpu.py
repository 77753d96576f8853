r"""Compile a run's sampler, scoring and update for a TPU slice, on a machine without one; or look for the best mesh.

    python scripts/compile_for_tpu.py --model=qwen2-1.5b --topology=v5e:4x4 --mesh=1,16,1
    python scripts/compile_for_tpu.py --model=qwen3-8b --topology=v5p:2x2x4 \
        --config=experiments/configs/math_reasoning.py:qwen3_8b,grpo
    python scripts/compile_for_tpu.py --model=qwen2-7b --topology=v5p-16 --search
    python scripts/compile_for_tpu.py --rows --model=qwen2-1.5b,qwen2-7b --topology=v5e-16,v5p-16 --lengths=512+1536,1024+15360

With --config the sizes, and how the model is computed, are those of a run's configuration. The programs are the project's
own, compiled by the TPU compiler (libtpu) from shapes and shardings alone: nothing is allocated and nothing runs. The
answer is whether they compile for that slice, whether they fit into the memory of its chips, what they communicate, and how
long they take at least. Weights and optimizer state are float32; without --config, computation and the sampler's copy of the
weights are bfloat16, and layers are scanned and rematerialized. With --lora_rank adapters are trained, and the weights are frozen in
bfloat16.

`sampler` decodes in one loop; `segment` and `regroup` are the largest programs of decoding in segments. v5p slices are called
by their TensorCores: v5p-16 has 8 chips. --search rules meshes out by arithmetic, compiles the most promising of the others,
and ranks them by the time of an iteration; without --prompts_at_a_time it samples as many prompts together as fit. --rows
prints the best mesh of each model, slice and length as a row of a Markdown table.

Exit code 0: everything fits (--search, --rows: something does); 1: not so; 2: a flag that cannot be.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # wherever it is started from
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # configuration files import each other

os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is described, not attached
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is taken, so several may compile at a time
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu warns that it finds no pod
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags
from planner import hlo, programs, report, search, shapes
from planner.arithmetic import Arithmetic, Workload
from planner.programs import PROGRAMS
from planner.topologies import CHIPS, chip_of, grid_of

from r2vpo_jax import config, models, sharding
from r2vpo_jax.config.run import ATTENTION
from r2vpo_jax.config.sampling import SEGMENT_LENGTH
from r2vpo_jax.models import attention
from r2vpo_jax.training import learner

jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices are written, never read

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "configuration of a run of task text; sizes come from it")
flags.DEFINE_string(
    "model",
    "qwen2-1.5b",
    f"shape of the decoder: {', '.join([*shapes.MODELS, *shapes.SHIPPED])}, or a directory with a config.json",
)
flags.DEFINE_string("topology", "v5e:4x4", f"a slice (v5p-16), or chip and grid; chips: {', '.join(CHIPS)}")
flags.DEFINE_string("mesh", "1,-1,1", "devices along data,fsdp,tensor; one may be -1: all that is left")
flags.DEFINE_enum("attention", None, ATTENTION, "as model.attention of a run (default: that of --config, or auto)")
flags.DEFINE_integer("lora_rank", None, "as model.lora.rank of a run (default: that of --config, or 0)", lower_bound=0)
flags.DEFINE_integer("prompts", 32, "prompts a rollout batch", lower_bound=1)
flags.DEFINE_integer("prompts_at_a_time", None, "prompts sampled at one time (default: all)", lower_bound=1)
flags.DEFINE_integer("group_size", 8, "samples a prompt", lower_bound=2)
flags.DEFINE_integer("prompt_length", 512, "prompt tokens", lower_bound=1)
flags.DEFINE_integer("response_length", 1536, "response tokens", lower_bound=1)
flags.DEFINE_integer("num_minibatches", 4, "optimizer updates a rollout batch", lower_bound=1)
flags.DEFINE_integer("micro_batch_size", None, "rows at one time; default one a device of data * fsdp", lower_bound=1)
flags.DEFINE_bool("search", False, "try all meshes and rank them, in place of --mesh")
flags.DEFINE_integer(
    "compile", 3, "with --search, meshes that are compiled; 0: all that arithmetic leaves", lower_bound=0
)
flags.DEFINE_bool("rows", False, "Markdown, a row for each of --model, --topology and --lengths, which are then lists")
flags.DEFINE_list("lengths", [], "with --rows, prompt + response tokens: 512+1536,1024+15360")


class BadFlagError(ValueError):
    """A flag that cannot be; the message says which and why."""


@functools.cache
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


def workload(**changes) -> Workload:
    """The sizes that the flags give; a micro-batch of 0 rows is one row a device of data * fsdp."""
    base = take_sizes_from_config()
    sizes = {
        "prompts": FLAGS.prompts,
        "prompts_at_a_time": min(FLAGS.prompts_at_a_time or FLAGS.prompts, FLAGS.prompts),
        "group_size": FLAGS.group_size,
        "prompt_length": FLAGS.prompt_length,
        "response_length": FLAGS.response_length,
        "num_minibatches": FLAGS.num_minibatches,
        "micro_batch_size": FLAGS.micro_batch_size or 0,
        "segment_length": base.sampler.segment_length if base else SEGMENT_LENGTH,
    }
    return Workload(**sizes | changes)


def decoder_config(model: str) -> models.DecoderConfig:
    """The shape of --model, computed as the flags say."""
    base = take_sizes_from_config()
    how = {"compute_dtype": jnp.bfloat16, "scan_layers": True, "remat": True}
    if base is not None:
        how = {name: getattr(base.model, name) for name in (*how, "param_dtype", "attention", "attention_block_size")}
        how["lora"] = base.model.lora
    if FLAGS.lora_rank is not None:
        how["lora"] = config.LoraConfig(rank=FLAGS.lora_rank)
    if FLAGS.attention is not None:
        how["attention"] = FLAGS.attention
    try:
        return shapes.decoder_config(model, how)
    except ValueError as error:
        raise BadFlagError(f"--model={error}" if "is unknown" in str(error) else f"--model: {error}") from error


def devices_of(topology: str) -> list:
    """The chips of the described slice."""
    if importlib.util.find_spec("libtpu") is None:
        raise BadFlagError("the TPU compiler (libtpu) is not installed: pip install -e '.[libtpu]'")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=grid_of(topology)).devices
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise BadFlagError(f"--topology={topology}: {str(error).splitlines()[0]}") from error


def make_learner(decoder: models.DecoderConfig, mesh, work: Workload) -> learner.Learner:
    """The learner that the flags describe, on the devices of the described slice."""
    base = take_sizes_from_config() or config.Config()
    sizes = {"prompts_per_rollout": work.prompts, "num_minibatches": work.num_minibatches}
    try:
        trainer = dataclasses.replace(
            base.trainer, **sizes, micro_batch_size=work.micro_batch_size, allow_single_update=True
        )
        rollouts = dataclasses.replace(base.sampler, group_size=work.group_size)
        run = dataclasses.replace(base, trainer=trainer, sampler=rollouts)
        return learner.Learner(models.Decoder(decoder), run, mesh)
    except ValueError as error:
        raise BadFlagError(str(error)) from error


def make_mesh(devices):
    """The mesh of --mesh."""
    try:
        return sharding.make_mesh([int(size) for size in FLAGS.mesh.split(",")], devices)
    except ValueError as error:
        raise BadFlagError(f"--mesh={FLAGS.mesh}: {str(error).partition(';')[0]}") from error


def lower(run: learner.Learner, work: Workload | None = None, names=PROGRAMS):
    """Yields (name, lowered program) in the order of an iteration; the arguments are shapes with shardings."""
    work = work or workload(micro_batch_size=run.settings.micro_batch_size)
    for name in (name for name in PROGRAMS if name in names):
        yield name, programs.LOWER[name](run, work)


def collectives(program: str) -> dict:
    """Kind -> (how many, bytes of the largest result on a device)."""
    return hlo.Program(program).collectives()


def attention_way(decoder: models.DecoderConfig, work: Workload, device) -> str:
    """How whole rows are attended to."""
    try:
        return attention.way(decoder, work.prompt_length + work.response_length, device)
    except ValueError as error:
        raise BadFlagError(str(error)) from error


def compile_mesh(decoder, mesh, work: Workload, chip, names=PROGRAMS, known=()) -> report.Plan:
    """Programs for one mesh, two at a time; of those in `known` the reports are there."""
    run = make_learner(decoder, mesh, work)
    count = Arithmetic(decoder, mesh, work, attention_way(decoder, work, mesh.devices.flat[0]))
    found = dict(known)
    lowered = dict(lower(run, work, set(names) - set(found)))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found |= zip(lowered, pool.map(programs.compile_program, lowered.values()), strict=True)
    return report.Plan(run, count, chip, {name: found[name] for name in PROGRAMS if name in found})


def compile_candidate(decoder, mesh, work: Workload, chip, fewer: bool) -> report.Plan:
    """What decides whether a mesh fits; with `fewer`, half as many prompts sampled together until it does."""
    known = {}
    while True:
        # Rows that move need most memory, and are compiled fastest.
        plan = compile_mesh(decoder, mesh, work, chip, ("regroup",), known)
        half = work.prompts_at_a_time // 2
        may_halve = fewer and half and not half % (mesh.shape["data"] * mesh.shape["fsdp"])
        if plan.sampling_fits or not may_halve:
            plan = compile_mesh(decoder, mesh, work, chip, ("segment", "update"), plan.reports)
        if plan.sampling_fits or not may_halve:
            return plan
        work = dataclasses.replace(work, prompts_at_a_time=half)
        known = {name: found for name, found in plan.reports.items() if name == "update"}


def find_mesh(model: str, topology: str, work: Workload, most: int) -> tuple[list[search.Candidate], list[report.Plan]]:
    """Candidates, the most promising first, and plans of those compiled, the best first, until `most` fit (0: all)."""
    decoder, devices, chip = decoder_config(model), devices_of(topology), chip_of(topology)
    way, fewer = attention_way(decoder, work, devices[0]), not FLAGS["prompts_at_a_time"].present
    found = search.candidates(decoder, chip, len(devices), work, way, fewer=fewer)
    plans = []
    for candidate in found:
        if candidate.reason or (most and sum(plan.all_fit for plan in plans) == most):
            break
        mesh = sharding.make_mesh(candidate.mesh, devices)
        plans.append(compile_candidate(decoder, mesh, candidate.workload, chip, fewer))
    plans.sort(key=lambda plan: (not plan.all_fit, plan.seconds() if plan.all_fit else 0))
    return found, plans


def one_mesh() -> bool:
    """--mesh alone: whether all programs fit."""
    decoder, devices = decoder_config(FLAGS.model), devices_of(FLAGS.topology)
    mesh = make_mesh(devices)
    work = workload()
    parallel = mesh.shape["data"] * mesh.shape["fsdp"]
    work = dataclasses.replace(work, micro_batch_size=work.micro_batch_size or parallel)
    make_learner(decoder, mesh, work)  # refuses before anything is printed
    print_sizes(FLAGS.model, FLAGS.topology, work, mesh)
    if work.prompts_at_a_time % parallel:
        print("note: the number of prompts does not divide over data * fsdp, so that some devices sample the same rows")
    plan = compile_mesh(decoder, mesh, work, chip_of(FLAGS.topology))
    report.print_plan(plan, grid_of(FLAGS.topology).partition(":")[0])
    return plan.all_fit


def print_sizes(model: str, topology: str, work: Workload, mesh) -> None:
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(f"{model} on {topology}, {mesh.size} devices: {sizes}")
    tokens = f"{work.prompt_length} + {work.response_length} tokens"
    together = f"{work.prompts_at_a_time} prompts at one time"
    print(f"{work.prompts} prompts x {work.group_size} samples of {tokens}, {together}")
    print(f"updates of {work.minibatch} rows, {work.micro_batch_size} at one time", flush=True)


def searched() -> bool:
    """--search: whether a mesh fits."""
    start = time.time(), time.process_time()
    found, plans = find_mesh(FLAGS.model, FLAGS.topology, workload(), FLAGS.compile)
    report.print_search(found, plans)
    fits = bool(plans) and plans[0].all_fit
    if fits:
        best = plans[0]
        work, mesh = best.count.workload, best.run.mesh
        print("\nthe best:")
        print_sizes(FLAGS.model, FLAGS.topology, work, mesh)
        best = compile_mesh(decoder_config(FLAGS.model), mesh, work, best.chip, known=best.reports)
        report.print_plan(best, grid_of(FLAGS.topology).partition(":")[0])
        fits = best.all_fit
    print(f"  search: {time.time() - start[0]:.0f} s, {time.process_time() - start[1]:.0f} s of processors")
    return fits


def rows() -> bool:
    """--rows: whether something fits everywhere."""
    lengths = FLAGS.lengths or [f"{FLAGS.prompt_length}+{FLAGS.response_length}"]
    try:
        sizes = [tuple(int(number) for number in text.split("+")) for text in lengths]
        works = [workload(prompt_length=prompt, response_length=response) for prompt, response in sizes]
    except ValueError as error:
        raise BadFlagError(f"--lengths={','.join(lengths)}: prompt + response tokens, such as 512+1536") from error
    good = True
    print(report.ROW_TITLES, flush=True)
    for model, topology, work in itertools.product(FLAGS.model.split(","), FLAGS.topology.split(","), works):
        found, plans = find_mesh(model, topology, work, 1)
        row, fits = report.row(model, topology, work, found, plans)
        print(row, flush=True)
        good &= fits
    return good


def main(argv):
    if argv[1:]:
        raise BadFlagError(f"unexpected argument {argv[1]!r}")
    good = rows() if FLAGS.rows else searched() if FLAGS.search else one_mesh()
    return 0 if good else 1


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
