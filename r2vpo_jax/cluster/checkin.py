"""All processes of a run come together before JAX is started: who is missing is known, and who does not belong is refused.

JAX's coordinator, and with it its key-value store, answers nobody before all have come. So process 0 first listens at the
coordinator's port itself: every process says its number and its facts (configuration, code, versions) there and waits. When
all have, the port is free for JAX.
"""

import contextlib
import dataclasses
import ipaddress
import json
import select
import socket
import time
from collections.abc import Callable, Mapping

from r2vpo_jax.cluster.facts import differences, names
from r2vpo_jax.cluster.place import Place
from r2vpo_jax.errors import ClusterError, UsageError

_GREETING = b"r2vpo_jax check-in 1\n"  # JAX's own coordinator, of a run that has not ended yet, does not say this
_LONGEST = 1 << 22  # bytes of a message
_FIRST, _EVERY = 3.0, 10.0  # seconds: when the first line says who is missing, and between two
_RETRY = 0.5  # seconds between two tries to reach process 0


def check_in(place: Place, facts: Mapping[str, object], *, timeout: float, say: Callable[[str], None]) -> list[str]:
    """Wait until all processes have come, and have the same facts.

    Args:
      place: of this process.
      facts: JSON-compatible values by name, alike on all processes of a run.
      timeout: seconds until it is given up.
      say: where lines about missing processes go.

    Returns:
      The name of the host of each process.

    Raises:
      UsageError: facts differ, two processes have one number, or the port is taken.
      ClusterError: a process has not come in time.
    """
    mine = {
        "process": place.process_id,
        "processes": place.num_processes,
        "host": socket.gethostname(),
        "facts": dict(facts),
    }
    if place.process_id == 0:
        return _Desk(place, mine, timeout, say).serve()
    return _go_to_desk(place, mine, timeout, say)


# Process 0 ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Visitor:
    connection: socket.socket
    received: bytes = b""
    said: dict | None = None  # once its line has come


