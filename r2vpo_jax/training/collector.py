"""Verified responses to the next problems of the train split."""

import dataclasses

import jax
import numpy as np

from r2vpo_jax.config import Config
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.rows import Rows, joined, rows_on_both
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.sampler import OwnSampler, Sampler, Sampling
from r2vpo_jax.sampler.endpoint import Endpoint, EndpointSampler
from r2vpo_jax.tasks.base import Task, Verdicts, judge_of, stop_of
from r2vpo_jax.training import credit, metrics
from r2vpo_jax.training.iteration import problem_positions, rollout_key


@dataclasses.dataclass(frozen=True)
class Collected:
    """What one iteration has sampled."""

    parts: tuple[Rollout, ...]  # verified, this process's rows of each batch; several with dynamic sampling
    outline: Rollout  # of all rows, on every process (`rows.Rows.outline`)
    num_problems: int
    terms: dict[str, float]  # mean of each part of the reward over verdicts, if it has several
    num_reasons: int  # responses of which is said why there is no verdict
    first_reason: str | None  # of the first of them

    @property
    def rollout(self) -> Rollout:
        """This process's rows of all parts."""
        return self.parts[0] if len(self.parts) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *self.parts)


def sampling_of(config: Config, task: Task) -> Sampling:
    """How the responses that a run learns from are sampled."""
    return Sampling(
        temperature=config.sampler.temperature,
        group_size=config.sampler.group_size,
        max_response_length=task.max_response_length,
        eos_ids=task.eos_ids,
        stop=stop_of(task),
    )


def _sampler_of(config: Config, model, mesh, engine: Endpoint | None) -> Sampler:
    if engine is not None:
        return EndpointSampler(engine, model, config.sampler.stop)
    how = {"buckets": config.sampler.prompt_buckets, "segment_length": config.sampler.segment_length}
    return OwnSampler(model, mesh, batch_size=config.prompts_at_once, **how)


class Collector:
    """Samples and verifies.

    Args:
      config: the run's.
      task, model: the run's.
      mesh: that samples.
      timers: "rollout", "verify" and "sync" are timed.
      learner_mesh: where rollouts go then; default the same.
      engine: that samples in place of this program.
    """

    def __init__(
        self, config: Config, task: Task, model, mesh, timers: Timers, learner_mesh=None, engine: Endpoint | None = None
    ):
        self._config, self._task, self._mesh, self._timers = config, task, mesh, timers
        self._learner_mesh = learner_mesh or mesh
        self._sampler = _sampler_of(config, model, mesh, engine)
        self.statistics = self._sampler.statistics
        self._key = jax.random.key(config.seed)
        self.rows = self.rows_of(config.trainer.prompts_per_rollout)
        self.sampling = sampling_of(config, task)

    def rows_of(self, num_prompts: int) -> Rows:
        """How the responses to so many prompts are spread over processes, on the mesh that samples."""
        return rows_on_both(self._mesh, self._learner_mesh, num_prompts, self._config.sampler.group_size)[0]

    def learner_rows_of(self, num_prompts: int) -> Rows:
        """The same on the mesh that learns: every process has the same rows on both."""
        return rows_on_both(self._mesh, self._learner_mesh, num_prompts, self._config.sampler.group_size)[1]

    def problem_index(self, position: int) -> np.ndarray:
        """Positions in the train split of the next problems, int64 [prompts_per_rollout].

        Args:
          position: problems that the run has taken so far.
        """
        return problem_positions(self._config.seed, position, self._config.trainer.prompts_per_rollout)

    def sample(self, params, index, *, iteration: int, version: int) -> Rollout:
        """This process's rows of G responses to each of the train problems at `index`, not verified, on the host."""
        problems = self._task.problems("train", index)
        return self._sampler.sample(
            params,
            problems.tokens,
            problems.length,
            rollout_key(self._key, iteration),
            self.sampling,
            problem_ids=problems.index,
            version=version,
            rows=self.rows_of(len(index)),
        )

    def verify(self, index, rollout: Rollout) -> tuple[Rollout, Verdicts]:
        """The rollout with rewards and outcomes, and all that the task said.

        Args:
          index: of all problems.
          rollout: this process's rows of the responses to them.
        """
        rows = self.rows_of(len(index))
        judge = self._task.verify if rows.is_all else judge_of(self._task)
        index = np.repeat(index, rows.group_size)[rows.index]
        said = judge("train", index, rollout.response_tokens, rollout.response_length)
        reward, outcome, terms = rows.of_leader((said.reward, said.outcome, dict(said.terms)))
        said = said._replace(reward=reward, outcome=outcome, terms=terms)
        parts = None
        if self._config.objective.advantage.by_function and terms:
            parts = np.stack(list(terms.values()), axis=1)
        return rollout.replace(reward=reward, outcome=outcome, reward_parts=parts), said

    def collect(self, params, *, position: int, first_id: int, iteration: int, version: int) -> Collected:
        """Verified responses to the next problems; with dynamic sampling to as many as it takes.

        Args:
          params: of the sampler.
          position: problems that the run has taken so far.
          first_id: responses that the run has sampled so far.
          iteration, version: of the run; version is stamped on the rollout.
        """
        objective, wanted = self._config.objective, self._config.trainer.prompts_per_rollout
        resample = objective.groups.zero_variance == "resample"
        parts, outlines, verdicts, differing = [], [], [], 0
        for _ in range(1 + (objective.groups.max_resamples if resample else 0)):
            index = self.problem_index(position + wanted * len(parts))
            with self._timers("rollout"):
                rollout = self.sample(params, index, iteration=iteration, version=version)
                before = first_id + len(parts) * wanted * self.sampling.group_size
                rollout = rollout.replace(rollout_id=rollout.rollout_id + np.int32(before))
            with self._timers("verify"):
                rollout, said = self.verify(index, rollout)
            parts.append(rollout)
            verdicts.append(said)
            with self._timers("sync"):  # where the processes meet
                outlines.append(self.rows.outline(rollout))
            differing += credit.groups_differ(outlines[-1], objective, self.sampling.group_size).sum()
            if differing >= wanted:
                break
        terms = [self.rows.whole(said.terms) for said in verdicts]
        number, first = self._reasons([said.reasons for said in verdicts])
        return Collected(
            parts=tuple(parts),
            outline=joined(outlines),
            num_problems=wanted * len(parts),
            terms=metrics.of_terms(terms, [outline.outcome for outline in outlines]),
            num_reasons=number,
            first_reason=first,
        )

    def _reasons(self, reasons) -> tuple[int, str | None]:
        """How many reasons there are of all rows, and the first of them."""
        index = self.rows.index.tolist()
        mine = [(number, index[i], text) for number, part in enumerate(reasons) for i, text in enumerate(part) if text]
        said = self.rows.exchange([len(mine), min(mine, default=None)])
        firsts = [tuple(first) for _, first in said if first is not None]
        return sum(number for number, _ in said), min(firsts)[2] if firsts else None
