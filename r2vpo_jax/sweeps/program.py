"""A whole training run as pure functions, for many runs side by side in one compiled program.

    program = Program(config, model, task, chunk_size=5)
    runs = program.start(params, numbers)                           # numbers: path -> f32 [runs], see config.traced
    runs, measured = program.advance(runs, numbers, seeds, params, first=0, count=5)
    responses = program.respond(runs.learner.params, ...)           # for scores

Runs of one program share everything but the seed and the numbers of `config.numbers`. Every function that computes
something is the ordinary trainer's, and so is the order (`iteration.iterate`); what is left out is what only a host can
do: files, checkpoints, verifiers in Python, and sampling until enough groups differ.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from r2vpo_jax import sampler, tasks
from r2vpo_jax.config import Config, traced
from r2vpo_jax.evaluation import validation
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.tasks.base import TraceableTask
from r2vpo_jax.training import credit, critic, iteration, metrics, ring, update
from r2vpo_jax.training.collector import sampling_of
from r2vpo_jax.training.learner import settings_of
from r2vpo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from r2vpo_jax.training.ring import Ring
from r2vpo_jax.training.update import LearnerState, Optimizers, RolloutReport, UpdateFunctions

_AXIS = "runs"


@struct.dataclass
class RunState:
    """Everything that changes in one run."""

    learner: LearnerState
    ring: Ring | None  # the replay buffer, if there is one
    nonfinite_in_a_row: jax.Array  # int32 [] updates
    collapsed: jax.Array  # bool [] more of them than are allowed: nothing is learned any more
    dry: jax.Array  # bool [] too few groups were within the limits of the replay buffer: neither


@struct.dataclass
class Measured:
    """What one iteration of one run has measured."""

    sampled: dict[str, jax.Array]  # `metrics.of_sampled`
    tokens: jax.Array  # int32 [] sampled
    trained_tokens: jax.Array  # int32 [] each epoch counted
    kept: jax.Array  # f32 [] `metrics.kept`
    report: RolloutReport  # `metrics.merged`
    variance_first: jax.Array  # f32 [] V of the first minibatch of all, before its update
    replay: dict[str, jax.Array]  # `ring.statistics`
    variance_coef: jax.Array  # f32 [] after the iteration
    kl_coef: jax.Array  # f32 []
    learning_rate: jax.Array  # f32 [] of the last update
    version: jax.Array  # int32 []
    collapsed: jax.Array  # bool []
    dry: jax.Array  # bool []


class Responses(NamedTuple):
    """Responses to a batch of problems; axis 0 is the run."""

    tokens: jax.Array  # int32 [runs, problems, n, T]
    length: jax.Array  # int32 [runs, problems, n]
    truncated: jax.Array  # bool [runs, problems, n]


def refusal(config: Config) -> str | None:
    """Why a run cannot be part of such a program, or None."""
    if not issubclass(tasks.task_class(config.task.name), TraceableTask):
        return f"problems and verdicts of task {config.task.name} are not JAX (tasks/base.py, TraceableTask)"
    if config.mesh.fsdp != 1 or config.mesh.tensor != 1:
        return "mesh.fsdp and mesh.tensor split a model, and here each run lives on one device"
    if config.mesh.sampler_devices or config.replay.overlap:
        return "mesh.sampler_devices and replay.overlap are for sampling beside learning, and here a run is one program"
    if config.model.lora.rank:
        return "model.lora has frozen weights, which each run would hold a copy of here, and adapters that begin by its seed"
    if config.sampler.engine != "own":
        return f"sampler.engine={config.sampler.engine} samples elsewhere, and here a run is one program"
    for name, on in {"alarms.stop": config.alarms.stop, "trainer.trackers": config.trainer.trackers}.items():
        if on:
            return f"{name} is the host's, which sees a run only between chunks"
    if config.objective.groups.zero_variance == "resample":
        return "objective.groups.zero_variance=resample samples until the host says that it is enough"
    if config.seed >= 2**31:
        return f"seed={config.seed}: seeds are int32 there, below {2**31}"
    return ring.refusal(config.replay)


class Program:
    """The functions of runs of one structure (`config.structure`). They can be jitted; sizes are static.

    Args:
      config: of any of the runs.
      model: the decoder.
      task: whose problems and verdicts are JAX.
      chunk_size: most iterations in one call of `advance`.
      lockstep: whether all runs of a device do each step together (vmap): it fills an accelerator, with products of
        matrices in batches. Otherwise they take turns (a loop over runs), for a processor core that is filled by one:
        batches of small products are half as fast there, and whoever is done early waits for nobody.
      observe: (Made) -> pytree of arrays that `advance` also returns, of each iteration.
    """

    def __init__(
        self, config: Config, model, task: TraceableTask, *, chunk_size: int, lockstep: bool = True, observe=None
    ):
        self.config, self.model, self.task = config, model, task
        self.chunk_size, self._observe = chunk_size, observe
        self.axis_name = _AXIS if lockstep else None

    def _for_each_run(self, function, *arguments):
        """`function` of each run's part of the arguments, whose axis 0 is the run."""
        if self.axis_name is None:
            return jax.lax.map(lambda run: function(*run), arguments)
        return jax.vmap(function, axis_name=self.axis_name)(*arguments)

    def start(self, params, numbers) -> RunState:
        """The state of each run before its first iteration.

        Args:
          params: of the base model.
          numbers: path -> f32 [runs].
        """

        def one(numbers):
            run = _Run(self, numbers, jnp.zeros((), jnp.int32), params)
            return RunState(
                learner=update.init_state(params, self.model, run.optimizers, run.functions.settings),
                ring=run.empty_ring(),
                nonfinite_in_a_row=jnp.zeros((), jnp.int32),
                collapsed=jnp.zeros((), bool),
                dry=jnp.zeros((), bool),
            )

        return self._for_each_run(one, numbers)

    def advance(self, runs: RunState, numbers, seeds, params, first, count) -> tuple[RunState, Measured, dict]:
        """`count` iterations of each run.

        Args:
          runs: the states; donate them.
          numbers: path -> f32 [runs].
          seeds: int32 [runs].
          params: of the base model, the reference where one is needed.
          first: int32 [], iterations done so far.
          count: int32 [], at most chunk_size.

        Returns:
          The new states; what was measured, [runs, chunk_size, ...], zeros behind count; and what `observe` returned.
        """

        def one(state, numbers, seed):
            run = _Run(self, numbers, seed, params)

            def body(number, carry):
                state, outputs = carry
                state, new = run.iteration(state, first + number, self._observe)
                return state, jax.tree.map(
                    lambda out, x: jax.lax.dynamic_update_index_in_dim(out, x, number, axis=0), outputs, new
                )

            _, shapes = jax.eval_shape(lambda state: run.iteration(state, first, self._observe), state)
            outputs = jax.tree.map(lambda x: jnp.zeros((self.chunk_size, *x.shape), x.dtype), shapes)
            state, (measured, observed) = jax.lax.fori_loop(0, count, body, (state, outputs))
            return state, measured, observed

        return self._for_each_run(one, runs, numbers, seeds)

    def respond(self, params, tokens, lengths, index, first_sample, *, sampling) -> Responses:
        """Responses for scores: a draw depends on the problem and the number of the sample alone.

        Args:
          params: of each run, in its master dtype, [runs, ...].
          tokens, lengths, index: problems for each run, int32 [runs, problems, P], [runs, problems] and the same.
          first_sample: int32 [runs], number of the first of the n samples.
          sampling: n, and how.
        """

        def one(params, tokens, lengths, index, first_sample):
            rollout = sampler.sample(
                self.model,
                self._cast(params),
                tokens,
                lengths,
                validation.key(),
                sampling,
                problem_ids=index,
                first_sample=first_sample,
                axis_name=self.axis_name,
            )
            columns = rollout.response_tokens, rollout.response_length, rollout.truncated
            return Responses(*(x.reshape(len(index), sampling.group_size, *x.shape[1:]) for x in columns))

        return self._for_each_run(one, params, tokens, lengths, index, first_sample)

    def _cast(self, params):
        """The parameters in the compute dtype, for the sampler."""
        return jax.tree.map(lambda x: x.astype(self.model.config.compute_dtype), params)


