"""Outcomes and splits by name. Imports nothing, so that verifier processes start fast."""

import enum

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
