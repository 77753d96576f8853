"""Starting, speaking to and ending one verifier process (`worker`)."""

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time

MAX_REPLY_BYTES = 1 << 20
# A process must see no accelerator.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    "TPU_VISIBLE_DEVICES": "",
    "TPU_VISIBLE_CHIPS": "",
    "XLA_FLAGS": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # SymPy's orders, and so its verdicts, are the same in all processes
    "PYTHONUNBUFFERED": "1",
}


class ProtocolError(Exception):
    """What a process sent is no reply."""


class Starter:
    """Starts processes from one thread that lives as long as they do.

    A process asks the kernel to be killed when the *thread* that started it ends; callers' threads may be short-lived.
    """

    def __init__(self):
        self._requests = queue.SimpleQueue()
        self._started = False

    def popen(self, *args, **kwargs) -> subprocess.Popen:
        if not self._started:
            self._started = True
            threading.Thread(target=_start_all, args=(self._requests,), name="verifier-starter", daemon=True).start()
        answer = queue.SimpleQueue()
        self._requests.put((args, kwargs, answer))
        process, error = answer.get()
        if error is not None:
            raise error
        return process

    def close(self) -> None:
        """Lets the thread end, and the kernel kill what it has started."""
        self._requests.put(None)


def _start_all(requests) -> None:
    while (request := requests.get()) is not None:
        args, kwargs, answer = request
        try:
            answer.put((subprocess.Popen(*args, **kwargs), None))
        except BaseException as error:
            answer.put((None, error))
        del request, args, kwargs, answer


class Process:
    """A verifier process and the pipes to it. All calls return at once."""

    def __init__(self, starter: Starter, memory_limit_mb: int):
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            request_end, self.requests = _pipe(theirs, ours)
            self.replies, reply_end = _pipe(ours, theirs)
            self._errors = ours.enter_context(tempfile.TemporaryFile())  # of the start only
            self._process = starter.popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    f"{__package__}.worker",
                    str(request_end),
                    str(reply_end),
                    str(os.getpid()),
                ]
                + [str(memory_limit_mb)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(request_end, reply_end),
                start_new_session=True,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": _import_path()},
            )
            self._descriptors = ours.pop_all()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.pid = self._process.pid
        self.loaded: set[str] = set()
        self.ready = False
        self._incoming, self._outgoing = bytearray(), bytearray()

    def send(self, request: dict) -> None:
        self._outgoing += json.dumps(request).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Whether all is sent."""
        while self._outgoing:
            try:
                sent = os.write(self.requests, memoryview(self._outgoing)[: 1 << 16])
            except BlockingIOError:
                return False
            except OSError:  # it is dead, as its end of the other pipe will say
                self._outgoing.clear()
                return True
            del self._outgoing[:sent]
        return True

    def receive(self) -> dict | None:
        """The next reply, or None while there is none.

        Raises:
          EOFError: the process has closed its end.
          ProtocolError: what came is no reply.
        """
        while b"\n" not in self._incoming:
            try:
                data = os.read(self.replies, 1 << 16)
            except BlockingIOError:
                return None
            if not data:
                raise EOFError
            self._incoming += data
            if len(self._incoming) > MAX_REPLY_BYTES:
                raise ProtocolError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
        line, _, rest = self._incoming.partition(b"\n")
        self._incoming = bytearray(rest)
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("a reply that is not JSON") from error
        if not isinstance(reply, dict):
            raise ProtocolError("a reply that is not an object")
        return reply

    def has_ended(self) -> bool:
        """Whether the process is dead; its number is not given back to the system by asking."""
        if self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def kill(self) -> None:
        """Kills the process and all of its group; `reap` afterwards."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._descriptors.close()

    def reap(self, timeout: float = 0.0) -> bool:
        """Whether it is gone, waiting up to `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(0.002)
        if not self.has_ended():
            return False
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # what it forked, once more while the number is ours
        self._process.poll()
        return True

    def ending(self) -> str:
        """How the process ended: "signal 9", "exit code 1", with the end of what it said while it started."""
        self.reap(1.0)  # its pipes close before it has ended; on a busy machine well before
        code = self._process.returncode
        how = "it closed its pipes" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        if self.ready:
            return how
        return f"{how}; {self._said()}" if self._said() else how

    def _said(self) -> str:
        try:
            self._errors.seek(0)
            return self._errors.read()[-600:].decode(errors="replace").strip()
        except (OSError, ValueError):
            return ""


def _pipe(reader_owner, writer_owner) -> tuple[int, int]:
    """Ends of a pipe, numbered beyond the standard streams even where these are closed."""
    ends = []
    for end, owner in zip(os.pipe(), (reader_owner, writer_owner), strict=True):
        number = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
        os.close(end)
        owner.callback(os.close, number)
        ends.append(number)
    return ends[0], ends[1]


def _import_path() -> str:
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)
