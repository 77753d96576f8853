"""One verifier process: `python -m r2vpo_jax.verifiers.worker IN OUT PARENT_PID MEMORY_MB`, started by `VerifierPool`.

Requests come as JSON lines on the file descriptor IN, one at a time, and each is answered by one line on OUT:

    {"id": 1, "load": "math"}                                                -> {"id": 1} or {"id": 1, "error": reason}
    {"id": 2, "kind": "math", "gold": ..., "answer": ...}                    -> {"id": 2, "right": true}
    {"id": 3, "load": "module:function"}                                     -> {"id": 3, "parameters": [...]}
    {"id": 4, "function": "module:function", "texts": [[...]], "named": {}}  -> {"id": 4, "values": [...]}

A reply with "error" says why there is no verdict, one with "spoiled" that this process had better be replaced.

Time is not watched here: whoever started the process kills it. It ends with the process that started it, and so do the
processes that it forks; these cannot answer for it. What is printed here goes nowhere.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys

from r2vpo_jax.verifiers import functions
from r2vpo_jax.verifiers.kinds import KINDS

_MAX_REASON = 400
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    source, sink, parent, memory_mb = map(int, arguments)
    _end_with(parent)
    _limit(memory_mb)
    own = os.getpid()
    forking = [own]  # the process that forks: asked afterwards, a child may already have another parent
    os.register_at_fork(
        before=lambda: forking.__setitem__(0, os.getpid()),
        after_in_child=lambda: _become_child(forking[0], source, sink),
    )
    importlib.import_module("r2vpo_jax.verifiers.answers")
    requests = os.fdopen(source, "rb", closefd=False)
    _answer(sink, {"id": 0})
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    for line in requests:
        reply = _handle(json.loads(line))
        if os.getpid() != own:
            os._exit(0)  # a forked child that came back from user code
        _answer(sink, reply)
    os._exit(0)  # without waiting for threads that user code has left


def _end_with(parent: int) -> None:
    """Death of the thread that started this process, and so of its process, kills it, whatever it is doing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was quicker
        os._exit(1)


def _limit(memory_mb: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_mb * 2**20
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    with contextlib.suppress(ValueError, OSError):  # not to be had on every system
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _become_child(parent: int, source: int, sink: int) -> None:
    for descriptor in (source, sink):
        with contextlib.suppress(OSError):  # user code may have closed it
            os.close(descriptor)
    _end_with(parent)


def _answer(sink: int, reply: dict) -> None:
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(sink, data) :]


def _handle(request: dict) -> dict:
    number = request["id"]
    try:
        if "load" in request:
            return {"id": number, **_load(request["load"])}
        if "function" in request:
            function = _function(request["function"])
            return {"id": number, "values": functions.call(function, request["texts"], request["named"])}
        return {"id": number, "right": bool(KINDS[request["kind"]].judge(request))}
    except MemoryError:
        return {"id": number, "error": "MemoryError: over the memory limit of the verifier", "spoiled": True}
    except BaseException as error:
        return {"id": number, "error": _reason(error), "spoiled": isinstance(error, RecursionError)}


def _reason(error: BaseException) -> str:
    """Type, message, and where it happened."""
    try:
        message = str(error)
    except Exception:
        message = "(no message)"
    where, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if os.path.dirname(code.co_filename) != os.path.dirname(__file__) and not code.co_filename.startswith("<"):
            where = f" ({os.path.basename(code.co_filename)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {message}"[:_MAX_REASON] + where


# What is judged ----------------------------------------------------------------------------------------------


def _load(name: str) -> dict:
    """Imports what a kind or function needs and warms it up, outside the time limit of the items; what a function wants."""
    if ":" in name:
        return {"parameters": functions.parameters(_function(name))}
    if KINDS[name].warm_up is not None:
        KINDS[name].warm_up()
    return {}


def _function(path: str):
    module, _, name = path.partition(":")
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{path} is not a function")
    return function


if __name__ == "__main__":
    main(sys.argv[1:])
