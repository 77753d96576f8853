"""Outcomes and splits by name, and what is judged. Imports nothing of the package, so that verifier processes start fast."""

import enum
from typing import NamedTuple

SPLITS = ("train", "validation", "test")


class Outcome(enum.IntEnum):
    """The outcome of judging one response. ERROR and TIMEOUT mean that there is no verdict; they are counted apart from WRONG."""

    WRONG = 0
    RIGHT = 1
    ERROR = 2  # the verifier could not tell
    TIMEOUT = 3  # the verifier did not end in time


def unjudged(outcome):
    """Where there is no verdict: bool, of the shape of `outcome`."""
    return (outcome == Outcome.ERROR) | (outcome == Outcome.TIMEOUT)


class Check(NamedTuple):
    """A response to be judged against a gold answer."""

    kind: str  # one of KINDS
    gold: str  # the right answer; reasoning_gym: JSON, see `procedural.right`
    response: str  # whole text, thinking included


class Judgement(NamedTuple):
    """Whether one response is right, or why nobody could tell."""

    outcome: Outcome
    reason: str = ""  # why there is no verdict
    applies: bool = True  # False: a reward function says that it has none to give (None or NaN)
