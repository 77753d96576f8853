"""scripts/run_until_done.sh with small commands in place of the trainer."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from r2vpo_jax.run import files
from tests.helpers.paths import ROOT

SCRIPT = ROOT / "scripts" / "run_until_done.sh"
FAST = "--wait=0", "--settle=0"
# Keeps count of its starts; $1 is the workdir without --workdir=.
COUNT = "w=${1#--workdir=}; n=$(($(cat $w/starts 2>/dev/null || echo 0) + 1)); echo $n > $w/starts; "
SAVE = "mkdir -p $w/checkpoints/manifests; echo {} > $w/checkpoints/manifests/$((n * 10)).json; "
FINISH = "mkdir -p $w/report; echo {} > $w/report/summary.json; "


def command(directory, code, *options):
    return ["bash", str(SCRIPT), *FAST, *options, "--", "bash", "-c", COUNT + code, "bash", f"--workdir={directory}"]


def run(directory, code, *options):
    """(exit code, number of starts, messages)."""
    done = subprocess.run(command(directory, code, *options), capture_output=True, text=True, timeout=60)
    return done.returncode, int((directory / "starts").read_text()), done.stderr


CASES = {
    "done at once": (FINISH, (), 0, 1, "the run is done"),
    "done after two failures": ("[ $n = 3 ] || exit 1; " + FINISH, (), 0, 3, "the run is done"),
    "killed, then done": ("[ $n = 2 ] || kill -KILL $$; " + FINISH, (), 0, 2, "exit code 137"),
    "a peer is gone, then done": ("[ $n = 2 ] || exit 75; " + FINISH, (), 0, 2, "another process of the run is missing or gone"),
    "a peer was stopped: saved, 0, not done": ("[ $n = 2 ] || exit 0; " + FINISH, (), 0, 2, "stopped and saved"),
    "bad input": ("exit 2", (), 2, 1, "refused its input"),
    "interrupted by itself": ("exit 130", (), 130, 1, "interrupted"),
    "cannot be started": ("exec /no/such/program", (), 127, 1, "cannot be started"),
    "never gets anywhere": ("exit 7", ("--max-fruitless=3",), 7, 3, "3 tries in a row without a newer checkpoint"),
    "never gets anywhere, with 0": ("exit 0", ("--max-fruitless=2",), 1, 2, "2 tries in a row"),
    "gets further each time": (
        SAVE + "[ $n = 6 ] || exit 1; " + FINISH, ("--max-fruitless=2",), 0, 6, "from iteration 50",
    ),
    "no restarts left": (SAVE + "exit 3", ("--max-restarts=2",), 3, 3, "no restarts left"),
    "one try": ("exit 1", ("--max-restarts=0",), 1, 1, "no restarts left"),
}  # fmt: skip


def test_what_ends_it_and_with_which_code(tmp_path):
    for name, (code, options, expected, starts, said) in CASES.items():
        directory = tmp_path / name.replace(" ", "_")
        directory.mkdir()
        found = run(directory, code, *options)
        assert found[:2] == (expected, starts), f"{name}: {found}"
        assert said in found[2], f"{name}: {found}"


IN_STORE = """
import sys
from r2vpo_jax import storage
run = storage.path(sys.argv[1].partition("=")[2])
if storage.create(run / "checkpoints" / "manifests" / "10.json", b"{}"):
    sys.exit(1)
storage.put(run / "report" / "summary.json", b"{}")
"""


@pytest.mark.slow
def test_a_run_in_a_store_is_asked_after(store):
    """The first start leaves a checkpoint and fails, the second one finishes."""
    command = [sys.executable, "-c", IN_STORE, f"--workdir={store}"]
    options = *FAST, "--max-fruitless=1"
    done = subprocess.run(["bash", str(SCRIPT), *options, "--", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "start 2, from iteration 10" in done.stderr
    assert "ended with 0: the run is done" in done.stderr


def test_zero_is_enough_where_no_summary_is_to_be_expected(tmp_path):
    for arguments in ((), (f"--workdir={tmp_path}", "--stop_after_iteration=3")):
        done = subprocess.run(["bash", str(SCRIPT), *FAST, "--", "true", *arguments], timeout=60)
        assert done.returncode == 0


def test_arguments_reach_the_command_as_they_are(tmp_path):
    awkward = ["", "a b", "it's", '"$HOME"', "*", "--", "a\nb", "\\"]
    code = 'printf "%s\\0" "$@" > "$OUT"'
    subprocess.run(
        ["bash", str(SCRIPT), *FAST, "--", "bash", "-c", code, "bash", *awkward],
        env=os.environ | {"OUT": str(tmp_path / "out")}, check=True, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "out").read_text().split("\0")[:-1] == awkward


def test_the_summary_may_come_late(tmp_path):
    """Process 0 writes it when the others have ended, or a network disk shows it late."""
    code = f"( sleep 1; {FINISH} ) > /dev/null 2>&1 &"
    assert run(tmp_path, code, "--settle=20", "--max-restarts=0")[0] == 0


def test_pauses_double_until_there_is_a_newer_checkpoint(tmp_path):
    (tmp_path / "sleep").write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/pauses\n')
    (tmp_path / "sleep").chmod(0o755)
    code = f"[ $n != 4 ] || {{ {SAVE} }}; exit 1"
    subprocess.run(
        command(tmp_path, code, "--wait=10", "--max-wait=35", "--max-restarts=6", "--max-fruitless=9"),
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=60,
    )  # fmt: skip
    pauses = (tmp_path / "pauses").read_text().split()
    assert pauses == ["10", "20", "35", "10", "10", "20"]  # start 4 saved: from the beginning


def heeding_interrupts():
    """For a child: a shell's background jobs ignore SIGINT, and a shell that began so cannot trap it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition):
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


