"""What a task is: problems by (split, index), and a verdict on each response."""

import enum
from typing import Protocol

import numpy as np
from flax import struct

SPLITS = ("train", "validation", "test")


class Outcome(enum.IntEnum):
    """The verdict on one response. ERROR means that the verifier could not tell; it is counted apart."""

    WRONG = 0
    RIGHT = 1
    ERROR = 2


@struct.dataclass
class Problems:
    """A batch of problems, prompts left-padded to the task's maximal prompt length."""

    index: np.ndarray  # int32 [N] position in the split
    tokens: np.ndarray  # int32 [N, P]
    length: np.ndarray  # int32 [N] prompt tokens


class Task(Protocol):
    """Random access to problems, and a total verifier.

    Splits are disjoint: `train` for rollouts, `validation` for periodic evaluation and for choosing
    checkpoints and hyper-parameters, `test` for the base and the final score only.
    """

    name: str
    max_prompt_length: int
    max_response_length: int
    eos_ids: tuple[int, ...]

    def problems(self, split: str, index) -> Problems:
        """The problems at these positions, int [N]; the same answer for the same (split, index), always."""

    def verify(self, split: str, index, responses, lengths) -> tuple[np.ndarray, np.ndarray]:
        """(reward f32 [B], outcome int32 [B]) of responses int [B, T] to the problems at index int [B].

        Never raises on a response. A reward of outcome ERROR is 0 and is reported as an error.
        """

    def level(self, split: str, index) -> np.ndarray:
        """int32 [N]: a difficulty label of each problem, for tables by level."""

    def check_tokenizer(self, tokenizer) -> None:
        """Raises ValueError when the checkpoint's tokenizer does not speak this task's language."""

    def decode(self, tokens) -> str:
        """Token ids to text, for samples and reports."""
