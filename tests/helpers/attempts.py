"""Checks that go on after one of them has failed, in a process that reports them together."""

import traceback


def attempt(function, *args) -> str | None:
    """None, or the last lines of what went wrong: for whoever reads the report, which fails then."""
    try:
        function(*args)
    except Exception:
        return "\n".join(traceback.format_exc().splitlines()[-25:])
    return None
