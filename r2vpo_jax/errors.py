"""What a user can put right, and what stops a run."""

import contextlib

_GIT_LFS = b"version https://git-lfs"


class UsageError(ValueError):
    """Something the user can put right. Shown as one line; exit code 2."""


@contextlib.contextmanager
def usage_errors(*more: type[Exception]):
    """Inside, a bad value or a missing file (or one of `more`) is the user's to put right: a UsageError."""
    try:
        yield
    except (ValueError, OSError, *more) as error:
        raise UsageError(str(error)) from error


def refuse_pointer(file) -> None:
    """Raises ValueError where a repository was cloned without the contents of this file (a path)."""
    with file.open("rb") as opened:
        if opened.read(len(_GIT_LFS)) == _GIT_LFS:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone that it comes from"
            )


class NonFiniteUpdateError(FloatingPointError):
    """An update had a NaN or infinite loss or gradient. It was not applied."""


class Stopped(Exception):
    """A run or an evaluation was stopped before its end, and saved: the same command goes on from there."""


class ClusterError(Exception):
    """A process of a run on several hosts has not come, or does not answer. Shown as one line; the same command may go well."""


class EngineError(ClusterError):
    """An engine that samples for a run does not answer. Shown as one line; the same command may go well."""
