"""Runs that share programs: what is compiled for them, and the scores before training."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r2vpo_jax import tasks
from r2vpo_jax.errors import usage_errors
from r2vpo_jax.evaluation import validation
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import compiling
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.sweeps.program import Program, RunState
from r2vpo_jax.sweeps.scorer import Scorer
from r2vpo_jax.sweeps.sharing import Family

_LONGEST_CHUNK = 10  # iterations
_MEMORY_SHARE = 0.85  # of what a device has; the rest is for what the compiler does not know of


class Group:
    """Runs of one family: the model, the compiled programs, and the scores before training, which all share.

    Attributes:
      family: the runs; `config` is what the programs are made of.
      task: of all runs.
      size: runs in a batch, a multiple of the devices.
      bytes_per_device: what a batch needs of the memory of each device, as the compiler says.
      params: of the base model.
      chunk_size: most iterations in one call of `advance`.
      start, advance: compiled, as in `Program`.
      base: evaluations before training, on the test and on the validation split.
      by_run: where the arrays of runs live.
      timers: seconds by phase.
    """

    def __init__(self, family: Family, runs_at_once: int | None, say):
        self.family, self.timers = family, Timers(compiling.FUSED)
        self.config = config = family.config
        self._devices = Mesh(np.asarray(jax.local_devices()), ("devices",))
        self._everywhere = NamedSharding(self._devices, PartitionSpec())
        self.by_run = NamedSharding(self._devices, PartitionSpec("devices"))
        with usage_errors():
            opened = open_base_model(config.model)
            self.task = tasks.make(config.task, opened.tokenizer, opened.eos_ids)
        try:
            with usage_errors():
                opened.check_length(self.task.max_prompt_length + self.task.max_response_length)
            self.base_identity = opened.identity()
            self.params = jax.device_put(opened.load_params(), self._everywhere)
            self.chunk_size = min(config.trainer.eval_every, config.trainer.num_iterations, _LONGEST_CHUNK)
            self._program = Program(
                config, opened.model, self.task, chunk_size=self.chunk_size, lockstep=_in_lockstep()
            )
            self._scorer = Scorer(config, self.task)
            with self.timers("start"):
                self.bytes_per_device = self._compile(runs_at_once)
            say(
                f"{self.size} runs at a time on {self._devices.size} x {jax.devices()[0].device_kind}, "
                f"{self.bytes_per_device / 2**20:.0f} MiB on each; compiled in {self.timers.seconds['compile']:.0f} s"
            )
            with self.timers("evaluation"):
                numbers, _ = self.traced(list(family.configs)[:1])
                params = self.start(self.params, numbers).learner.params
                self.base = [
                    self._scorer.of_one(self._respond, params, split, self.size) for split in ("test", "validation")
                ]
        except BaseException:
            self.task.close()
            raise

    def close(self) -> None:
        """Ends the task."""
        self.task.close()

    def traced(self, names: list[str]):
        """(path -> f32 [size], seeds int32 [size]) of these runs on the devices, filled up with the last."""
        return jax.device_put(self._traced(names, self.size), self.by_run)

    def _traced(self, names: list[str], size: int):
        names = names + names[-1:] * (size - len(names))
        values = [self.family.numbers(name) for name in names]
        numbers = {path: np.asarray([value[path] for value in values], np.float32) for path in values[0]}
        return numbers, np.asarray([self.family.configs[name].seed for name in names], np.int32)

    def evaluate(self, runs: RunState, split: str) -> list[validation.Evaluation]:
        """What became of the responses of each run to a split."""
        with self.timers("evaluation"):
            return self._scorer.of_runs(self._respond, runs.learner.params, split, self.size)

    # Programs ------------------------------------------------------------------------------------------------

    def _compile(self, runs_at_once: int | None) -> int:
        """Compile for as many runs as there are, or, where these do not fit into memory, for as many as do.

        Returns:
          Bytes needed on each device.
        """
        devices = self._devices.size
        number = len(self.family.configs)
        size = min(number, runs_at_once or number)
        while True:
            self.size = -(-size // devices) * devices
            self._compile_for(self.size)
            needed, there = self._memory_needed(), _device_memory()
            if there is None or needed <= there or self.size == devices:
                return needed
            fit = max(int(self.size * there / needed) // devices, 1) * devices
            # Batches of equal size: as many as needed, none larger than needed.
            size = -(-number // -(-number // fit))

    def _compile_for(self, size: int) -> None:
        program, by_run, fixed = self._program, PartitionSpec("devices"), PartitionSpec()

        def compiled(function, specs, *arguments, **options):
            mapped = jax.shard_map(function, mesh=self._devices, in_specs=specs, out_specs=by_run, check_vma=False)
            return jax.jit(mapped, **options).lower(*arguments).compile()

        def abstract(tree, where):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where), tree)

        params = abstract(self.params, self._everywhere)
        numbers, seeds = abstract(self._traced(list(self.family.configs)[:1], size), self.by_run)
        runs = jax.eval_shape(program.start, params, numbers)
        self.abstract_runs = runs = abstract(runs, self.by_run)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._everywhere)
        self.start = compiled(program.start, (fixed, by_run), params, numbers)

        def advance(*x):
            return program.advance(*x)[:2]

        self.advance = compiled(
            advance,
            (by_run, by_run, by_run, fixed, fixed, fixed),
            *(runs, numbers, seeds, params, count, count),
            donate_argnums=0,
        )
        problems, prompt = self._scorer.num_problems, self.task.max_prompt_length
        shapes = (size, problems, prompt), (size, problems), (size, problems), (size,)
        self._respond = compiled(
            functools.partial(program.respond, sampling=self._scorer.sampling),
            (by_run,) * 5,
            runs.learner.params,
            *(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.by_run) for shape in shapes),
        )

    def _memory_needed(self) -> int:
        """Bytes on each device, of the program that needs most."""

        def needed(program):
            said = program.memory_analysis()
            used = said.argument_size_in_bytes + said.output_size_in_bytes + said.temp_size_in_bytes
            return used - said.alias_size_in_bytes

        return max(needed(program) for program in (self.advance, self._respond))


def _in_lockstep() -> bool:
    """Whether the runs of a device do each step together (`Program`): not on processors."""
    return jax.default_backend() != "cpu"


def _device_memory() -> int | None:
    """Bytes that programs may use on each device; None where nobody knows."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] * _MEMORY_SHARE)
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(there * _MEMORY_SHARE / 2) // jax.local_device_count()  # others want some of it
    return None
