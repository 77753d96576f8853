"""The training loop.

Before the loop:
  0. Claim the run directory, load the base model, place it on the mesh, and continue from the last
     intact checkpoint if there is one. Measure the noise floor: with unchanged weights the ratio of scoring to
     sampling should be 1; if it is not, the constraint would act on noise, and the run is refused.
     Score the base model on the test split.

One iteration:
  1. Take the next problems: a function of (seed, data position).
  2. Sample G responses to each, with the current parameters.
  3. Verify them: right, wrong, or a verifier error (counted apart). With dynamic sampling, go back to
     1 until enough groups have rewards that differ.
  4. Turn rewards into advantages.
  5. Put the batch into the replay buffer, if there is one, and draw what is trained on: nothing while its queue
     fills. Learn: N minibatch updates, then one step of the multipliers. With `replay.overlap` a thread does 1 to 3
     meanwhile, with the same result (`overlapped`).
  6. Write metrics and samples, now and then with what was done to each of their tokens; look for signs of a collapse.
  7. Every `eval_every` iterations, score the validation split.
  8. Every `checkpoint_every` iterations, and when the score is the best so far, save everything the run needs to
     continue. Every `report_every` iterations write the page that shows the run.

After the loop: score the test split once, export the policy as a Hugging Face directory, write the report.

A run is a function of (config, seed, code, devices): no hidden random state, and no wall clock in any
decision but the time limits of verifiers.
"""

import contextlib
import dataclasses
import functools
import math
import resource
from collections.abc import Callable

import jax
import numpy as np

