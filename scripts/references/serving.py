"""The worker's side of the conversation with benchmark.py: one JSON object a line, requests in and answers out.

What a worker or a library prints goes to standard error, so that standard output holds answers alone.
"""

import json
import os
import sys


def serve(programs) -> None:
    """Answer requests until standard input ends.

    Args:
      programs: an object with prepare(program) -> facts, round() -> seconds and release(); an exception ends the process,
        and its last line is what the other side reports.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(programs, request["call"])(*request["arguments"])
        print(json.dumps(answer), file=answers, flush=True)
