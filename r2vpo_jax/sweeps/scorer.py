"""Scores of many runs at a time: what `evaluation.validation` does for one, with one program for all splits."""

import dataclasses
import math

import jax
import numpy as np

from r2vpo_jax import sharding
from r2vpo_jax.config import Config
from r2vpo_jax.evaluation import subsets, validation
from r2vpo_jax.sampler import Sampling
from r2vpo_jax.sweeps.program import Responses
from r2vpo_jax.tasks.base import Task


class Scorer:
    """Draws and judges, on the problems of the ordinary trainer and with its random numbers.

    A call of the program draws `sampling.group_size` samples to each of `num_problems` problems in every lane. For
    scores of runs each lane has a run and all have the same problems; for those of the base model, which all runs
    share, each lane has problems of its own.

    Args:
      config: of any of the runs.
      task: whose problems are drawn for, and who judges.

    Attributes:
      sampling, num_problems: what `Program.respond` has to be compiled for.
    """

    def __init__(self, config: Config, task: Task):
        self._config, self._task, self._splits = config, task, {}
        how = dataclasses.asdict(config.evaluation)
        batch_size = how.pop("batch_size")
        del how["segment_length"]  # the program of a whole run decodes in lock-step
        scorings = [validation.scoring_of(config, split) for split in ("validation", "test")]
        samples = math.gcd(*(scoring.num_samples for scoring in scorings))
        self.sampling: Sampling = validation.sampling(task, samples, **how)
        smaller = min(scoring.num_problems for scoring in scorings)
        self.num_problems = max(min(batch_size // samples, smaller), 1)

    def of_runs(self, respond, params, split: str, lanes: int) -> list[validation.Evaluation]:
        """The scores of each run.

        Args:
          respond: compiled `Program.respond`.
          params: [lanes, ...] of the runs.
          split: "validation" or "test".
          lanes: runs.
        """
        jobs = self._jobs(split)
        drawn = [self._draw(respond, params, split, [job] * lanes) for job in jobs]
        return [self._joined(split, [columns[lane] for columns in drawn]) for lane in range(lanes)]

    def of_one(self, respond, params, split: str, lanes: int) -> validation.Evaluation:
        """The scores of parameters that are the same in all lanes. Arguments as for `of_runs`."""
        jobs, drawn = self._jobs(split), []
        for first in range(0, len(jobs), lanes):
            some = jobs[first : first + lanes]
            filled = some + some[-1:] * (lanes - len(some))
            drawn += self._draw(respond, params, split, filled)[: len(some)]
        return self._joined(split, drawn)

    def _jobs(self, split: str) -> list[tuple[int, int]]:
        """(first problem, first sample) of each piece of work, samples innermost."""
        scoring = validation.scoring_of(self._config, split)
        problems = range(0, len(self._index(split)), self.num_problems)
        samples = range(0, scoring.num_samples, self.sampling.group_size)
        return [(problem, sample) for problem in problems for sample in samples]

    def _draw(self, respond, params, split: str, jobs) -> list[tuple[np.ndarray, ...]]:
        """(outcome [problems, n], length, truncated, tokens) of the job of each lane."""
        size, positions = self.num_problems, self._index(split)
        first = np.asarray([problem for problem, _ in jobs])
        index = positions[(first[:, None] + np.arange(size)) % len(positions)]  # what is too many is cut again
        there = self._task.problems(split, np.unique(index))
        rows = np.searchsorted(there.index, index)
        responses: Responses = sharding.to_host(
            respond(
                params,
                there.tokens[rows],
                there.length[rows],
                index.astype(np.int32),
                np.asarray([sample for _, sample in jobs], np.int32),
            )
        )
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), responses)
        repeated = np.repeat(index.reshape(-1), self.sampling.group_size)
        outcome = np.asarray(self._task.verify(split, repeated, flat.tokens, flat.length).outcome)
        columns = outcome.reshape(responses.length.shape), responses.length, responses.truncated, responses.tokens
        return list(zip(*columns, strict=True))

    def _joined(self, split: str, parts) -> validation.Evaluation:
        """The parts of all jobs, put together."""
        number = len(self._index(split))
        across = len({sample for _, sample in self._jobs(split)})

        def whole(column):
            rows = [np.concatenate(column[i : i + across], axis=1) for i in range(0, len(column), across)]
            return np.concatenate(rows)[:number]

        outcome, length, truncated, tokens = (whole(column) for column in zip(*parts, strict=True))
        shown = tokens[: validation.SHOWN, 0]
        return validation.evaluation_of(self._task, split, *self._split(split), outcome, length, truncated, shown)

    def _index(self, split: str) -> np.ndarray:
        """The problems of a split that are scored, as positions."""
        return subsets.choose(self._task, split, validation.scoring_of(self._config, split).num_problems)

    def _split(self, split: str):
        """(problems, levels) of a split; for all runs they are the same, and so are made once."""
        if split not in self._splits:
            index = self._index(split)
            self._splits[split] = self._task.problems(split, index), self._task.level(split, index)
        return self._splits[split]
