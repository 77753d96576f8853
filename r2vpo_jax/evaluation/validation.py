"""Scores on held-out problems: pass@1 as avg@k, unbiased pass@k, intervals over problems."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from r2vpo_jax.config import Config
from r2vpo_jax.evaluation import estimators, subsets
from r2vpo_jax.evaluation.draws import draw
from r2vpo_jax.sampler import SEGMENT_LENGTH, Sampling
from r2vpo_jax.tasks.base import Outcome, Problems, stop_of

# Evaluation draws depend on nothing of the run: the same problems and keys for base, best and final.
_KEY_SEED = 0x5EED
SHOWN = 3  # problems whose first response is kept as text
AVERAGE_AT = 8  # samples per test problem that pass@1 is averaged over


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Outcomes of n samples on each problem of a split."""

    split: str
    right: np.ndarray  # bool [problems, n]
    errors: int  # responses that the verifier could not judge, counted as not right
    timeouts: int  # those on which it ran out of time, counted as not right
    level: np.ndarray  # [problems] labels
    response_length: np.ndarray  # int32 [problems, n]
    truncated: np.ndarray  # bool [problems, n]
    texts: tuple[str, ...]  # first response to each of the first problems
    prompts: tuple[str, ...]
    reason: str = ""  # the first why there is no verdict

    @property
    def judged(self) -> bool:
        """Whether any response has a verdict."""
        return self.errors + self.timeouts < self.right.size

    def without_verdicts(self) -> str:
        """A line that says so if most responses have no verdict; else ""."""
        number = self.errors + self.timeouts
        if 2 * number <= self.right.size:
            return ""
        return (
            f"{self.split}: {number} of {self.right.size} responses have no verdict, and count as not right; the first "
            f"reason: {self.reason or 'the task gives no reason'}"
        )

    def average_at(self, k: int) -> float:
        """avg@k: mean over problems and their first k samples; an estimate of pass@1."""
        return float(self.right[:, :k].mean())

    def interval_at(self, k: int) -> tuple[float, float]:
        """95 % bootstrap interval of avg@k, over problems."""
        return estimators.bootstrap_interval(self.right[:, :k].mean(axis=1))

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k from all n samples."""
        return float(estimators.pass_at_k(self.right.shape[1], self.right.sum(axis=1), k).mean())

    def row(self, scores: dict) -> dict:
        """Its line of metrics.jsonl, with those of the scores that are plain numbers."""
        return {
            "split": self.split,
            **{name: value for name, value in scores.items() if not isinstance(value, (list, dict))},
            "response_length": float(self.response_length.mean()),
            "truncated": float(self.truncated.mean()),
            "verifier_errors": self.errors,
            "verifier_timeouts": self.timeouts,
        }

    def scores(self, average_over: int) -> dict:
        """Everything that a table says of it: pass@1 as avg@`average_over` with its interval, by level; pass@n."""
        low, high = self.interval_at(average_over)
        samples = self.right.shape[1]
        return {
            "pass_at_1": self.average_at(average_over),
            "pass_at_1_low": low,
            "pass_at_1_high": high,
            "problems": len(self.right),
            "average_at": average_over,
            "k": samples,
            "pass_at_k": self.pass_at(samples),
            "by_level": {
                str(level): float(self.right[self.level == level, :average_over].mean())
                for level in sorted(set(self.level.tolist()))
            },
            "samples": [list(pair) for pair in zip(self.prompts, self.texts, strict=True)],
        }


def average_over(config: Config) -> int:
    """Samples per test problem that pass@1 is averaged over: 8, or all where there are fewer."""
    return min(AVERAGE_AT, config.trainer.test_samples)


class Scoring(NamedTuple):
    """How much is sampled for one score."""

    num_problems: int
    num_samples: int  # of each problem


def scoring_of(config: Config, split: str) -> Scoring:
    """The numbers of problems and samples that a run has for its validation or test split."""
    trainer = config.trainer
    return {
        "validation": Scoring(trainer.eval_problems, trainer.eval_samples),
        "test": Scoring(trainer.test_problems, trainer.test_samples),
    }[split]


def sampling(task, num_samples: int, *, temperature=1.0, top_p=1.0, top_k=0) -> Sampling:
    """How the responses to each problem are sampled for a score.

    Args:
      task: a `tasks.base.Task`.
      num_samples: samples per problem.
      temperature: 0 is greedy.
      top_p, top_k: 1 and 0 keep all tokens.
    """
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        group_size=num_samples,
        max_response_length=task.max_response_length,
        eos_ids=task.eos_ids,
        stop=stop_of(task),
    )


def key():
    """The key of all evaluations of runs: the same problems and draws for base, best and final."""
    return jax.random.key(_KEY_SEED)


def evaluation_of(
    task, split: str, problems: Problems, level, outcome, lengths, truncated, shown, reason=""
) -> Evaluation:
    """What became of n samples on each of N problems of a split.

    Args:
      task: decodes.
      split, problems, level: what was sampled for, and its labels.
      outcome: int32 [N, n] `Outcome`.
      lengths: int32 [N, n].
      truncated: bool [N, n].
      shown: int32 [at least min(SHOWN, N), T] first response to each of the first problems.
      reason: the first why there is no verdict.
    """
    some = range(min(SHOWN, len(problems.index)))
    return Evaluation(
        split=split,
        right=outcome == Outcome.RIGHT,
        errors=int((outcome == Outcome.ERROR).sum()),
        timeouts=int((outcome == Outcome.TIMEOUT).sum()),
        level=level,
        response_length=lengths,
        truncated=truncated,
        texts=tuple(task.decode(shown[i, : lengths[i, 0]]) for i in some),
        prompts=tuple(task.decode(problems.tokens[i, -problems.length[i] :]) for i in some),
        reason=reason,
    )


def evaluate_run(config: Config, model, params, task, *, split: str, mesh) -> Evaluation:
    """`evaluate` with the numbers of problems and samples that a run has for its validation or test split."""
    settings = scoring_of(config, split)._asdict() | dataclasses.asdict(config.evaluation)
    return evaluate(model, params, task, split=split, mesh=mesh, **settings)


def evaluate(
    model,
    params,
    task,
    *,
    split: str,
    num_problems: int,
    num_samples: int,
    mesh,
    batch_size=1024,
    segment_length=SEGMENT_LENGTH,
    **how,
) -> Evaluation:
    """Sample and judge problems of a split, with the keys that all evaluations of runs have.

    Args:
      model, params: the policy; params in its compute dtype.
      task: a `tasks.base.Task`.
      split: "validation" while training; "test" for base and final scores only.
      num_problems: all of the split if it has no more, else a fixed sample (`subsets`).
      num_samples: samples per problem.
      mesh: the run's mesh.
      batch_size: responses sampled at one time.
      segment_length: as for `sampler.generate`.
      **how: temperature, top_p and top_k of `sampling`.
    """
    problems = task.problems(split, subsets.choose(task, split, num_problems))
    drawn = draw(
        model,
        params,
        task,
        split,
        problems,
        sampling(task, num_samples, **how),
        key(),
        mesh=mesh,
        batch_size=batch_size,
        segment_length=segment_length,
    )
    level = task.level(split, problems.index)
    shown = drawn.tokens[:SHOWN, 0]
    reason = next((reason for row in drawn.reasons for reason in row if reason), "")
    columns = drawn.outcomes, drawn.lengths, drawn.truncated, shown, reason
    return evaluation_of(task, split, problems, level, *columns)
