"""Processes come together: threads here, which talk over the loopback as processes do."""

import concurrent.futures
import socket
import threading
import time

import pytest

from r2vpo_jax.cluster import checkin
from r2vpo_jax.cluster.place import Place
from r2vpo_jax.errors import ClusterError, UsageError
from tests.helpers.processes import free_port


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(checkin, "_FIRST", 0.2)
    monkeypatch.setattr(checkin, "_EVERY", 0.4)
    monkeypatch.setattr(checkin, "_RETRY", 0.02)


def together(numbers, total, *, facts=None, timeout=20, port=None, totals=None):
    """What check_in returned or raised for each process, and what was said."""
    port, facts, lines = port or free_port(), facts or {}, []
    with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
        futures = [
            pool.submit(
                checkin.check_in,
                Place(f"127.0.0.1:{port}", (totals or {}).get(number, total), number),
                facts.get(number, {"seed": 0}),
                timeout=timeout,
                say=lines.append,
            )
            for number in numbers
        ]
    return [future.exception() or future.result() for future in futures], lines


def test_all_come():
    results, _ = together((0, 1, 2), 3)
    assert results == [[socket.gethostname()] * 3] * 3


def test_who_is_missing_is_said():
    results, lines = together((0, 2), 5, timeout=1.0)
    assert lines[0].startswith("waiting for 3 of 5 hosts: processes 1, 3, 4 (")
    for result in results:
        assert isinstance(result, ClusterError)
        assert "waited 1 s in vain for 3 of 5 hosts: processes 1, 3, 4; look at their logs" in str(result)
    results, lines = together((1,), 2, timeout=1.0)
    assert "process 1 waits for process 0 at" in lines[0]
    assert "could not reach process 0" in str(results[0])


def test_other_facts_are_refused_on_all():
    facts = {0: {"seed": 0, "rate": 0.1}, 1: {"seed": 1, "rate": 0.1}, 2: {"seed": 1, "jax": "1"}}
    results, _ = together((0, 1, 2), 3, facts=facts)
    for result in results:
        assert isinstance(result, UsageError)
        assert str(result).startswith(
            "the processes of this run differ (seed: 0 on process 0, 1 on processes 1, 2; jax: absent on process 0, 1 on process 2; "
            "rate: 0.1 on process 0, absent on process 2); "
        )


@pytest.mark.parametrize(
    ("numbers", "totals", "said"),
    [
        ((0, 1, 1), {}, "two processes say that they are process 1"),
        ((0, 1), {1: 4}, "was started as one of 4, process 0 as one of 3"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers, totals, said):
    results, _ = together(numbers, 3, totals=totals, timeout=2)
    assert isinstance(results[0], UsageError)
    assert said in str(results[0])
    assert any(said in str(result) for result in results[1:])


def test_strangers_and_the_dead_do_not_count():
    port = free_port()

    def disturb():
        for talk in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\n", b'{"process": 1}\n', b""):
            for _ in range(200):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                        connection.recv(100)
                        connection.sendall(talk)
                        break
                except OSError:
                    time.sleep(0.02)

    thread = threading.Thread(target=disturb)
    thread.start()
    results, _ = together((0,), 2, timeout=1.5, port=port)
    thread.join()
    assert "1 of 2 hosts: process 1" in str(results[0])


def test_a_run_that_has_not_ended_yet_is_waited_for():
    """JAX's coordinator of the run before still listens at the port; then it goes away."""
    port = free_port()
    old = socket.create_server(("127.0.0.1", port))

    def serve():
        connection, _ = old.accept()
        connection.sendall(b"\0\0\0 something else entirely, and longer than the greeting\n")
        time.sleep(0.2)
        connection.close()
        old.close()

    threading.Thread(target=serve).start()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        lines = []
        other = pool.submit(checkin.check_in, Place(f"127.0.0.1:{port}", 2, 1), {}, timeout=20, say=lines.append)
        time.sleep(0.5)
        first = pool.submit(checkin.check_in, Place(f"127.0.0.1:{port}", 2, 0), {}, timeout=20, say=lines.append)
        assert first.result() == other.result()


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        results, _ = together((0,), 2, port=taken.getsockname()[1])
    assert "process 0 cannot listen at port" in str(results[0])