# Counts the signals that it gets, and takes a second to end; without any it ends in a minute.
SLOW_END = (
    "t=0; trap 't=$((t + 1))' TERM INT; echo up > $w/up; "
    "for i in $(seq 1200); do [ $t = 0 ] && sleep 0.05; done; for i in $(seq 20); do sleep 0.05; done; echo $t > $w/signals; exit 0"
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_once_and_waited_for(tmp_path, number, code):
    with subprocess.Popen(
        command(tmp_path, SLOW_END, f"--status={tmp_path / 'status'}"),
        stderr=subprocess.PIPE,
        preexec_fn=heeding_interrupts,
    ) as process:
        wait_for((tmp_path / "up").exists)
        assert "running, start 1, from iteration 0" in (tmp_path / "status").read_text()
        process.send_signal(number)
        time.sleep(0.4)
        process.send_signal(number)  # the command would take a second one as: at once
        said = process.communicate(timeout=30)[1].decode()
    assert process.returncode == code
    assert (tmp_path / "signals").read_text() == "1\n"
    assert (tmp_path / "starts").read_text() == "1\n"
    assert "again; the command was told already" in said
    assert "the same command goes on from there" in (tmp_path / "status").read_text()


def test_a_run_that_finishes_after_the_signal_is_done(tmp_path):
    with subprocess.Popen(command(tmp_path, SLOW_END.replace("exit 0", FINISH))) as process:
        wait_for((tmp_path / "up").exists)
        process.terminate()
        assert process.wait(timeout=30) == 0


def test_a_signal_between_two_tries_ends_the_wait(tmp_path):
    with subprocess.Popen(
        command(tmp_path, "exit 1", "--wait=300", f"--status={tmp_path / 'status'}"), stderr=subprocess.PIPE
    ) as process:
        wait_for(lambda: (tmp_path / "status").exists() and "waiting" in (tmp_path / "status").read_text())
        process.terminate()
        assert process.wait(timeout=30) == 143


def test_ctrl_c_in_a_terminal_reaches_the_command_once(tmp_path):
    """A terminal sends SIGINT to the whole foreground group, of which the command must not be one."""
    pid, terminal = pty.fork()
    if pid == 0:
        heeding_interrupts()
        os.execvp("bash", command(tmp_path, SLOW_END))
    wait_for((tmp_path / "up").exists)
    os.write(terminal, b"\x03")
    wait_for((tmp_path / "signals").exists)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
    assert (tmp_path / "signals").read_text() == "1\n"


def test_bad_options_are_refused():
    for arguments, said in (
        ((), "no command"),
        (("--",), "no command"),
        (("--max_restarts=1", "--", "true"), "unknown option --max_restarts=1"),
        (("--wait=soon", "--", "true"), "'soon' is not a whole number"),
        (("--max-fruitless=0", "--", "true"), "at least 1"),
        (("true",), "unknown option true"),
    ):
        done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, arguments
        assert said in done.stderr, (arguments, done.stderr)


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_the_trainer_is_stopped_and_killed_and_ends_as_if_it_were_not(config_file, tmp_path):
    trainer = [sys.executable, "-m", "experiments.train", f"--config={config_file}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(workdir):
        return subprocess.Popen(
            ["bash", str(SCRIPT), *FAST, "--", *trainer, f"--workdir={workdir}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def child(process):
        return int(subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True).split()[0])

    rows = tmp_path / "run" / "metrics.jsonl"
    with start(tmp_path / "run") as process:
        wait_for(lambda: lines_of(rows) >= 2)  # the base model's evaluation, and an iteration
        process.terminate()
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 143, output
    assert "the same command goes on from there" in output
    before = lines_of(rows)
    with start(tmp_path / "run") as process:
        wait_for(lambda: lines_of(rows) > before)
        os.kill(child(process), signal.SIGKILL)
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "exit code 137" in output
    assert "running, start 2" in output

    undisturbed = start(tmp_path / "undisturbed")
    assert undisturbed.wait(timeout=300) == 0

    def numbers(workdir):
        found = files.read_jsonl(workdir / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.startswith(files.TIME_PREFIXES)} for row in found]

    assert numbers(tmp_path / "run") == numbers(tmp_path / "undisturbed")

    refused = subprocess.run(
        ["bash", str(SCRIPT), *FAST, "--", *trainer, f"--workdir={tmp_path}/bad", "--config.trainer.num_iterations=0"],
        cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 2
