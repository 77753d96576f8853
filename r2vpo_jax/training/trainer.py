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
     fills. Learn: N minibatch updates, then one step of the multipliers.
  6. Write metrics and samples; look for signs of a collapse.
  7. Every `eval_every` iterations, score the validation split.
  8. Every `checkpoint_every` iterations, save everything the run needs to continue.

After the loop: score the test split once, export the policy as a Hugging Face directory, write the report.

A run is a function of (config, seed, code, devices): no hidden random state, no wall clock in any decision.
"""

import contextlib
import resource
import time

import jax
import numpy as np

import r2vpo_jax
from r2vpo_jax import models, sharding, tasks
from r2vpo_jax.config import Config
from r2vpo_jax.errors import NonFiniteUpdateError, UsageError, usage_errors
from r2vpo_jax.evaluation.validation import Evaluation, evaluate
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.run import console, files, instruments, report
from r2vpo_jax.run.alarms import Alarms
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.run.directory import claim
from r2vpo_jax.run.instruments import Profiler, Timers
from r2vpo_jax.run.interrupts import any_process, graceful_stop
from r2vpo_jax.training import credit, noise_floor
from r2vpo_jax.training import metrics as training_metrics
from r2vpo_jax.training.collector import Collected, Collector, train_problem_index
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.replay import ReplayBuffer, ReplayError

_AVERAGE_AT = 8  # test pass@1 is avg@8, with fewer samples avg@ all of them


def train(
    config: Config,
    workdir,
    *,
    stop_after_iteration: int | None = None,
    profile_steps=None,
    say=console.say,
) -> dict | None:
    """Run, or continue, the experiment in `workdir`.

    Args:
      config: validated.
      workdir: the run directory.
      stop_after_iteration: save and stop there; the same command later goes on. Not part of the config, so
        that it changes nothing about the run.
      profile_steps: (first, last) iterations to record with the JAX profiler under workdir/profile.
      say: where lines for people go (process 0 only).

    Returns:
      The summary of a finished run (report/summary.json), or None when it stopped early.

    Raises:
      UsageError: bad input, before anything is overwritten.
      NonFiniteUpdateError: more non-finite updates in a row than allowed; the batch is saved.
    """
    if report.is_finished(workdir):
        claim(workdir, config, write=False)
        return _show_finished(workdir, say if jax.process_index() == 0 else lambda _: None)
    run = _Run(config, workdir, profile_steps, say)
    with contextlib.closing(run.task):
        return run.go(stop_after_iteration)


def _show_finished(workdir, say) -> dict:
    summary = report.read_summary(workdir)
    say(f"{workdir} holds a finished run; its result:\n")
    say(report.table(summary))
    return summary


class _Run:
    """The parts of one run. `go` is the story; the methods are its sentences."""

    def __init__(self, config: Config, workdir, profile_steps, say):
        self.config = config
        self.chief = jax.process_index() == 0
        self._say = say if self.chief else lambda _: None
        # The cheap first: what is refused here costs no reading of data, nor of weights.
        claim(workdir, config, write=False)
        with usage_errors():
            self.mesh = sharding.make_mesh((config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
            self.base = open_base_model(config.model)
            self.model = self.base.model
            self.learner = Learner(self.model, config, self.mesh)
            self.task = tasks.make(config.task, self.base.tokenizer, self.base.eos_ids)
        try:
            self._load(workdir, profile_steps)
        except BaseException:
            self.task.close()
            raise

    def _load(self, workdir, profile_steps):
        """The weights, and the parts that need the run directory or the task."""
        config = self.config
        with usage_errors():
            self.base.check_length(self.task.max_prompt_length + self.task.max_response_length)
        self.state = self.learner.init_state(self.base.load_params(self.mesh))
        self.workdir = claim(workdir, config, write=self.chief)
        self.checkpointer = Checkpointer(
            self.workdir / "checkpoints", max_to_keep=config.trainer.max_checkpoints, write=self.chief
        )
        self.replay = ReplayBuffer(self.workdir / "replay", config.replay, config.sampler.group_size, write=self.chief)
        self.alarms = Alarms(config.alarms)
        self.profiler = Profiler(self.workdir, profile_steps)
        self.timers = Timers()
        self.collector = Collector(config, self.task, self.model, self.mesh, self.timers)
        self.sampling = self.collector.sampling
        self.key = jax.random.key(config.seed)
        self.reference = self.learner.sampler_params(self.state) if config.objective.needs_reference else None
        self.iteration = 0
        # What has happened so far, as plain numbers: goes into every checkpoint.
        self.progress = {
            "problems": 0, "rollouts": 0, "rollout_tokens": 0, "trained_tokens": 0, "nonfinite_in_a_row": 0, "seconds": 0.0,
            "best_validation": 0.0, "last_validation": 0.0, "noise_floor": None, "base": None, "positions": {},
            "code": instruments.code_identity(), "data": self.task.digest,
        }  # fmt: skip

    # The story -----------------------------------------------------------------------------------------

    def go(self, stop_after_iteration):
        total = self.config.trainer.num_iterations
        self._resume()
        self._open_files()
        with self._disk_errors(), self._closing(), graceful_stop() as stop:
            floor = self._check_noise_floor()
            if self.progress["noise_floor"] is None:
                self.progress["noise_floor"] = floor
            if self.progress["base"] is None:
                self.progress["base"] = self._test_scores()
                self._validate()
            last = total if stop_after_iteration is None else min(total, stop_after_iteration)
            progress_bar = console.Progress(total, self.iteration, enabled=self.chief)
            first_iteration, loop_start = self.iteration, time.perf_counter()
            while self.iteration < last and not any_process(stop.requested):
                with self.profiler.iteration(self.iteration + 1):
                    row = self._iterate()
                alarmed = self._sound_alarms(row)
                if self.iteration % self.config.trainer.eval_every == 0 or self.iteration == total:
                    self._validate()
                if self.iteration % self.config.trainer.checkpoint_every == 0 or self.iteration == total:
                    self._save()
                pace = (time.perf_counter() - loop_start) / (self.iteration - first_iteration)
                text = training_metrics.progress_text(
                    row,
                    validation=self.progress["last_validation"],
                    budget=self.config.objective.variance_budget,
                    seconds=sum(self.timers.seconds.values()),
                )
                progress_bar.update(self.iteration, text, pace * (total - self.iteration))
                if alarmed and self.config.alarms.stop:
                    break
            progress_bar.close()
            self._save()
            self.checkpointer.wait()
            if self.iteration < total:
                self._say(f"stopped after iteration {self.iteration} of {total}; the same command goes on from there")
                return None
            return self._finish()

    def _iterate(self) -> dict:
        config, timers = self.config, self.timers
        before = dict(timers.seconds)
        collected = self._collect()  # 1, 2, 3
        sampled = batch = collected.rollout
        if config.objective.zero_variance == "resample":
            wanted = config.trainer.prompts_per_rollout
            batch = credit.select_groups(sampled, config.objective, self.sampling.group_size, wanted)
        with timers("update"):
            batch = self._fill_advantages(batch)  # 4
            drawn = self._draw(batch)  # 5
            learned = [self._learn(d, number) for number, d in enumerate(drawn)]
        self.iteration += 1
        trained = sum(int(d.learning_mask.sum()) for d in drawn)
        self.progress["trained_tokens"] += trained * config.trainer.num_epochs
        spent = {k: v - before.get(k, 0.0) for k, v in timers.seconds.items()}
        row = self._metrics_row(sampled, drawn, learned, spent)  # 6
        row |= {f"reward/{name}": value for name, value in collected.terms.items()}
        self.files.metrics(row)
        if collected.reasons:
            self.files.event("unjudged", self.iteration, responses=len(collected.reasons), first=collected.reasons[0])
        for sample in training_metrics.samples(batch, self.task, config.trainer.samples_per_iteration):
            self.files.sample({"iteration": self.iteration, **sample})
        return row

    def _draw(self, batch: Rollout) -> list[Rollout]:
        """The batches to train on now: the one just sampled, or what the replay buffer gives."""
        config = self.config
        if not config.replay.enabled:
            return [batch]
        version = self._version()
        self.replay.add(self.iteration, batch, version=version)
        draws = []
        with usage_errors():
            for number in range(config.replay.batches_per_iteration):
                groups = config.trainer.prompts_per_rollout
                draws.append(self.replay.draw(self.iteration, groups, version=version, seed=config.seed, number=number))
        return [d for d in draws if d is not None]

    def _sound_alarms(self, row: dict) -> bool:
        raised = self.alarms.check(row) if row["kind"] == "train" else []
        for name, line in raised:
            self._say(f"ALARM {name}: {line}")
            self.files.event("alarm", self.iteration, alarm=name, message=line)
        return bool(raised)

    def _collect(self) -> Collected:
        collected = self.collector.collect(
            self.learner.sampler_params(self.state),
            position=self.progress["problems"],
            first_id=self.progress["rollouts"],
            iteration=self.iteration,
            version=self._version(),
        )
        self.progress["problems"] += collected.num_problems
        self.progress["rollouts"] += len(collected.rollout.reward)
        self.progress["rollout_tokens"] += int(collected.rollout.response_length.sum())
        return collected

    def _version(self) -> int:
        """Optimizer updates so far."""
        return int(sharding.to_host(self.state.version))

    # 0. Before the loop ----------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Continue from the last checkpoint that is intact, its replay files too; say what is not."""
        self.notices = []
        for iteration in self.checkpointer.steps():
            problem = self.checkpointer.problem(iteration) or self._restore(iteration)
            if problem is None:
                self.iteration = iteration
                self._say(f"continuing {self.workdir} from iteration {iteration}")
                break
            self.notices.append({"name": "torn", "iteration": iteration, "message": problem})
            self._say(f"checkpoint {iteration} is torn ({problem}); falling back to the one before")
        if self.progress.get("data", self.task.digest) != self.task.digest:
            raise UsageError(
                f"the problems are not those that {self.workdir} was started with; put the data sets back as they were, "
                "or choose another --workdir"
            )
        self.checkpointer.discard_after(self.iteration if self.progress["positions"] else None)
        here = instruments.code_identity()
        if self.progress["code"] != here:
            self.notices.append(
                {"name": "code_changed", "iteration": self.iteration, "before": self.progress["code"], "now": here}
            )
            self._say("warning: the code has changed since this run was started; the rest of it runs the new code")
            self.progress["code"] = here

    def _restore(self, iteration: int) -> str | None:
        """Restore a checkpoint that is intact; returns what is wrong with the replay files it needs."""
        state, progress = self.checkpointer.restore(
            iteration, self.learner.abstract_state, self.learner.state_shardings
        )
        try:
            self.replay.restore(progress["replay"])
        except ReplayError as error:
            return str(error)
        self.state, self.progress = state, progress
        self.alarms.state = progress["alarms"]
        return None

    def _open_files(self) -> None:
        resumed = bool(self.progress["positions"])
        with usage_errors():  # a file may be gone, or shorter than the checkpoint says
            self.files = files.RunFiles(
                self.workdir,
                self.progress["positions"],
                write=self.chief,
                tensorboard=self.config.trainer.tensorboard,
            )
        for notice in self.notices:
            self.files.event(**notice)
        self.files.event("resume" if resumed else "start", self.iteration, version=r2vpo_jax.__version__)
        for notice in (*self.base.notices, *self.task.notices):
            self._say(notice)
        if not resumed:
            self._say(f"mesh {dict(self.mesh.shape)}, {jax.device_count()} x {jax.devices()[0].device_kind}")
            self._say(sharding.placement_table(self.learner.logical_axes, self.learner.abstract_params, self.mesh))

    @contextlib.contextmanager
    def _closing(self):
        try:
            yield
        finally:
            with contextlib.closing(self.checkpointer), contextlib.closing(self.files):
                self.profiler.stop()

    def _check_noise_floor(self) -> float:
        """Measures it; refuses a noisy set-up, but warns only of a run that is continued: it is the run that it was."""
        params = self.learner.sampler_params(self.state)
        index = train_problem_index(self.config, 0)[: noise_floor.num_prompts(self.config)]
        rollout = self.collector.sample(params, index, iteration=self.iteration, version=self._version())
        logp = sharding.to_host(self.learner.score(self.state.params, sharding.put_batch(rollout, self.mesh)))
        floor, largest = noise_floor.measure(logp, rollout)
        limit = noise_floor.limit(self.config)
        self._say(f"noise floor: E[(r-1)^2] = {floor:.2e}, max |log r| = {largest:.2e} (limit {limit:.0e})")
        if self.progress["noise_floor"] is None:
            noise_floor.check(floor, self.config)
        elif not floor <= limit:
            self._say("warning: the noise floor has risen above its limit since the run was started")
            self.files.event("noise_floor", self.iteration, floor=floor, limit=limit)
        return floor

    # 2. to 5. --------------------------------------------------------------------------------------------

    def _fill_advantages(self, rollout: Rollout) -> Rollout:
        batch = sharding.put_batch(rollout, self.mesh)
        if self.reference is not None:
            rollout = rollout.replace(reference_logp=sharding.to_host(self.learner.score(self.reference, batch)))
        if self.config.objective.critic:
            rollout = rollout.replace(value=sharding.to_host(self.learner.values(self.state, batch)))
        kl_coef = float(sharding.to_host(self.state.kl_coef))
        return credit.fill_advantages(rollout, self.config.objective, self.sampling.group_size, kl_coef)

    def _learn(self, rollout: Rollout, number: int = 0):
        batch = sharding.put_batch(rollout, self.mesh)
        key = jax.random.fold_in(jax.random.fold_in(self.key, self.iteration), 1 + number)
        self.state, stats, variance = self.learner.train_on_rollout(self.state, batch, key)
        stats, variance = sharding.to_host((stats, variance))
        self._check_finite(batch, key, variance["nonfinite"])
        return stats, variance

    def _check_finite(self, batch: Rollout, key, nonfinite) -> None:
        for number, skipped in enumerate(np.asarray(nonfinite)):
            in_a_row = self.progress["nonfinite_in_a_row"] + 1 if skipped else 0
            self.progress["nonfinite_in_a_row"] = in_a_row
            if not skipped:
                continue
            minibatch = sharding.to_host(self.learner.minibatch(batch, key, number))
            file = self.workdir / f"nonfinite_{self.iteration}_{number}.npz"
            if self.chief:
                arrays = {k: v for k, v in vars(minibatch).items() if v is not None}
                np.savez(file, **arrays)
            self.files.event("nonfinite", self.iteration, update=number, file=file.name)
            if in_a_row > self.config.trainer.max_nonfinite_updates:
                raise NonFiniteUpdateError(
                    f"update {number} of iteration {self.iteration} had a non-finite loss or gradient and was not "
                    f"applied; its minibatch is saved in {file}. The last checkpoint is intact"
                )

    # 6. Metrics ------------------------------------------------------------------------------------------

    def _metrics_row(self, sampled: Rollout, drawn: list[Rollout], learned, spent) -> dict:
        version = self._version()
        counters = {"iteration": self.iteration, "version": version}
        counters |= {name: self.progress[name] for name in ("rollouts", "rollout_tokens")}
        if self.config.replay.enabled:
            batch = drawn[-1] if drawn else None
            before = version - len(drawn) * self.config.trainer.updates_per_rollout
            counters |= self.replay.statistics(batch, before)
            counters["replay/ratio"] = self.progress["trained_tokens"] / max(self.progress["rollout_tokens"], 1)
        shared = {"group_size": self.sampling.group_size, "counters": counters}
        if not drawn:
            return training_metrics.fill_row(self.config.objective, sampled, spent, **shared)
        return training_metrics.row(
            self.config.objective,
            sampled,
            drawn,
            learned,
            spent,
            num_epochs=self.config.trainer.num_epochs,
            variance_coef=float(sharding.to_host(self.state.dual.variance_coef)),
            kl_coef=float(sharding.to_host(self.state.kl_coef)),
            learning_rate=float(self.learner.schedule(max(version - 1, 0))),
            **shared,
        )

    # 7. and 8. -------------------------------------------------------------------------------------------

    def _evaluate(self, split: str, num_problems: int, num_samples: int) -> Evaluation:
        with self.timers("evaluation"):
            return evaluate(
                self.model,
                self.learner.sampler_params(self.state),
                self.task,
                split=split,
                num_problems=num_problems,
                num_samples=num_samples,
                mesh=self.mesh,
                batch_size=max(1, self.config.trainer.eval_batch_size // num_samples),
                temperature=self.config.trainer.eval_temperature,
                top_p=self.config.trainer.eval_top_p,
            )

    def _write_evaluation(self, result: Evaluation, scores: dict) -> None:
        self.files.metrics(
            {
                "kind": "evaluation",
                "iteration": self.iteration,
                "rollouts": self.progress["rollouts"],
                "split": result.split,
                **{k: v for k, v in scores.items() if not isinstance(v, (list, dict))},
                "response_length": float(result.response_length.mean()),
                "truncated": float(result.truncated.mean()),
                "verifier_errors": result.errors,
                "verifier_timeouts": result.timeouts,
            }
        )

    def _validate(self) -> None:
        trainer = self.config.trainer
        result = self._evaluate("validation", trainer.eval_problems, trainer.eval_samples)
        score = result.average_at(trainer.eval_samples)
        self.progress["last_validation"] = score
        self.progress["best_validation"] = max(self.progress["best_validation"], score)
        self._write_evaluation(result, {"pass_at_1": score})

    def _test_scores(self) -> dict:
        trainer = self.config.trainer
        result = self._evaluate("test", trainer.test_problems, trainer.test_samples)
        scores = result.scores(min(_AVERAGE_AT, trainer.test_samples))
        self._write_evaluation(result, scores)
        return scores

    def _save(self) -> None:
        self.checkpointer.wait()
        self.replay.collect_garbage(self.checkpointer.replay_listings())
        self.progress["positions"] = self.files.positions()
        self.progress["replay"], self.progress["alarms"] = self.replay.listing(), self.alarms.state
        progress = {**self.progress, "seconds": self._seconds()}
        self.checkpointer.save(self.iteration, self.state, progress, score=self.progress["last_validation"])

    @contextlib.contextmanager
    def _disk_errors(self):
        """A full or vanished disk is one line that says what is safe."""
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.workdir} ({error.strerror or error}); the last checkpoint is intact: make room, "
                "and the same command goes on from there"
            ) from error

    def _seconds(self) -> float:
        return self.progress["seconds"] + time.perf_counter() - r2vpo_jax.PROCESS_START

    # After the loop --------------------------------------------------------------------------------------

    def _finish(self) -> dict:
        final = self._test_scores()
        seconds = self._seconds()
        models.save_pretrained(
            self.workdir / "hf",
            self.model,
            self.state.params,
            self.base.tokenizer,
            dtype=self.config.model.export_dtype or models.stored_dtype(self.base.path),
            eos_ids=self.base.eos_ids,
            write=self.chief,
        )
        if not self.chief:
            return {}
        rows = files.read_jsonl(self.workdir / "metrics.jsonl")
        summary = report.summarize(
            self.config,
            rows,
            base=self.progress["base"],
            final=final,
            progress=self.progress,
            train_seconds=seconds,
            phases=self.timers.seconds,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        report.write(self.workdir, summary, rows)
        self._say("\n" + report.table(summary))
        self._say(f"\nreport: {self.workdir / 'report' / 'report.html'}   model: {self.workdir / 'hf'}")
        return summary
