"""What goes wrong in a verifier process costs its own item at most the time limit, and nobody else anything."""

import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from r2vpo_jax.verifiers import Check, VerifierPool
from r2vpo_jax.verifiers.outcome import Outcome
from tests.verifiers.test_verifiers_functions import FUNCTIONS

RIGHT, WRONG, ERROR, TIMEOUT = Outcome.RIGHT, Outcome.WRONG, Outcome.ERROR, Outcome.TIMEOUT
LIMIT = 1.0  # seconds an item
SLACK = 10.0  # seconds for starting processes again, on a loaded machine; without limits these tests never end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """On the import path of this process, and so of the verifier processes."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "fault_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    (folder / "fault_broken.py").write_text("1 / 0\n")
    (folder / "fault_deadly.py").write_text("import os; os._exit(7)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("CHILDREN", str(folder / "children"))
        patch.setenv("VICTIM", str(folder / "victim"))
        yield folder


@pytest.fixture(scope="module")
def pool(folder):
    with VerifierPool(num_workers=2, time_limit=LIMIT, memory_limit_mb=512, max_chars=100_000) as pool:
        pool.check([Check("math", r"\sqrt{2}", r"\boxed{\sqrt2}")] * 2)
        yield pool


def score(pool, function, responses, batch_size=1):
    return pool.score(
        f"fault_functions:{function}", [""] * len(responses), responses, [""] * len(responses), batch_size
    )


def processes_of(pool):
    return [slot.process.pid for slot in pool._slots if slot.process is not None]


def is_alive(pid):
    """Whether it runs; a zombie that nobody has fetched yet does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


ALONE = ["good", "poor", "bad", "good", "poor", "good"]


@pytest.mark.parametrize(
    ("function", "outcome", "reason"),
    [
        ("loop", TIMEOUT, "no verdict in 1 seconds"),
        ("big_power", TIMEOUT, "no verdict in 1 seconds"),
        ("raises", ERROR, "KeyError: 'no such thing' (fault_functions.py:"),
        ("exits", ERROR, "SystemExit: 0"),
        ("dies", ERROR, "verifier process ended: exit code 0"),
        ("segfaults", ERROR, "verifier process ended: signal 11"),
        ("interrupts", ERROR, "KeyboardInterrupt"),
        ("closes", ERROR, "verifier process ended: exit code"),
        ("floods", ERROR, "verifier process sent a reply of more than"),
        ("recurses", ERROR, "RecursionError"),
        ("forked_liar", ERROR, "RuntimeError: the parent says so"),
        ("forked_returns", ERROR, "RuntimeError: the parent says so"),
        ("forked_returns_of_libc", ERROR, "RuntimeError: the parent says so"),
        ("answers_early", ERROR, "verifier process sent a reply to no question"),
        ("says_nonsense", ERROR, "verifier process sent a reply that is not JSON"),
        ("leaves_child_of_libc", ERROR, "verifier process ended: exit code 3"),
        ("leaves_child_in_session", ERROR, "verifier process ended: exit code 3"),
    ],
)
def test_a_fault_costs_its_own_item_only(pool, function, outcome, reason):
    pool.check_function(f"fault_functions:{function}")
    start = time.monotonic()
    values, judgements = score(pool, function, ALONE)
    assert time.monotonic() - start < LIMIT + SLACK
    assert [j.outcome for j in judgements] == [RIGHT, WRONG, outcome, RIGHT, WRONG, RIGHT]
    assert judgements[2].reason.startswith(reason)
    np.testing.assert_array_equal(values, np.float32([1, 0, np.nan, 1, 0, 1]))
    assert values.dtype == np.float32
    # and the pool goes on
    assert [j.outcome for j in score(pool, function, ["good", "poor"])[1]] == [RIGHT, WRONG]


def test_printing_is_not_answering(pool):
    values, judgements = score(pool, "prints", ALONE)
    assert values.tolist() == [1, 0, 0, 1, 0, 1]
    assert not any(j.reason for j in judgements)
    assert all(os.fstat(slot.process._errors.fileno()).st_size < 1000 for slot in pool._slots)  # it is kept nowhere


@pytest.mark.parametrize(
    ("function", "reason"), [("hogs", "MemoryError: over the memory limit"), ("recurses", "RecursionError")]
)
def test_processes_that_ran_out_of_something_are_replaced(folder, function, reason):
    with VerifierPool(num_workers=1, time_limit=20, memory_limit_mb=512) as pool:
        assert score(pool, function, ["good"])[0].tolist() == [1]
        before = processes_of(pool)
        judgements = score(pool, function, ALONE)[1]
        assert [j.outcome for j in judgements] == [RIGHT, WRONG, ERROR, RIGHT, WRONG, RIGHT]
        assert judgements[2].reason.startswith(reason)
        assert processes_of(pool) != before


@pytest.mark.parametrize("function", ["leaves_child", "leaves_child_of_libc", "leaves_child_in_session"])
def test_children_go_with_their_process(folder, function):
    (folder / "children").unlink(missing_ok=True)
    with VerifierPool(num_workers=1, time_limit=LIMIT) as pool:
        score(pool, function, ["bad", "good"])
        child = int((folder / "children").read_text())
        if function == "leaves_child":  # nobody has died yet
            assert is_alive(child)
    assert wait_until(lambda: not is_alive(child))


def test_a_process_killed_from_outside(pool, folder):
    (folder / "victim").unlink(missing_ok=True)

    def kill():
        if wait_until(lambda: (folder / "victim").exists() and (folder / "victim").read_text()):
            os.kill(int((folder / "victim").read_text()), 9)

    killer = threading.Thread(target=kill)
    killer.start()
    judgements = score(pool, "waits", ALONE)[1]
    killer.join()
    assert [j.outcome for j in judgements] == [RIGHT, WRONG, ERROR, RIGHT, WRONG, RIGHT]
    assert judgements[2].reason == "verifier process ended: signal 9"


def test_idle_processes_killed_from_outside_are_replaced(pool):
    pids = processes_of(pool)
    for pid in pids:
        os.kill(pid, 9)
    assert wait_until(lambda: not any(map(is_alive, pids)))
    judgements = pool.check([Check("numeric", str(n), rf"\boxed{{{n % 3}}}") for n in range(6)])
    assert [j.outcome for j in judgements] == [RIGHT] * 3 + [WRONG] * 3


def test_expressions_that_never_end(pool):
    monster = "9^{9^{9^{9}}}"
    checks = [
        Check("math", r"\sqrt{2}", r"\boxed{2^{1/2}}"),
        Check("math", "5", rf"\boxed{{{monster}}}"),
        Check("math", r"\sqrt{3}", r"\boxed{2^{1/2}}"),
        Check("math", r"\sqrt{5}", r"\boxed{5^{1/2}}"),
    ]
    start = time.monotonic()
    judgements = pool.check(checks)
    assert time.monotonic() - start < LIMIT + SLACK
    assert [j.outcome for j in judgements] == [RIGHT, TIMEOUT, WRONG, RIGHT]
    assert judgements[1].reason == "no verdict in 1 seconds"


def test_each_of_several_monsters_has_the_time_limit(pool):
    checks = [Check("math", str(n), r"\boxed{9^{9^{9^{9}}}}") for n in range(4)] + [Check("math", "5", r"\boxed{5}")]
    start = time.monotonic()
    outcomes = [j.outcome for j in pool.check(checks)]
    assert outcomes == [TIMEOUT] * 4 + [RIGHT]
    # two processes, two monsters each
    assert 2 * LIMIT <= time.monotonic() - start < 2 * LIMIT + 2 * SLACK


def test_a_megabyte(pool):
    start = time.monotonic()
    judgements = pool.check(
        [
            Check("math", "7", "7" * 1_000_000),
            Check("math", "7", "x" * 99_000 + r"\boxed{7}"),
            Check("math", "7", r"\boxed{" + "7" * 90_000 + "}"),  # short enough to be read, too long to be an answer
        ]
    )
    assert time.monotonic() - start < LIMIT + SLACK
    assert [j.outcome for j in judgements] == [ERROR, RIGHT, WRONG]
    assert judgements[0].reason == "response of 1000000 characters, the limit is 100000"
    values, judgements = score(pool, "raises", ["good", "x" * 200_000, "good"], batch_size=3)
    assert [j.outcome for j in judgements] == [RIGHT, ERROR, RIGHT]
    assert values.tolist()[::2] == [1, 1]


def test_requests_larger_than_a_pipe(folder):
    with VerifierPool(num_workers=2, time_limit=20, max_chars=300_000) as pool:
        responses = ["x" * 250_000, "good"] * 8
        values, _ = score(pool, "raises", responses, batch_size=8)
    assert values.tolist() == [0, 1] * 8


def test_batches_share_their_fate(pool):
    judgements = score(pool, "raises", ["good", "bad", "good", "poor"], batch_size=2)[1]
    assert [j.outcome for j in judgements] == [ERROR, ERROR, RIGHT, WRONG]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("too_few", "ValueError: the function returned 1 values for 3 responses"),
        ("words", "the value is no number but a str 'one'"),
        (
            "nothing",
            "TypeError: the function returned nothing; a list of one number for each of the 3 responses is needed",
        ),
    ],
)
def test_values_of_no_use(pool, function, reason):
    values, judgements = score(pool, function, ["good", "bad", "good"], batch_size=3)
    assert [j.outcome for j in judgements] == [ERROR] * 3
    assert all(j.reason.startswith(reason) for j in judgements)
    assert np.isnan(values).all()


def test_values_that_are_not_finite_cost_their_row(pool):
    values, judgements = score(pool, "not_finite", ["good", "bad", "big", "poor"], batch_size=4)
    assert [j.outcome for j in judgements] == [RIGHT, ERROR, ERROR, WRONG]
    assert "not a finite float32" in judgements[2].reason
    assert [j.applies for j in judgements] == [True, False, True, True], "NaN says that the function does not apply"
    np.testing.assert_array_equal(values, np.float32([1, np.nan, np.nan, 0]))


def test_rows_stay_together(pool):
    names = [str(n) for n in range(11)]
    questions, answers = ["q" + n for n in names], ["a" + n for n in names]
    answers[4] = "a0"
    values, _ = pool.score("fault_functions:by_column", questions, names, answers, batch_size=3)
    assert values.tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fault_missing:f", "No module named 'fault_missing'"),
        ("fault_functions:missing", "has no attribute 'missing'"),
        ("fault_functions:os", "is not a function"),
        ("fault_broken:f", "ZeroDivisionError"),
        ("fault_deadly:f", "the verifier process ended: exit code 7"),
        ("fault_functions", "must be written module:function"),
    ],
)
def test_functions_that_cannot_be_imported(pool, function, message):
    with pytest.raises(ValueError, match=message):
        pool.check_function(function)
    with pytest.raises(ValueError, match=message):
        pool.score(function, ["q"], ["good"], ["a"])
    assert [j.outcome for j in score(pool, "raises", ["good"])[1]] == [RIGHT]


def test_no_accelerator_and_no_jax(folder):
    names = ["jax", "flax", "transformers", "torch", "math_verify"]
    with VerifierPool(num_workers=1, time_limit=20) as pool:
        assert score(pool, "environment", names, batch_size=5)[0].tolist() == [1, 1, 1, 1, 0]


def test_from_a_thread_that_ends(folder):
    """Processes outlive the thread that asked for them."""
    found = []
    with VerifierPool(num_workers=2, time_limit=20) as pool:

        def call():
            found.append([j.outcome for j in pool.check([Check("math", "5", r"\boxed{5}"), Check("exact", "5", "6")])])
            found.append(processes_of(pool))

        for _ in range(2):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            time.sleep(0.1)
    assert found[0] == found[2] == [RIGHT, WRONG]
    assert found[1] == found[3]
    assert len(found[1]) == 2


def test_threads_at_the_same_time(pool):
    found = {}

    def call(n):
        found[n] = [j.outcome for j in pool.check([Check("exact", str(n), str(m)) for m in range(4)])]

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [RIGHT if m == n else WRONG for m in range(4)] for n in range(4)}


def test_nothing_is_left_after_close(folder):
    descriptors = sorted(os.listdir("/proc/self/fd"))
    pool = VerifierPool(num_workers=2, time_limit=0.5)
    score(pool, "loop", ["good", "bad"])
    pool.check([Check("exact", str(n), "5") for n in range(4)])
    pids = processes_of(pool)
    assert len(pids) == 2
    assert all(map(is_alive, pids))
    pool.close()
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)  # not even as zombies
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.check([Check("exact", "5", "5")])


def test_a_forgotten_pool_ends_its_processes(folder):
    pool = VerifierPool(num_workers=1)
    pool.check([Check("exact", "5", "5")])
    pids = processes_of(pool)
    assert all(map(is_alive, pids))
    del pool
    assert not any(map(is_alive, pids))


def test_an_interrupted_call_leaves_a_pool_that_works(folder, monkeypatch):
    with VerifierPool(num_workers=2, time_limit=60) as pool:
        pool.check([Check("math", "5", r"\boxed{5}"), Check("math", "5", r"\boxed{6}")])
        with monkeypatch.context() as patch:
            look, calls = pool._poll, []

            def interrupted():
                calls.append(None)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                look()

            patch.setattr(pool, "_poll", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pool.check([Check("math", str(n), r"\boxed{9^{9^{9^{9}}}}") for n in range(4)])
        start = time.monotonic()
        found = [
            v.outcome for v in pool.check([Check("math", rf"\sqrt{{{n}}}", r"\boxed{\sqrt{7}}") for n in range(9)])
        ]
        assert found == [RIGHT if n == 7 else WRONG for n in range(9)]
        assert time.monotonic() - start < 50  # nothing of the interrupted call is waited for


OWNER = """
import sys, time
from r2vpo_jax.verifiers import Check, VerifierPool
pool = VerifierPool(num_workers=2, time_limit=60)
pool.check([Check("exact", "1", "1"), Check("exact", "2", "2")])
print(*[slot.process.pid for slot in pool._slots], flush=True)
if sys.argv[1] == "busy":
    pool.check([Check("math", "5", r"\\boxed{9^{9^{9^{9}}}}")] * 1 + [Check("math", "6", r"\\boxed{9^{9^{9^{9}}}}")])
elif sys.argv[1] == "idle":
    time.sleep(60)
"""


@pytest.mark.parametrize("state", ["busy", "idle", "forgets"])
def test_processes_end_with_their_owner(folder, state):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, state], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    with owner:
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 2
        if state == "forgets":  # ends without close()
            assert owner.wait(timeout=20) == 0
        else:
            assert all(map(is_alive, pids))
            time.sleep(1.5 if state == "busy" else 0.0)
            owner.kill()
    assert wait_until(lambda: not any(map(is_alive, pids)))


def test_processes_that_do_not_start(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with VerifierPool(num_workers=1) as pool, pytest.raises(RuntimeError, match="do not start: exit code 1"):
        pool.check([Check("exact", "5", "5")])


def test_start_is_fast(folder):
    with VerifierPool(num_workers=1) as pool:
        pool.check([Check("exact", "5", "5")])
        start = time.monotonic()
        (pid,) = processes_of(pool)
        os.kill(pid, 9)
        assert wait_until(lambda: not is_alive(pid))
        assert pool.check([Check("exact", "5", "6")])[0].outcome == WRONG
        assert time.monotonic() - start < 2.0  # measured 0.1 s on an idle core