class _Run:
    """One run while it is traced: what is fixed in it, and the steps of an iteration."""

    def __init__(self, program: Program, numbers, seed, params):
        self.program, self.seed, self.base_params = program, seed, params
        self.config = config = traced.with_numbers(program.config, numbers)
        self.key = jax.random.key(seed)
        self.optimizers = Optimizers(
            policy=make_optimizer(config.optimizer, config.num_updates),
            value=critic.make_optimizer(config.optimizer.value_learning_rate, config.optimizer.max_grad_norm),
        )
        # Runs in lockstep would all go through as many packs as the one that has most: here nothing is packed.
        settings = dataclasses.replace(settings_of(config), packing=False)
        self.functions = UpdateFunctions(program.model, self.optimizers, settings)
        self.reference = program._cast(params) if config.objective.needs_reference else None

    def empty_ring(self) -> Ring | None:
        """An empty replay buffer, if the run has one."""
        if not self.config.replay.enabled:
            return None
        settings = self.functions.settings
        learner = jax.eval_shape(
            lambda: update.init_state(self.base_params, self.program.model, self.optimizers, settings)
        )

        def batch(learner):
            self.state, self.now = RunState(learner, None, 0, False, False), jnp.int32(0)
            return self.prepare(self.collect())

        return ring.init(jax.eval_shape(batch, learner), self.config.replay, self.config.sampler.group_size)

    def iteration(self, state: RunState, now, observe) -> tuple[RunState, tuple[Measured, dict]]:
        """The state after iteration `now` (from 0), and what it has measured."""
        self.state, self.now, config = state, now, self.config
        made = iteration.iterate(self)
        # What has collapsed stays as it was when it did.
        frozen = state.collapsed | state.dry
        learner = jax.tree.map(lambda new, old: jnp.where(frozen, old, new), self.state.learner, state.learner)
        collapsed, dry = state.collapsed | self.state.collapsed, state.dry | self.state.dry
        self.state = self.state.replace(learner=learner, collapsed=collapsed, dry=dry)
        schedule = learning_rate_schedule(config.optimizer, config.num_updates)
        trained = sum(jnp.sum(batch.learning_mask) for batch in made.drawn) * config.trainer.num_epochs
        replay = self._replay_statistics(made.drawn[-1], state.learner.version) if config.replay.enabled else {}
        measured = Measured(
            sampled=metrics.of_sampled(config.objective, made.collected, config.sampler.group_size),
            tokens=jnp.sum(made.collected.response_length),
            trained_tokens=jnp.where(self._filling(), 0, trained),
            kept=metrics.kept(made.drawn),
            report=metrics.merged(made.reports),
            variance_first=made.reports[0].variance_first,
            replay=replay,
            variance_coef=learner.dual.variance_coef,
            kl_coef=learner.kl_coef,
            learning_rate=jnp.asarray(schedule(jnp.maximum(learner.version - 1, 0)), jnp.float32),
            version=learner.version,
            collapsed=collapsed,
            dry=dry,
        )
        return self.state, (measured, {} if observe is None else observe(made))

    def _filling(self):
        """Whether the queue still fills, so that nothing is learned; the same for all runs."""
        return self.now < self.config.replay.lag

    def _replay_statistics(self, batch: Rollout, version) -> dict[str, jax.Array]:
        """`ring.statistics`; while the queue fills there is no batch whose age could be told."""
        batch = batch.replace(version=jnp.where(self._filling(), version, batch.version))
        return ring.statistics(self.state.ring, batch, version)

    # The steps, for iteration.iterate ------------------------------------------------------------------------

    def collect(self) -> Rollout:
        number, learner = self.config.trainer.prompts_per_rollout, self.state.learner
        index = iteration.problem_positions(self.seed, self.now * number, number)
        key = iteration.rollout_key(self.key, self.now)
        sampling = sampling_of(self.config, self.program.task)
        params = sampler.rounded_weights(self.program._cast(learner.params), self.config.sampler.weights)
        task, model = self.program.task, self.program.model
        tokens, length = task.traced_problems("train", index)
        rollout = sampler.sample(
            model,
            params,
            tokens,
            length,
            key,
            sampling,
            problem_ids=index,
            version=learner.version,
            axis_name=self.program.axis_name,
        )
        rows = jnp.repeat(index, sampling.group_size)
        reward, outcome = task.traced_verify("train", rows, rollout.response_tokens, rollout.response_length)
        # Unique in the run: responses are counted.
        rollout_id = rollout.rollout_id + self.now * len(rollout.rollout_id)
        return rollout.replace(reward=reward, outcome=outcome, rollout_id=rollout_id)

    def prepare(self, rollout: Rollout) -> Rollout:
        learner, config = self.state.learner, self.config
        rollout = iteration.with_estimates(rollout, learner, self.reference, self.functions)
        return credit.assign(rollout, config.objective, config.sampler.group_size, learner.kl_coef)

    def draw(self, batch: Rollout) -> list[Rollout]:
        replay, state = self.config.replay, self.state
        if not replay.enabled:
            return [batch]
        buffer, drawn, dry = ring.add(state.ring, self.now, batch), [], jnp.zeros((), bool)
        for number in range(replay.batches_per_iteration):
            buffer, rollout, enough = ring.draw(
                buffer,
                replay,
                self.now,
                self.config.trainer.prompts_per_rollout,
                version=state.learner.version,
                key=self.key,
                number=number,
            )
            drawn.append(rollout)
            dry = dry | ~enough
        self.state = state.replace(ring=buffer, dry=dry & ~self._filling())
        return drawn

    def learn(self, rollout: Rollout, number: int) -> RolloutReport:
        key = iteration.learning_key(self.key, self.now, number)

        def train(learner):
            return update.train_on_rollout(learner, rollout, key, self.functions)

        if self.config.replay.lag:
            _, nothing = jax.eval_shape(train, self.state.learner)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)
            learner, report = jax.lax.cond(
                self._filling(), lambda learner: (learner, nothing), train, self.state.learner
            )
        else:
            learner, report = train(self.state.learner)
        in_a_row, collapsed = self.state.nonfinite_in_a_row, self.state.collapsed
        for skipped in report.skipped:
            in_a_row = jnp.where(skipped > 0, in_a_row + 1, 0)
            collapsed = collapsed | (in_a_row > self.config.trainer.max_nonfinite_updates)
        self.state = self.state.replace(learner=learner, nonfinite_in_a_row=in_a_row, collapsed=collapsed)
        return report
