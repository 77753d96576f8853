"""What a task is: problems by (split, index), and a verdict on each response."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct

from r2vpo_jax.verifiers.outcome import SPLITS, Outcome

__all__ = ["SPLITS", "Outcome", "Problems", "Task", "Verdicts", "judge_of", "stop_of"]


@struct.dataclass
class Problems:
    """A batch of problems, prompts left-padded to the task's maximal prompt length."""

    index: np.ndarray  # int32 [N] positions in the split
    tokens: np.ndarray  # int32 [N, P]
    length: np.ndarray  # int32 [N] prompt tokens


class Verdicts(NamedTuple):
    """The verdicts on a batch of B responses."""

    reward: np.ndarray  # f32 [B] sum of the terms; 0 where there is no verdict
    outcome: np.ndarray  # int32 [B] `Outcome`
    terms: Mapping[str, np.ndarray] = MappingProxyType({})  # name -> f32 [B] weighted parts of the reward, if several;
    # NaN where a part does not apply to a response, 0 where there is no verdict
    reasons: tuple[str, ...] = ()  # why there is no verdict, "" where there is one; () if all have one


class Task(Protocol):
    """Random access to problems, and a total verifier.

    Splits are disjoint: `train` for rollouts, `validation` for periodic evaluation and for choosing
    checkpoints and hyper-parameters, `test` for the base and the final score only.
    """

    name: str
    max_prompt_length: int
    max_response_length: int
    eos_ids: tuple[int, ...]
    digest: str  # identity of all problems: changes if their text does
    notices: list[str]  # what a user should know of the data

    def problems(self, split: str, index) -> Problems:
        """The problems at the positions `index`, int [N]. A position of a split is always the same problem."""

    def num_problems(self, split: str) -> int | None:
        """How many problems a split has; None if there is no end to them. In `train`, later positions go round again."""

    def verify(self, split: str, index, responses, lengths) -> Verdicts:
        """Verdicts on responses int [B, T] to the problems at index int [B].

        Never raises on a response. A response without a verdict has reward 0 and is reported as such. On several
        processes all call it with the same arguments, and get the same.
        """

    def answers(self, split: str, index, responses, lengths) -> list[str | None]:
        """The final answer in each response, in a form in which equal answers are equal; None: there is none."""

    def level(self, split: str, index) -> np.ndarray:
        """[N]: a label of each problem, int or text, for tables by level."""

    def decode(self, tokens) -> str:
        """Token ids to text, for samples and reports."""

    def close(self) -> None:
        """Ends what the task has started, such as processes."""


def judge_of(task: Task):
    """`verify` for responses that this process alone has: the method `judge` of a task that has one, which asks no other
    process. Of the others `verify` is a function of its arguments, and serves."""
    return getattr(task, "judge", task.verify)


def stop_of(task: Task) -> np.ndarray | None:
    """The table of the strings that end a response (models/stops.py), of a task that has an attribute `stop`."""
    return getattr(task, "stop", None)


@runtime_checkable
class TraceableTask(Protocol):
    """What a task has besides if its problems and verdicts are JAX: it can be part of a compiled program."""

    def traced_problems(self, split: str, index) -> tuple[jax.Array, jax.Array]:
        """(tokens int32 [N, P], lengths int32 [N]) of the problems at the positions index, int [N]."""

    def traced_verify(self, split: str, index, responses, lengths) -> tuple[jax.Array, jax.Array]:
        """(rewards f32 [B], outcomes int32 [B]) of responses int32 [B, T] to the problems at index, int [B]."""