class _Desk:
    def __init__(self, place: Place, mine: dict, timeout: float, say):
        self._place, self._mine, self._timeout, self._say = place, mine, timeout, say
        self._visitors: list[_Visitor] = []

    def serve(self) -> list[str]:
        start = time.monotonic()
        spoken = start + _FIRST - _EVERY
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(self._listen())
            stack.callback(lambda: [visitor.connection.close() for visitor in self._visitors])
            while missing := self._missing():
                now = time.monotonic()
                whom = f"{len(missing)} of {self._place.num_processes} hosts: {names(missing)}"
                if now - start > self._timeout:
                    late = (
                        f"waited {self._timeout:.0f} s in vain for {whom}; look at their logs, start the same command on all, and "
                        "raise --initialization_timeout_seconds if they only take long"
                    )
                    self._answer({"late": late})
                    raise ClusterError(late)
                if now - spoken >= _EVERY:
                    self._say(f"waiting for {whom} ({now - start:.0f} of {self._timeout:.0f} s)")
                    spoken = now
                try:
                    self._listen_for(listener, 0.5)
                except UsageError as error:
                    self._answer({"error": str(error)})
                    raise
            all_facts = {visitor.said["process"]: visitor.said["facts"] for visitor in self._visitors}
            if differ := differences({0: self._mine["facts"], **all_facts}):
                self._answer({"error": differ})
                raise UsageError(differ)
            hosts = {0: self._mine["host"]} | {v.said["process"]: v.said["host"] for v in self._visitors}
            hosts = [hosts[i] for i in range(self._place.num_processes)]
            listener.close()  # before the others are sent on: the next to listen here is JAX
            self._answer({"hosts": hosts})
            return hosts

    def _listen(self) -> socket.socket:
        host, port = self._place.address
        try:
            if _is_loopback(host):
                return socket.create_server((host, port), family=_family(host))
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as error:
            raise UsageError(
                f"process 0 cannot listen at port {port} ({error.strerror or error}): end what uses it, or give all processes "
                "another port by --coordinator_address=HOST:PORT or JAX_COORDINATOR_PORT"
            ) from error

    def _missing(self) -> set[int]:
        come = {visitor.said["process"] for visitor in self._visitors if visitor.said}
        return set(range(1, self._place.num_processes)) - come

    def _listen_for(self, listener: socket.socket, seconds: float) -> None:
        ready, _, _ = select.select([listener, *(v.connection for v in self._visitors)], [], [], seconds)
        for visitor in [v for v in self._visitors if v.connection in ready]:
            if not self._hear(visitor):
                visitor.connection.close()
                self._visitors.remove(visitor)
        if listener in ready:
            connection, _ = listener.accept()
            connection.setblocking(False)
            with contextlib.suppress(OSError):  # it is gone again: it comes back
                connection.send(_GREETING)
                self._visitors.append(_Visitor(connection))

    def _hear(self, visitor: _Visitor) -> bool:
        """False where it has gone, or is nobody of ours."""
        try:
            part = visitor.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        visitor.received += part
        if not part or len(visitor.received) > _LONGEST:
            return False
        if visitor.said is None and visitor.received.endswith(b"\n"):
            try:
                said = json.loads(visitor.received)
                number, total, _, _ = said["process"], said["processes"], said["host"], said["facts"].keys
            except (ValueError, KeyError, TypeError, AttributeError):
                return False
            self._check_number(number, total, said["host"])
            visitor.said = said
        return True

    def _check_number(self, number: int, total: int, host: str) -> None:
        there = {v.said["process"]: v.said["host"] for v in self._visitors if v.said} | {0: self._mine["host"]}
        if total != self._place.num_processes:
            raise UsageError(
                f"process {number} on {host} was started as one of {total}, process 0 as one of {self._place.num_processes}: give "
                "all the same --num_processes"
            )
        if number in there or not 0 <= number < total:
            raise UsageError(
                f"two processes say that they are process {number} (on {there.get(number, '?')} and on {host}): give each its own "
                "--process_id"
            )

    def _answer(self, what: dict) -> None:
        line = json.dumps(what).encode() + b"\n"
        for visitor in self._visitors:
            with contextlib.suppress(OSError):  # it is gone: the watch, or the next start, says so
                visitor.connection.settimeout(5)
                visitor.connection.sendall(line)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


# The others --------------------------------------------------------------------------------------------------


def _go_to_desk(place: Place, mine: dict, timeout: float, say) -> list[str]:
    start = time.monotonic()
    spoken, why = start + _FIRST - _EVERY, "nobody answers"
    while True:
        waited = time.monotonic() - start
        if waited > timeout:
            raise ClusterError(
                f"process {place.process_id} could not reach process 0 at {place.coordinator} for {timeout:.0f} s ({why}): is it "
                f"started, and does the network let port {place.address[1]} through?"
            )
        if time.monotonic() - spoken >= _EVERY:
            say(
                f"process {place.process_id} waits for process 0 at {place.coordinator} ({why}; {waited:.0f} of {timeout:.0f} s)"
            )
            spoken = time.monotonic()
        try:
            with socket.create_connection(place.address, timeout=5) as connection:
                answer = _talk(connection, mine, start + timeout)
        except OSError as error:
            answer, why = None, error.strerror or str(error) or type(error).__name__
        if answer and "error" in answer:
            raise UsageError(answer["error"])
        if answer and "late" in answer:
            raise ClusterError(answer["late"])
        if answer:
            return answer["hosts"]
        time.sleep(_RETRY)


def _talk(connection: socket.socket, mine: dict, deadline: float) -> dict | None:
    """What process 0 answers; None where somebody else listens there."""
    with connection.makefile("rb") as lines:
        if lines.readline(len(_GREETING)) != _GREETING:
            raise OSError("another program answers there, perhaps a run that has not ended yet")
        connection.sendall(json.dumps(mine).encode() + b"\n")
        connection.settimeout(
            max(deadline - time.monotonic(), 1) + 10
        )  # process 0 gives up first, and says who is missing
        line = lines.readline(_LONGEST)
        if not line.endswith(b"\n"):
            raise OSError("process 0 went away")
        return json.loads(line)
