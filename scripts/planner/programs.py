"""A run's programs: lowered from shapes and shardings alone, compiled, and what the compiler says of them."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from planner.arithmetic import Workload
from planner.hlo import Program, Traffic
from r2vpo_jax import sampler, sharding
from r2vpo_jax.sampler import decoding, segments
from r2vpo_jax.training.learner import Learner


def _abstract(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _rows(x, size, mesh):
    shape = (size, *x.shape[1:])
    return _abstract(shape, x.dtype, sharding.batch_sharding(shape, mesh))


def _state(run: Learner):
    return jax.tree.map(lambda x, where: _abstract(x.shape, x.dtype, where), run.abstract_state, run.state_shardings)


def _weights(run: Learner):
    """The sampler's copy."""
    return jax.tree.map(
        lambda x, where: _abstract(x.shape, run.model.config.compute_dtype, where),
        run.abstract_params,
        run.param_shardings,
    )


def _sampling(work: Workload) -> sampler.Sampling:
    return sampler.Sampling(group_size=work.group_size, max_response_length=work.response_length, eos_ids=(0,))


def lower_sampler(run: Learner, work: Workload):
    """Responses to the prompts of one time, from prefill to the last token, in one loop."""
    prompts = work.prompts_at_a_time
    number = _rows(jnp.zeros(1, jnp.int32), prompts, run.mesh)
    tokens = _rows(jnp.zeros((1, work.prompt_length), jnp.int32), prompts, run.mesh)
    key = _abstract((), jax.random.key(0).dtype, sharding.replicated(run.mesh))

    def sample(weights, tokens, lengths, key, sampling, problem_ids):
        with sharding.activate(run.mesh):
            return sampler.sample(run.model, weights, tokens, lengths, key, sampling, problem_ids=problem_ids)

    return jax.jit(sample).lower(_weights(run), tokens, number, key, _sampling(work), number)


def _decoding(run: Learner, work: Workload):
    """The state of all rows at one time with the longest cache."""
    config, shape = run.model.config, (work.prompts_at_a_time, work.group_size)

    def make():
        keys = jax.random.split(jax.random.key(0), shape)
        prompts, lengths = jnp.zeros((shape[0], work.prompt_length), jnp.int32), jnp.ones(shape[0], jnp.int32)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, config.compute_dtype), run.abstract_params)
        return decoding.prefill(run.model, params, prompts, lengths, keys, _sampling(work), work.columns[-1])

    with sharding.activate(run.mesh):
        state = jax.eval_shape(make)
    return jax.tree.map(
        lambda axes, x: _abstract(x.shape, x.dtype, sharding.named_sharding(axes, x.shape, run.mesh)),
        decoding.state_axes(state),
        state,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def lower_segment(run: Learner, work: Workload):
    """The last segment, of all rows that are sampled at one time."""
    enough = until = np.int32(0)
    return segments._advance.lower(
        run.model, _weights(run), _decoding(run, work), _sampling(work), enough, until, run.mesh
    )


def lower_regroup(run: Learner, work: Workload):
    """Half of these rows move into a batch of their own."""
    devices = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    rows = work.prompts_at_a_time * work.group_size
    half = next(size for size in segments.row_sizes(rows, devices) if size >= rows / 2)
    index = _rows(jnp.zeros(1, jnp.int32), half, run.mesh)
    return segments._regroup.lower(_decoding(run, work), None, index, work.columns[-1], run.mesh)


def _batch(run: Learner, work: Workload, size: int):
    """So many rows of a rollout."""
    rollout = lower_sampler(run, work).out_info  # what it makes is what the learner takes
    return jax.tree.map(lambda x: _rows(x, size, run.mesh), rollout)


def lower_scoring(run: Learner, work: Workload):
    """Log-probabilities of all rows."""
    return run.score.lower(_state(run).params, _batch(run, work, work.rows))


def lower_update(run: Learner, work: Workload):
    """One optimizer update, on a minibatch."""
    return run.update.lower(_state(run), _batch(run, work, work.minibatch))


LOWER = {  # in the order of an iteration
    "sampler": lower_sampler,
    "segment": lower_segment,
    "regroup": lower_regroup,
    "scoring": lower_scoring,
    "update": lower_update,
}
PROGRAMS = tuple(LOWER)
SAMPLING = PROGRAMS[:3]  # those that hold the learner's state beside them, and run no update


@dataclasses.dataclass
class Report:
    """What the compiler says about one program: bytes and FLOPs of one device."""

    seconds: float
    error: str | None = None
    arguments: int = 0
    temporaries: int = 0
    rest: int = 0  # outputs that do not take the place of an argument, and the program itself
    flops: float | None = None  # bodies of loops once; None: it does not say, or says what cannot be
    collectives: dict = dataclasses.field(default_factory=dict)  # kind -> (how many, bytes of the largest)
    traffic: Traffic = dataclasses.field(
        default_factory=Traffic
    )  # loops as often as they run, that over tokens left out
    step: Traffic = dataclasses.field(default_factory=Traffic)  # of a token of each row, in the loop over tokens
    kernels: int = 0  # of Pallas


def compile_program(lowered) -> Report:
    """Compiles; a program that needs more memory than there is has an `error`."""
    start = time.time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Report(time.time() - start, error=str(error).splitlines()[0])
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    flops, kernels = compiled.cost_analysis().get("flops"), program.kernels()
    return Report(
        time.time() - start,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        rest=memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        flops=None if kernels or flops is None or flops < 0 else flops,
        collectives=program.collectives(),
        traffic=program.traffic(without=program.open_loop()),
        step=program.of_step(),
        kernels=kernels,
    )