import r2vpo_jax
from r2vpo_jax import cluster, models, sharding, tasks
from r2vpo_jax.config import Config
from r2vpo_jax.errors import NonFiniteUpdateError, Stopped, UsageError, usage_errors
from r2vpo_jax.evaluation import subsets, validation
from r2vpo_jax.models import attention
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.run import compiling, console, directory, files, report, trackers
from r2vpo_jax.run import summary as run_summary
from r2vpo_jax.run.instruments import Profiler, Span, Timers
from r2vpo_jax.run.interrupts import any_process, graceful_stop
from r2vpo_jax.training import (
    credit,
    engines,
    iteration,
    metrics,
    noise_floor,
    overlapped,
    sampler_mesh,
    token_gradients,
)
from r2vpo_jax.training.collector import Collected, Collector
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.lifecycle import Lifecycle, refuse_in_store
from r2vpo_jax.training.overlapped import Beside
from r2vpo_jax.training.record import Record
from r2vpo_jax.training.replay import ReplayError
from r2vpo_jax.training.sampler_mesh import SamplerWeights
from r2vpo_jax.training.update import LearnerState, RolloutReport


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What `on_iteration` is given: everything that one iteration has made, on the host but for the state.

    On several processes, rollouts are this process's rows (`rows.Rows`).
    """

    number: int  # from 1
    collected: Collected  # what was sampled and verified
    batch: Rollout  # with advantages
    drawn: list[Rollout]  # what was trained on: the batch, or what the replay buffer gave
    reports: list[RolloutReport]  # of each
    state: LearnerState  # after the iteration; donated by the next, so copy what is kept
    row: dict  # of metrics.jsonl
    spans: list[Span]  # when its phases were at work


def train(
    config: Config,
    workdir,
    *,
    stop_after_iteration: int | None = None,
    profile_steps=None,
    say=console.say,
    on_iteration: Callable[[Iteration], None] | None = None,
    started: float = r2vpo_jax.PROCESS_START,
) -> dict:
    """Run, or continue, the experiment in `workdir`.

    Args:
      config: validated.
      workdir: the run directory.
      stop_after_iteration: save and stop there; the same command later goes on. Not part of the config, so
        that it changes nothing about the run.
      profile_steps: (first, last) iterations to record with the JAX profiler under workdir/profile.
      say: where lines for people go (process 0 only).
      on_iteration: called after each iteration.
      started: from when run times count, by time.perf_counter(); default: the start of the process.

    Returns:
      The summary of the finished run (report/summary.json); on processes other than 0, which write nothing, {}.

    Raises:
      Stopped: the run was stopped before its end, and saved.
      UsageError: bad input, or a directory that is in use, before anything is overwritten.
      EngineError: the server that samples is gone.
      NonFiniteUpdateError: more non-finite updates in a row than allowed; the batch is saved.
    """
    say = say if jax.process_index() == 0 else lambda _: None
    workdir = directory.folder(workdir)
    refuse_in_store(config, workdir, profile_steps)
    finished = report.is_finished(workdir) and not directory.claim(workdir, config, write=False).longer
    if cluster.of_first("finished", finished):
        if jax.process_index() > 0:
            return {}
        summary = report.read_summary(workdir)
        say(f"{workdir} holds a finished run; its result:\n")
        say(run_summary.table(summary))
        return summary
    with directory.resolving(workdir), contextlib.closing(_Run(config, workdir, profile_steps, say, started)) as run:
        return run.go(stop_after_iteration, on_iteration or (lambda _: None))


class _Run:
    """The parts of one run. `go` is the whole course of it; the other methods are its steps."""

    def __init__(self, config: Config, workdir, profile_steps, say, started):
        self.config, self.workdir, self._say, self._started = config, workdir, say, started
        self.chief = jax.process_index() == 0
        # The cheap first: what is refused here costs no reading of data, nor of weights.
        directory.claim(workdir, config, write=False)
        if self.chief:
            directory.refuse_if_in_use(workdir)
            trackers.check(config.trainer.trackers)
        with usage_errors(), cluster.phase("reading model and data"):
            self.mesh, self.sampler_mesh = sampler_mesh.make_meshes(config.mesh)
            overlapped.check(config, self.mesh, self.sampler_mesh)
            self.base = open_base_model(config.model)
            self.model = self.base.model
            self.learner = Learner(self.model, config, self.mesh)
            self.task = tasks.make(config.task, self.base.tokenizer, self.base.eos_ids, stop=config.sampler.stop)
        with contextlib.ExitStack() as stack:
            stack.callback(self.task.close)
            self.identity = self.base.identity()
            cluster.agree("base model", {f"the base model's {part}": digest for part, digest in self.identity.items()})
            with files.disk_errors(f"--workdir={workdir}"):
                cluster.agree_on_folder(workdir)
            self._load(workdir, profile_steps, stack)
            self._open = stack.pop_all()

    def _load(self, workdir, profile_steps, stack: contextlib.ExitStack):
        """The weights, the last checkpoint, and the parts that need the run directory or the task."""
        config = self.config
        with usage_errors():
            longest = self.task.max_prompt_length + self.task.max_response_length
            self.base.check_length(longest)
            engine = engines.find(config, workdir, longest, self._say)
        with cluster.phase("reading weights"):
            self.state = self.learner.init_state(self.base.load_params(self.mesh, seed=config.seed))
        self.timers = Timers(compiling.TRAINING)
        where = {"mesh": self.sampler_mesh, "learner_mesh": self.mesh, "engine": engine}
        self._collector_of = functools.partial(Collector, config, self.task, timers=self.timers, **where)
        self.collector = self._collector_of(self.model)
        scores = SamplerWeights(self.learner, self.sampler_mesh, self.timers)
        self.weights = engines.weights_of(engine, scores, self.base, workdir, self.timers)
        self.rows = self.collector.learner_rows_of(config.trainer.prompts_per_rollout)
        self.life = Lifecycle(config, workdir, self.rows, chief=self.chief, say=self._say, started=self._started)
        stack.callback(self.life.close)
        self.workdir, self.replay = self.life.workdir, self.life.replay
        self.profiler = Profiler(self.workdir, profile_steps)
        self.key = jax.random.key(config.seed)
        # The reference is the base model itself: it is taken before a checkpoint replaces the state.
        self.reference = self.learner.reference_params(self.state) if config.objective.needs_reference else None
        with cluster.phase("reading the last checkpoint"):
            self.state, self.counters = self.life.resume(self.state, self.learner, self.task.digest, self.identity)

    def close(self) -> None:
        """The task ends, and others may work in the run directory."""
        self._open.close()

    def _count(self, **changes) -> None:
        self.counters = dataclasses.replace(self.counters, **changes)

    # The course of a run -----------------------------------------------------------------------------------------

    def go(self, stop_after_iteration, on_iteration) -> dict:
        trainer, total = self.config.trainer, self.config.trainer.num_iterations
        self._first = True
        self.beside = Beside(self.config.replay.wait_limit, self.timers, self._say)
        with (
            self.life.open(self.counters.iteration),
            contextlib.closing(self.profiler),
            graceful_stop() as stop,
            self.beside,
        ):
            sampling = (self.collector, self.weights, self.timers, self._say)
            self.record = Record(self.config, self.life, self.learner, self.task, self.rows, *sampling)
            self._introduce()
            with cluster.phase("noise floor"):
                self._check_noise_floor()
            if self.counters.base is None:
                self._count(base=self._test_scores())
                self._validate()
            last = total if stop_after_iteration is None else min(total, stop_after_iteration)
            self.timers.lap()
            bar = console.ProgressBar(total, self.counters.iteration, enabled=self.chief)
            while self._goes_on(last, stop):
                with self.profiler.iteration(self.counters.iteration + 1):
                    done = self._iterate()
                number, row = done.number, done.row
                on_iteration(done)
                alarmed = self._sound_alarms(row)
                better = self._validate() if number % trainer.eval_every == 0 or number == total else False  # 7
                if better or number % trainer.checkpoint_every == 0 or number == total:
                    with self.timers("checkpoint"):
                        self.life.save(self.state, self.counters)  # 8
                with self.timers("report"):
                    self.life.live.refresh(number, now=alarmed)
                bar.update(number, self._progress_text(row))
                if self.life.alarms.is_in_vain(row) or (alarmed and self.config.alarms.stop):
                    break
            bar.close()
            cluster.where.iteration = None
            self.life.save(self.state, self.counters)
            with cluster.phase("waiting for the last checkpoint"):
                self.life.wait()
            if self.counters.iteration < total:
                self.life.live.write(stopped=True)
                raise Stopped(
                    f"stopped after iteration {self.counters.iteration} of {total}; the same command goes on from there"
                )
            return self._finish()

    def _goes_on(self, last: int, stop) -> bool:
        cluster.where.iteration, cluster.where.phase = self.counters.iteration + 1, "between two phases"
        with self.timers("sync"), cluster.phase("asking all whether to stop"):
            return self.counters.iteration < last and not any_process(stop.requested)

    def _iterate(self) -> Iteration:
        self.timers.take_spans()
        self._tokens = None
        what = f"the responses of iteration {self.counters.iteration + 1}"
        made = overlapped.iterate(self, self.beside, what) if self.config.replay.overlap else iteration.iterate(self)
        drawn = [self.rows.outline(rollout) for rollout in made.drawn]
        trained = sum(map(metrics.num_kept_tokens, drawn)) * self.config.trainer.num_epochs
        self._count(iteration=self.counters.iteration + 1, trained_tokens=self.counters.trained_tokens + trained)
        after = {"state": self.state, "counters": self.counters, "tokens": self._tokens}
        row = self.record.write(made, drawn, trained, **after)  # 6
        return Iteration(self.counters.iteration, *made, self.state, row, self.timers.take_spans())

    # 0. Before the loop ----------------------------------------------------------------------------------

    def _introduce(self) -> None:
        scored = {split: validation.scoring_of(self.config, split).num_problems for split in ("validation", "test")}
        samples = [notice for split, number in scored.items() for notice in subsets.notices(self.task, split, number)]
        without = attention.without_kernel(self.model.config, self.mesh.devices.flat[0])
        taking_turns = overlapped.notices(self.config)
        for notice in (*self.base.notices, *without, *self.task.notices, *samples, *taking_turns):
            self._say(notice)
        if not self.life.resumed:
            self._say(f"mesh {dict(self.mesh.shape)}, {jax.device_count()} x {jax.devices()[0].device_kind}")
            if self.sampler_mesh is not self.mesh:
                self._say(f"sampling on a mesh of its own: {dict(self.sampler_mesh.shape)}")
            if self.rows.is_all and len(self.rows.holders[0]) > 1:
                self._say("rollouts: " + self.rows.why_all())
            self._say(sharding.placement_table(self.learner.logical_axes, self.learner.abstract_params, self.mesh))

    def _check_noise_floor(self) -> None:
        """Refuses a noisy set-up, but warns only of a run that is continued: it is the run that it was."""

        sampled = functools.partial(noise_floor.sampled_and_scored, self.config, self.state, self.counters.iteration)

        def again(changes: dict[str, bool]):
            model = models.Decoder(dataclasses.replace(self.model.config, **changes))
            learner, collector = Learner(model, self.config, self.mesh), self._collector_of(model)
            return sampled(learner, collector, SamplerWeights(learner, self.sampler_mesh, self.timers))

        floor = noise_floor.check(
            *sampled(self.learner, self.collector, self.weights),
            self.config,
            first=self.counters.noise_floor is None,
            say=self._say,
            event=self._event,
            again=again,
            exchange=self.rows.exchange,
        )
        if self.counters.noise_floor is None:
            self._count(noise_floor=floor)

    # 1. to 5., called by iteration.iterate and overlapped.iterate ----------------------------------------

    def collect(self) -> Collected:
        with self.life.saving_if_the_engine_is_gone(self.state, self.counters):
            return self.counted(self.collection()())

    def collection(self) -> Callable[[], Collected]:
        counters = self.counters
        self._kl_coef = float(sharding.to_host(self.state.kl_coef))  # for the rewards of what is sampled
        return functools.partial(
            self.collector.collect,
            self.weights.for_rollouts(self.state, counters.iteration),
            position=counters.problems,
            first_id=counters.rollouts,
            iteration=counters.iteration,
            version=self._version(),
        )

    def counted(self, collected: Collected) -> Collected:
        counters = self.counters
        self._count(
            problems=counters.problems + collected.num_problems,
            rollouts=counters.rollouts + len(collected.outline.reward),
            rollout_tokens=counters.rollout_tokens + int(collected.outline.response_length.sum()),
        )
        return collected

    def prepare(self, collected: Collected) -> Rollout:
        objective, group_size, rows = self.config.objective, self.config.sampler.group_size, self.rows
        rollout = collected.parts[0]
        if objective.groups.zero_variance == "resample":
            chosen = credit.chosen_groups(collected.outline, objective, group_size, rows.num_groups)
            rollout = rows.bring(collected.parts, np.stack(np.divmod(chosen, rows.num_groups), axis=1))
        with self.timers("score"):
            placed = iteration.with_estimates(rows.put(rollout), self.state, self.reference, self.learner)
            estimates = rows.fetch({"reference_logp": placed.reference_logp, "value": placed.value})
            parts = {} if rows.is_all else {"placed": placed, "fetch": rows.fetch}
            return credit.fill_advantages(rollout.replace(**estimates), objective, group_size, self._kl_coef, **parts)

    def draw(self, batch: Rollout) -> list[Rollout]:
        if not self.config.replay.enabled:
            return [batch]
        self.keep(batch)
        return self.choose()

    def make_room(self) -> None:
        self.replay.make_room(self.counters.iteration)

    def keep(self, batch: Rollout) -> None:
        with self.timers("update"):
            self.replay.add(self.counters.iteration, batch, version=self._version())

    def choose(self) -> list[Rollout]:
        config, now = self.config, self.counters.iteration
        version, groups = self._version(), config.trainer.prompts_per_rollout
        with self.timers("update"):
            try:
                draws = [
                    self.replay.draw(now, groups, version=version, key=self.key, number=number)
                    for number in range(config.replay.batches_per_iteration)
                ]
            except ReplayError as error:
                raise UsageError(str(error)) from error
        return [rollout for rollout in draws if rollout is not None]

    def learn(self, rollout: Rollout, number: int) -> RolloutReport:
        with self.timers("update"):
            batch = self.rows.put(rollout)
            key = iteration.learning_key(self.key, self.counters.iteration, number)
            watched = self._watched(rollout, batch) if number == 0 else None
            self.state, result = self.learner.train_on_rollout(self.state, batch, key)
            result = sharding.to_host(result)
        if watched is not None:
            with self.timers("report"):
                tokens = sharding.to_host(self.learner.token_gradients(self.state, *watched))
            self._tokens = tokens if self.life.live.is_due(self.counters.iteration + 1) else None
        self._check_finite(batch, key, result.skipped)
        return result

    def _watched(self, rollout: Rollout, batch: Rollout) -> tuple[Rollout, np.ndarray] | None:
        """The rows whose tokens are looked at after the updates, if they are; also in the first iteration of a process, so
        that nothing is compiled later."""
        trainer, due = self.config.trainer, self.life.live.is_due(self.counters.iteration + 1)
        if not trainer.looks_at_tokens or not (due or self._first):
            return None
        self._first, number, outline = False, trainer.samples_per_iteration, self.rows.outline(rollout)
        rows = token_gradients.worth_a_look(outline, number, self.learner.settings)
        return self.learner.watch(self.state.params, batch), rows

    def _check_finite(self, batch: Rollout, key, skipped) -> None:
        for number, was_skipped in enumerate(np.asarray(skipped)):
            in_a_row = self.counters.nonfinite_in_a_row + 1 if was_skipped else 0
            self._count(nonfinite_in_a_row=in_a_row)
            if not was_skipped:
                continue
            minibatch = sharding.to_host(self.learner.minibatch(batch, key, number))
            file = self.workdir / f"nonfinite_{self.counters.iteration}_{number}.npz"
            if self.chief:
                files.write_arrays(file, {name: x for name, x in vars(minibatch).items() if x is not None})
            self._event("nonfinite", update=number, file=file.name)
            if in_a_row > self.config.trainer.max_nonfinite_updates:
                raise NonFiniteUpdateError(
                    f"update {number} of iteration {self.counters.iteration} had a non-finite loss or gradient and was "
                    f"not applied; its minibatch is saved in {file}. The last checkpoint is intact"
                )

    def _version(self) -> int:
        """Optimizer updates so far."""
        return int(sharding.to_host(self.state.version))

    # 6. Alarms -------------------------------------------------------------------------------------------

    def _sound_alarms(self, row: dict) -> bool:
        raised = self.life.alarms.check(row) if row["kind"] == "train" else []
        for name, line in raised:
            self._say(f"ALARM {name}: {line}")
            self._event("alarm", alarm=name, message=line)
        return bool(raised)

    def _event(self, name: str, **details) -> None:
        self.life.files.event(name, self.counters.iteration, **details)

    def _progress_text(self, row: dict) -> str:
        return metrics.progress_text(
            row,
            validation=self.counters.last_validation,
            budget=self.config.objective.variance_budget,
            seconds=self.life.seconds(self.counters),
        )

    # 7. Scores -------------------------------------------------------------------------------------------

    def _validate(self) -> bool:
        """Scores the validation split; whether the policy is the best so far."""
        result = self._evaluate("validation")
        score, before = result.average_at(self.config.trainer.eval_samples), self.counters.best_validation
        # Where nothing could be judged there is no score by which weights could be chosen.
        self.counters = self.counters.after_validation(score if result.judged else math.nan)
        self._write_evaluation(result, {"pass_at_1": score})
        return self.counters.best_validation != before

    def _test_scores(self) -> dict:
        result = self._evaluate("test")
        scores = result.scores(validation.average_over(self.config))
        self._write_evaluation(result, scores)
        return scores

    def _evaluate(self, split: str) -> validation.Evaluation:
        with self.timers("evaluation"):
            params = self.weights.for_scores(self.state)
            return validation.evaluate_run(
                self.config, self.model, params, self.task, split=split, mesh=self.sampler_mesh
            )

    def _write_evaluation(self, result: validation.Evaluation, scores: dict) -> None:
        if line := result.without_verdicts():
            self._say(line)
        counts = {"iteration": self.counters.iteration, "rollouts": self.counters.rollouts}
        self.life.files.record({"kind": "evaluation", **counts, **result.row(scores)})

    # After the loop --------------------------------------------------------------------------------------

    def _finish(self) -> dict:
        final = self._test_scores()
        train_seconds = self.life.seconds(self.counters)
        cluster.where.phase = "export and report"
        unchanged = self.base.export(
            self.workdir / "hf", self.state.params, dtype=self.config.model.export_dtype, write=self.chief
        )
        if not self.chief:
            return {}
        self.life.files.flush()
        rows = files.read_jsonl(self.workdir / "metrics.jsonl")
        summary = run_summary.summarize(
            self.config,
            rows,
            base=self.counters.base,
            final=final,
            progress=dataclasses.asdict(self.counters),
            train_seconds=train_seconds,
            phases=self.timers.seconds,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            unchanged_weights=unchanged,
        )
        report.write(self.workdir, summary, rows)
        self._say("\n" + run_summary.table(summary))
        self._say(f"\nreport: {self.workdir / 'report' / 'report.html'}   model: {self.workdir / 'hf'}")
        return summary
