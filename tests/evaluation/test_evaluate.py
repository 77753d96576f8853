"""The command: flags in, tables out; what cannot work is one line."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from r2vpo_jax import cli
from r2vpo_jax.config import leaves
from r2vpo_jax.config.evaluation import RENAMED_FLAGS, flag_sections
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import model_source
from tests.helpers.evaluations import FILES, NUM_PROBLEMS, TINY, K, command, contents, silent
from tests.helpers.paths import ROOT


@pytest.mark.parametrize(
    ("changes", "sections", "said"),
    [
        ({"model": "/nowhere/at/all"}, {}, "/nowhere/at/all"),
        ({"tasks": None}, {}, "--tasks is required"),
        ({"tasks": "arithmetic,"}, {}, "--tasks is required"),
        ({"tasks": "arithmetic,arithmetic"}, {}, "twice"),
        ({"k": 0}, {}, "--k must be at least 1"),
        ({"tasks": "arithmetic?digits=3"}, {}, "unknown config field digits"),
        ({"tasks": "arithmetic?num_digits=x"}, {}, "num_digits=x"),
        ({"tasks": "no.such.module:Task"}, {}, "no module 'no.such.module'"),
        ({"tasks": "tests.helpers.own_tasks:FirstDigit?number=7"}, {}, "it takes digit"),
        ({"tasks": "arithmetic"}, {}, None),  # its numbers are longer, but the symbols are the same
        ({}, {"mesh": {"data": 7}}, "--config.mesh.data"),
        ({}, {"evaluation": {"top_p": 0.0}}, "evaluation.top_p must be"),
        ({}, {"model": {"compute_dtype": "float64"}}, "model.compute_dtype='float64'"),
        ({"tasks": "no_such_data_set"}, {}, "no_such_data_set"),
        ({"tasks": "word_problems"}, {"task": {"prompt": {"template": "chat"}}}, "set task.prompt.template=plain"),
        ({"tasks": "word_problems"}, {"task": {"prompt": {"text": "no place"}}}, "task.prompt.text must contain"),
        ({"tasks": "word_problems"}, {"task": {"prompt": {"max_length": 2}}}, "task.prompt.max_length=2"),
        ({"tasks": "word_problems"}, {"task": {"verifier": {"time_limit": 0.0}}}, "task.verifier.time_limit must be"),
        ({"tasks": "word_problems"}, {"task": {"text": {"data_dir": "/nowhere"}}}, "/nowhere is not a folder"),
        (
            {"tasks": "chain_sum"},
            {"task": {"text": {"max_response_length": 500}, "prompt": {"max_length": 32_500}}},
            "lower task.prompt.max_length or task.text.max_response_length",
        ),
        ({"tasks": "aime24"}, {}, "needs a data folder"),
    ],
)
def test_what_cannot_work_is_said_before_weights_are_read(changes, sections, said, make, tmp_path, monkeypatch):
    def load(*_):
        raise RuntimeError("weights are read")

    monkeypatch.setattr(model_source.ModelSource, "load_params", load)
    with pytest.raises(UsageError if said else RuntimeError) as error:
        silent(make(sections, **changes), tmp_path / "eval")
    assert (said or "weights are read") in str(error.value)
    assert (tmp_path / "eval").exists() == (said is None)


def test_the_command_prints_the_table(finished, tiny_checkpoint, tmp_path):
    shutil.copytree(finished[0], tmp_path / "eval")
    flags = [f"--tasks={TINY}", f"--model={tiny_checkpoint}", f"--num_problems={NUM_PROBLEMS}", f"--k={K}"]
    result = command(*flags, f"--output={tmp_path / 'eval'}")
    assert result.returncode == 0, result.stderr
    assert (finished[0] / "evaluation.md").read_text() in result.stdout


def test_refusals_of_the_command(finished, tmp_path):
    for flags, said in {
        (): "--tasks is required",
        ("--tasks=arithmetic", "--output="): "--output is required",
        ("--tasks=arithmetic", f"--output={tmp_path}", "--k=many"): "--k",
        ("--tasks=arithmetic", f"--output={tmp_path}", "--nonsense=1"): "nonsense",
        ("--tasks=arithmetic", f"--output={tmp_path}", "--config.evaluation.temperatur=1"): "did you mean temperature?",
        ("--tasks=arithmetic", f"--output={tmp_path}", "--config.evaluation.top_p=2"): "evaluation.top_p must be",
        ("--tasks=arithmetic", f"--output={tmp_path}", "--nothinking"): "is now --config.task.prompt.thinking",
        ("--tasks=arithmetic", f"--output={finished[0]}"): "another configuration",
    }.items():
        result = command(*flags)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert said in result.stderr
    assert list(tmp_path.iterdir()) == []
    result = command("--help")
    assert "Traceback" not in result.stdout + result.stderr
    for name in ("model", "checkpoint", "tasks", "output", "num_problems", "k", "greedy", "seed", "texts", "config"):
        assert f"--{name}:" in result.stdout.replace("--[no]", "--"), name


@pytest.mark.parametrize(("old", "new"), RENAMED_FLAGS.items())
def test_an_old_flag_is_told_its_new_name(old, new, monkeypatch, capsys):
    for flag in (f"--{old}=1", f"-{old}", f"--no{old}"):
        monkeypatch.setattr("sys.argv", ["evaluate", "--tasks=arithmetic", flag])
        with pytest.raises(SystemExit) as ended:
            cli.define_sections(flag_sections(), RENAMED_FLAGS)
        assert ended.value.code == 2
        name = flag.lstrip("-").partition("=")[0]
        assert capsys.readouterr().err == f"error: --{name} is now {new}\n"


def test_new_names_exist():
    known = set(dict(leaves(flag_sections().to_dict())))
    for new in RENAMED_FLAGS.values():
        flag = new.partition(",")[0]
        assert flag in ("--model", "--tasks") or flag.removeprefix("--config.") in known


@pytest.mark.slow
def test_the_command_killed_by_the_clock(make, tiny_checkpoint, tmp_path):
    """Real processes, killed when so many lines are there; data sets with verifier processes among the benchmarks."""
    flags = [
        *(f"--tasks={TINY},chain_sum?max_terms=3&max_digits=2", f"--model={tiny_checkpoint}", "--num_problems=24"),
        *("--k=4", "--config.evaluation.batch_size=16", "--config.task.text.max_response_length=16"),
    ]
    whole = command(*flags, f"--output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert "unknown to the tokenizer" in whole.stdout
    path = tmp_path / "killed"
    for lines in (4, 20, 28, 40):
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.evaluate", *flags, f"--output={path}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        file = path / "outcomes.jsonl"
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= lines):
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert command(*flags, f"--output={path}").returncode == 0
    assert contents(path) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_do_what_one_does(make, finished, tiny_checkpoint, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [
        f"--tasks={TINY}",
        f"--model={tiny_checkpoint}",
        f"--num_problems={NUM_PROBLEMS}",
        f"--k={K}",
        "--config.evaluation.batch_size=32",
    ]
    flags += ["--distributed", f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.evaluate", *flags, f"--process_id={i}", f"--output={tmp_path / 'two'}"],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "maj@4" in outputs[0]
    assert "maj@4" not in outputs[1]
    assert contents(tmp_path / "two", FILES[2:]) == contents(finished[0], FILES[2:])
