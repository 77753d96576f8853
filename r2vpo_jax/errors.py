"""What a user can put right, and what stops a run."""

import contextlib


class UsageError(ValueError):
    """Something the user can put right. Shown as one line; exit code 2."""


@contextlib.contextmanager
def usage_errors(*more: type[Exception]):
    """Inside, a bad value or a missing file (or one of `more`) is the user's to put right: a UsageError."""
    try:
        yield
    except (ValueError, OSError, *more) as error:
        raise UsageError(str(error)) from error


class NonFiniteUpdateError(FloatingPointError):
    """An update had a NaN or infinite loss or gradient. It was not applied."""


class Stopped(Exception):
    """A run or an evaluation was stopped before its end, and saved: the same command goes on from there."""
