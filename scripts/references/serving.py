"""What every worker of benchmark.py has in common: one program at a time, and the conversation over pipes.

One JSON object a line, requests in and answers out. What a worker or a library prints goes to standard error, so that
standard output holds answers alone. Only the standard library is needed here.
"""

import json
import os
import sys
import time


class Steps:
    """Programs that are prepared, measured and released on request; `_NAME()` of a subclass makes each.

    It returns (step, facts): `step` runs the program to its end and may return more facts. After a first step the facts
    must hold `tokens` and `lengths` (of the responses) of a call. `compile_seconds` and `program_bytes` are what a compiler says.
    """

    _step = None

    def prepare(self, program: str) -> dict:
        """Make a program and run it once: its facts, first_seconds of that call and peak_bytes of the device."""
        self.release()
        self._step, facts = getattr(self, f"_{program}")()
        start = time.perf_counter()
        facts |= self._step() or {}
        return facts | {"first_seconds": time.perf_counter() - start, "peak_bytes": self.peak_bytes()}

    def round(self) -> float:
        """Seconds of one call of the program that was prepared."""
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start

    def release(self) -> None:
        """Let go of the program's arrays."""
        self._step = None

    def peak_bytes(self) -> int | None:
        """The most that the device has held; None where it does not count."""
        return None


def serve(steps: Steps) -> None:
    """Answer requests until standard input ends.

    An exception ends the process, and its last line is what the other side reports.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(steps, request["call"])(*request["arguments"])
        print(json.dumps(answer), file=answers, flush=True)
