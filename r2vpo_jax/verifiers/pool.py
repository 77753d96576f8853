"""Judging many responses in processes that can be killed.

One call of `check` is an event loop in the caller's thread, whichever that is (no signals are used):

  1. final answers are extracted here, in linear time; equal (kind, gold, answer) are judged once
  2. each idle process gets one item; what the item's kind needs is imported first, outside the item's time limit
  3. an answer, or the deadline, or the end of the process closes the item; in the last two cases the process group is
     killed, another process is started, and the other items go on meanwhile
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import os
import re
import selectors
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from r2vpo_jax import waits
from r2vpo_jax.verifiers import answers, extraction, functions, notation
from r2vpo_jax.verifiers.kinds import KINDS
from r2vpo_jax.verifiers.outcome import Check, Judgement, Outcome
from r2vpo_jax.verifiers.process import Process, ProtocolError, Starter

STARTUP_LIMIT = 60.0  # seconds for a process to start, or to import a kind or a function
RIGHT_ABOVE = 0.5  # value of a user's function that counts as right
_MAX_FAILED_STARTS = 3
_POLL = 0.05  # seconds between looks at processes that may have died with their pipe held open by a child


_WRONG, _RIGHT = Judgement(Outcome.WRONG), Judgement(Outcome.RIGHT)
_NOT_APPLICABLE = Judgement(Outcome.ERROR, "the function does not apply: it returned None or NaN", applies=False)


@dataclasses.dataclass
class _Job:
    load: str  # what must be imported: a kind, or module:function
    request: dict  # for the worker, without id; {} if loading is all
    done: Callable[[dict | Judgement], None]  # gets the reply, or the judgement where there is none


@dataclasses.dataclass
class _Slot:
    """A process and what it is doing."""

    process: Process | None = None
    job: _Job | None = None
    loading: str | None = None
    number: int = 0  # of the request whose reply is awaited
    deadline: float = math.inf


class VerifierPool:
    """Verifier processes: CPU only, limited in time and memory, replaced when they fail.

    A response never raises and never costs more than `time_limit` seconds. Its `Outcome` says what happened: TIMEOUT where the
    time limit was exceeded; ERROR, with a reason, for an exception, a process that died, a text that is too long, or a gold
    answer that cannot be judged against.

    Args:
      num_workers: processes; they start with the first call.
      time_limit: seconds per response, from when a process that is ready gets it; imports do not count.
      max_chars: a longer response is an ERROR and is not looked at.
      memory_limit_mb: address space of each process, MiB. JAX in a function of yours takes several thousand.
      tolerance: relative tolerance of kind "numeric".
      answer: where in a response its final answer is, one of RESPONSE_STYLES.

    Raises:
      ValueError: parameters out of range, unknown `answer`.
    """

    def __init__(
        self,
        num_workers: int = 2,
        time_limit: float = 5.0,
        max_chars: int = 200_000,
        memory_limit_mb: int = 2048,
        tolerance: float = answers.TOLERANCE,
        answer: str = "final",
    ):
        if num_workers < 1 or time_limit <= 0 or max_chars < 1 or memory_limit_mb < 1 or tolerance < 0:
            raise ValueError("num_workers, time_limit, max_chars and memory_limit_mb must be > 0, tolerance >= 0")
        if answer not in extraction.RESPONSE_STYLES:
            raise ValueError(f"answer={answer!r} is unknown; one of {', '.join(extraction.RESPONSE_STYLES)}")
        self.time_limit, self.max_chars, self.tolerance = float(time_limit), max_chars, tolerance
        self.answer = answer
        self._memory_limit_mb = memory_limit_mb
        self._lock = threading.Lock()
        self._slots = [_Slot() for _ in range(num_workers)]
        self._dying: list[Process] = []
        self._functions: dict[str, functions.Parameters] = {}  # of those that could be imported once
        self._starter = Starter()
        self._owner = os.getpid()
        self._number = self._failed_starts = 0
        self._closed = False
        self._finalizer = weakref.finalize(self, _end, self._slots, self._dying, self._starter, self._owner)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Ends all processes; the pool cannot be used afterwards."""
        with self._lock:
            self._closed = True
            self._finalizer()

    # Answers -------------------------------------------------------------------------------------------

    def check(self, checks: Sequence[Check]) -> list[Judgement]:
        """Judgements, in the order of the checks.

        A response without a final answer is WRONG. The answer is `extract(response, answer)` with the pool's `answer`; kind
        "reasoning_gym" takes the answer tag, the box, or all that follows the thinking for "final".

        Raises:
          ValueError: unknown kind, or a package that it needs is missing; nothing about a response.
          RuntimeError: processes do not start, or the pool is closed.
        """
        judgements: list[Judgement | None] = [None] * len(checks)
        waiting: dict[tuple, list[int]] = collections.defaultdict(list)
        for kind in {kind for kind, _, _ in checks}:
            _check_kind(kind)
        for row, (kind, gold, response) in enumerate(checks):
            if len(response) > self.max_chars:
                judgements[row] = self._too_long(response)
                continue
            text = kind == "reasoning_gym"
            whole = text and self.answer == "final"
            answer = extraction.extract_text(response) if whole else extraction.extract(response, self.answer)
            if answer is None or (len(answer) > notation.MAX_ANSWER_CHARS and not text):
                judgements[row] = _WRONG
            else:
                waiting[kind, gold, answer].append(row)
        self._judge(waiting, judgements)
        return judgements

    def check_gold(self, pairs: Sequence[tuple[str, str]]) -> dict[int, str]:
        """Row -> reason of the (kind, gold) pairs of which the gold is not judged right against itself.

        The gold is written into a box. Plain numbers are known to be good.
        """
        judgements: list[Judgement | None] = [None] * len(pairs)
        waiting: dict[tuple, list[int]] = collections.defaultdict(list)
        for row, (kind, gold) in enumerate(pairs):
            _check_kind(kind)
            if kind == "reasoning_gym":
                waiting[kind, gold, None].append(row)  # the answer that the generator has stored
            elif re.fullmatch(r"-?\d{1,300}", gold, re.ASCII):
                judgements[row] = _RIGHT
            elif extraction.extract(rf"\boxed{{{gold}}}") is None or len(gold) > notation.MAX_ANSWER_CHARS:
                judgements[row] = Judgement(Outcome.WRONG, "empty, too long, or with braces that do not match")
            else:
                waiting[kind, gold, extraction.extract(rf"\boxed{{{gold}}}")].append(row)
        with waits.told("checking gold answers", len(waiting), "answers") as wait:
            self._judge(waiting, judgements, wait)
        return {
            row: judgement.reason or "is judged wrong against itself"
            for row, judgement in enumerate(judgements)
            if judgement.outcome != Outcome.RIGHT
        }

    def _judge(self, waiting, judgements, wait: waits.Wait | None = None) -> None:
        def done(rows, reply):
            if wait is not None:
                wait.add(1)
            if not isinstance(reply, Judgement):
                right = reply.get("right")
                if right not in (True, False):
                    reply = Judgement(Outcome.ERROR, str(reply.get("error", "no verdict in the reply")))
                else:
                    reply = _RIGHT if right else _WRONG
            for row in rows:
                judgements[row] = reply

        jobs = []
        for (kind, gold, answer), rows in waiting.items():
            request = {"kind": kind, "gold": gold, "answer": answer, "tolerance": self.tolerance}
            jobs.append(_Job(kind, request, functools.partial(done, rows)))
        self._run(jobs)

    def _too_long(self, response) -> Judgement:
        return Judgement(Outcome.ERROR, f"response of {len(response)} characters, the limit is {self.max_chars}")

    # Functions of the user -----------------------------------------------------------------------------------

    def check_function(self, function: str) -> functions.Parameters:
        """Imports "module:function" in a verifier process.

        Returns:
          What it wants.

        Raises:
          ValueError: it cannot be imported, or not in STARTUP_LIMIT seconds.
        """
        if not re.fullmatch(r"[\w.]+:[\w.]+", function):
            raise ValueError(f"reward function {function!r} must be written module:function")
        if function not in self._functions:
            replies = []
            self._run([_Job(function, {}, replies.append)])
            reply = replies[0]
            problem = reply.reason if isinstance(reply, Judgement) else reply.get("error", "")
            if problem:
                raise ValueError(f"reward function {function!r} cannot be imported: {problem}")
            self._functions[function] = functions.Parameters(*reply["parameters"])
        return self._functions[function]

    def score(
        self,
        function: str,
        questions,
        responses,
        answers,
        batch_size: int = 32,
        columns: Mapping[str, Sequence] = MappingProxyType({}),
    ):
        """Values of a reward function of the user, batch by batch; `functions` says how it is called.

        A batch has `time_limit` seconds. If it fails (by an exception, the time limit, the end of the process, or a wrong number
        of values), all of its rows get that outcome, so that smaller batches lose less. A value that is no finite number costs
        its own row only; so does None or NaN, which says that the function does not apply.

        Args:
          function: module:function.
          questions, responses, answers: texts, as many of each.
          batch_size: responses per call.
          columns: further arguments by name, an element for each response: those of `functions.KNOWN`, and columns of the
            data. JSON must hold them.

        Returns:
          (values float32 [N], nan where there is none; judgements [N], RIGHT where the value is above RIGHT_ABOVE).

        Raises:
          ValueError: the function cannot be imported or wants an argument that is not there, or lengths differ.
          RuntimeError: processes do not start, or the pool is closed.
        """
        import numpy as np

        if not len(questions) == len(responses) == len(answers) or batch_size < 1:
            raise ValueError("questions, responses and answers must be as many, batch_size at least 1")
        wanted = self.check_function(function)
        texts = dict(zip(functions.OURS, (questions, responses, answers), strict=True))
        there = {"prompts": questions, "completions": responses} | dict(columns) | texts
        if missing := [name for name in wanted.required if name not in there]:
            raise ValueError(
                f"reward function {function!r} wants {', '.join(missing)}, and there is no such column; there are "
                f"{', '.join(sorted(there))}. Give the parameter a default if it can do without"
            )
        names = wanted.names() | (columns.keys() - set(functions.KNOWN) if wanted.every_column else set())
        named = {name: there[name] for name in sorted(names) if name in there}
        if wanted.by_name and not named:
            raise ValueError(
                f"reward function {function!r} takes no argument that there is: {', '.join(sorted(there))}"
            )
        positional = [] if wanted.by_name else list(texts.values())
        values = np.full(len(responses), np.nan, np.float32)
        judgements = [self._too_long(r) if len(r) > self.max_chars else None for r in responses]

        def done(rows, reply):
            found = reply if isinstance(reply, Judgement) else _values(reply, len(rows))
            for number, row in enumerate(rows):
                judgements[row] = found if isinstance(found, Judgement) else _judgement_of_value(found[number])
                if not judgements[row].reason:
                    values[row] = found[number]

        rows = [row for row, judgement in enumerate(judgements) if judgement is None]
        jobs = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            request = {
                "function": function,
                "texts": [[column[row] for row in batch] for column in positional],
                "named": {name: [column[row] for row in batch] for name, column in named.items()},
            }
            jobs.append(_Job(function, request, functools.partial(done, batch)))
        self._run(jobs)
        return values, judgements

    # The event loop ------------------------------------------------------------------------------------------

    def _run(self, jobs: list[_Job]) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier pool is closed")
            if os.getpid() != self._owner:
                raise RuntimeError("the verifier pool was made before a fork; make one in each process")
            queue = collections.deque(jobs)
            try:
                with selectors.DefaultSelector() as selector:
                    while queue or any(slot.job for slot in self._slots):
                        self._fill(queue)
                        self._wait(selector)
                        self._poll()
            except BaseException:
                for slot in self._slots:  # their answers are not waited for
                    if slot.job is not None:
                        self._drop(slot)
                raise
            self._reap()

    def _fill(self, queue) -> None:
        """Gives jobs to slots without one, and the next request to processes that are ready for one."""
        for slot in self._slots:
            if slot.job is None and queue:
                slot.job = queue.popleft()
                if slot.process is not None and slot.process.has_ended():  # idle, and killed from outside
                    process, slot.process = slot.process, None
                    self._terminate(process)
                if slot.process is not None:
                    self._send_next(slot)
            if slot.job is not None and slot.process is None:
                self._start(slot)

    def _start(self, slot) -> None:
        slot.process = Process(self._starter, self._memory_limit_mb)
        slot.number, slot.deadline = 0, time.monotonic() + STARTUP_LIMIT

    def _send_next(self, slot) -> None:
        """Sends the slot's next request: what to import, or its job."""
        job = slot.job
        self._number += 1
        slot.number = self._number
        if job.load not in slot.process.loaded:
            slot.loading, slot.deadline = job.load, time.monotonic() + STARTUP_LIMIT
            slot.process.send({"id": slot.number, "load": job.load})
        else:
            slot.loading, slot.deadline = None, time.monotonic() + self.time_limit
            slot.process.send({"id": slot.number, **job.request})

    def _wait(self, selector) -> None:
        """Until there is something to read or write, or the next deadline."""
        busy = [slot for slot in self._slots if slot.job is not None]
        wanted = {}
        for slot in busy:
            wanted[slot.process.replies] = selectors.EVENT_READ
            if not slot.process.flush():
                wanted[slot.process.requests] = selectors.EVENT_WRITE
        for descriptor in set(selector.get_map()) - set(wanted):
            selector.unregister(descriptor)
        for descriptor, events in wanted.items():
            if descriptor not in selector.get_map():
                selector.register(descriptor, events)
        nearest = min((slot.deadline for slot in busy), default=0.0)
        selector.select(max(0.0, min(_POLL, nearest - time.monotonic())))

    def _poll(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.job is None:
                continue
            try:
                reply = slot.process.receive()
                if reply is not None:
                    self._receive(slot, reply)
                elif now >= slot.deadline:
                    self._expire(slot)
                elif slot.process.has_ended() and slot.process.receive() is None:
                    raise EOFError
            except EOFError:
                self._died(slot)
            except ProtocolError as error:  # it does not keep to the protocol
                self._fail(slot, Judgement(Outcome.ERROR, f"verifier process sent {error}"))
        self._reap()

    def _receive(self, slot, reply) -> None:
        if reply.get("id") != slot.number:
            raise ProtocolError("a reply to no question")
        if not slot.process.ready:
            slot.process.ready, self._failed_starts = True, 0
        elif slot.loading is not None:
            if "error" in reply:
                self._load_failed(slot, reply["error"])
                return
            slot.process.loaded.add(slot.loading)
            if not slot.job.request:
                self._finish(slot, reply)
                return
        else:
            if reply.get("spoiled"):
                self._fail(slot, reply)
            else:
                self._finish(slot, reply)
            return
        self._send_next(slot)

    def _finish(self, slot, result) -> None:
        job, slot.job, slot.loading, slot.deadline = slot.job, None, None, math.inf
        job.done(result)

    def _fail(self, slot, result) -> None:
        """Closes the job with this judgement or reply and kills the process."""
        process, slot.process = slot.process, None
        self._terminate(process)
        self._finish(slot, result)

    def _expire(self, slot) -> None:
        if slot.loading is None and slot.process.ready:
            self._fail(slot, Judgement(Outcome.TIMEOUT, f"no verdict in {self.time_limit:g} seconds"))
        elif slot.process.ready:
            self._load_failed(slot, f"not imported in {STARTUP_LIMIT:g} seconds")
        else:
            self._start_failed(slot, f"not ready in {STARTUP_LIMIT:g} seconds")

    def _died(self, slot) -> None:
        ending = slot.process.ending()
        if not slot.process.ready:
            self._start_failed(slot, ending)
        elif slot.loading is not None:
            self._load_failed(slot, f"the verifier process ended: {ending}")
        else:
            self._fail(slot, Judgement(Outcome.ERROR, f"verifier process ended: {ending}"))

    def _start_failed(self, slot, reason) -> None:
        """Tries again with another process, a few times."""
        process, slot.process = slot.process, None
        self._terminate(process)
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            self._failed_starts = 0
            raise RuntimeError(f"verifier processes do not start: {reason}")

    def _load_failed(self, slot, reason) -> None:
        job = slot.job
        self._fail(slot, Judgement(Outcome.ERROR, reason))
        if job.load in KINDS and KINDS[job.load].package is not None:
            raise ValueError(f"kind {job.load!r} cannot be used: {reason}")

    def _drop(self, slot) -> None:
        process, slot.process, slot.job, slot.loading = slot.process, None, None, None
        if process is not None:
            self._terminate(process)

    def _terminate(self, process) -> None:
        process.kill()
        self._dying.append(process)

    def _reap(self) -> None:
        self._dying[:] = [process for process in self._dying if not process.reap()]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of a verifier; one of {', '.join(KINDS)}")
    if KINDS[kind].package is not None and not _is_installed(KINDS[kind].package[0]):
        package = KINDS[kind].package[1]
        raise ValueError(f"kind {kind!r} needs the package {package}: pip install 'r2vpo_jax[reasoning]'")


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _values(reply: dict, size: int) -> list | Judgement:
    if "error" in reply:
        return Judgement(Outcome.ERROR, str(reply["error"]))
    values = reply.get("values")
    if not isinstance(values, list) or len(values) != size:
        return Judgement(Outcome.ERROR, "the reply does not have a value for each response")
    return values


def _judgement_of_value(value) -> Judgement:
    if value is None:
        return _NOT_APPLICABLE
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        reason = value.get("error") if isinstance(value, dict) else None
        return Judgement(Outcome.ERROR, str(reason or f"no value in the reply: {value!r:.40}"))
    return _RIGHT if value > RIGHT_ABOVE else _WRONG


def _end(slots: list[_Slot], dying: list[Process], starter: Starter, owner: int) -> None:
    if os.getpid() != owner:  # a forked copy of the pool: the processes are its parent's
        return
    for slot in slots:
        if slot.process is not None:
            slot.process.kill()
            dying.append(slot.process)
            slot.process = slot.job = None
    for process in dying:
        process.reap(timeout=5.0)
    dying.clear()
    starter.close()
