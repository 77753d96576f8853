"""Problems to outcomes: samples are drawn and judged here, for scores while training and for benchmarks alike."""

import dataclasses

import numpy as np

from r2vpo_jax import sampler
from r2vpo_jax.sampler import Sampling
from r2vpo_jax.tasks.base import Outcome, Problems, Task


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What became of k responses to each of N problems."""

    outcomes: np.ndarray  # int32 [N, k] `Outcome`
    lengths: np.ndarray  # int32 [N, k]
    truncated: np.ndarray  # bool [N, k]
    tokens: np.ndarray  # int32 [N, k, T] responses
    reasons: list[list[str]]  # [N][k] why there is no verdict; "" where there is one
    answers: list[list[str | None]]  # [N][k] final answers; None where there is none, or where they were not asked for

    @property
    def right(self) -> np.ndarray:
        """bool [N, k]"""
        return self.outcomes == Outcome.RIGHT

    def count(self, outcome: Outcome) -> int:
        """Responses with this outcome."""
        return int((self.outcomes == outcome).sum())

    def text(self, task: Task, problem: int, number: int = 0) -> str:
        """One response as text."""
        return task.decode(self.tokens[problem, number, : self.lengths[problem, number]])


def draw(
    model,
    params,
    task: Task,
    split: str,
    problems: Problems,
    sampling: Sampling,
    key,
    *,
    mesh,
    batch_size: int,
    segment_length: int = sampler.SEGMENT_LENGTH,
    fill_to: int = 0,
    answers: bool = False,
) -> Outcomes:
    """Sample k = `sampling.group_size` responses to each problem, and judge them.

    A draw depends on (key, problem, number of the sample) alone: two models, or the same at two times, are compared on
    the same problems with the same random numbers, however many samples are drawn and however they are batched.

    Args:
      model, params: the policy; params in its compute dtype.
      task, split: whose problems they are, and who judges.
      problems: N problems.
      sampling: temperature and so on.
      key: a typed PRNG key.
      mesh: where to compute.
      batch_size: most responses that are sampled at one time, though never less than one.
      segment_length: as for `sampler.generate`.
      fill_to: a batch of fewer problems is filled up to this size and cut again, so that one program does them all.
      answers: whether final answers are looked for.

    Raises:
      ValueError: as `sampler.generate`.
    """
    count, k = len(problems.index), sampling.group_size
    filled = np.resize(np.arange(count), max(count, fill_to))
    at_once = min(k, batch_size)
    parts = []
    for first in range(0, k, at_once):
        rollout = sampler.generate(
            model,
            params,
            problems.tokens[filled],
            problems.length[filled],
            key,
            sampling.replace(group_size=min(at_once, k - first)),
            mesh=mesh,
            problem_ids=problems.index[filled],
            first_sample=first,
            batch_size=max(1, batch_size // k),
            segment_length=segment_length,
        )
        columns = rollout.response_tokens, rollout.response_length, rollout.truncated
        parts.append([x.reshape(len(filled), -1, *x.shape[1:])[:count] for x in columns])
    tokens, lengths, truncated = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))

    index, rows, row_lengths = np.repeat(problems.index, k), tokens.reshape(count * k, -1), lengths.reshape(-1)
    verdicts = task.verify(split, index, rows, row_lengths)
    found = task.answers(split, index, rows, row_lengths) if answers else [None] * (count * k)

    def grouped(values) -> list[list]:
        return [list(values[i : i + k]) for i in range(0, count * k, k)]

    return Outcomes(
        outcomes=np.asarray(verdicts.outcome).reshape(count, k),
        lengths=lengths,
        truncated=truncated,
        tokens=tokens,
        reasons=grouped(verdicts.reasons or [""] * (count * k)),
        answers=grouped(found),
    )
