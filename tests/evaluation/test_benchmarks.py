"""Evaluations: scores by the book, tables that say how they were made, and files that survive a kill."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import sharding
from r2vpo_jax.config.evaluation import EvaluationConfig
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import benchmarks, estimators, model_source
from r2vpo_jax.evaluation import report as benchmark_report
from r2vpo_jax.run import checkpoints, files
from r2vpo_jax.tasks import Outcome, Verdicts
from r2vpo_jax.training.learner import Learner
from tests.conftest import ROOT, TASK

TINY = "arithmetic?" + "&".join(f"{name}={value}" for name, value in TASK.items())
NUM_PROBLEMS, K, BATCH = 16, 4, 8
FILES = ("config.json", "outcomes.jsonl", "evaluation.json", "evaluation.md")


@pytest.fixture(scope="module")
def make(tiny_checkpoint):
    """The configuration of a tiny evaluation, changed by keywords."""

    def made(**changes):
        values = {
            "tasks": TINY,
            "model": str(tiny_checkpoint),
            "num_problems": NUM_PROBLEMS,
            "k": K,
            "batch_size": BATCH,
        }
        return EvaluationConfig(**values | {"mesh_data": len(jax.devices())} | changes)

    return made


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory):
    """(directory, summary) of an evaluation that nobody disturbed. Copy it before changing it."""
    path = tmp_path_factory.mktemp("finished") / "eval"
    return path, benchmarks.run(make(), path, say=lambda _: None)


def contents(path, names=FILES):
    """Their bytes, without the identity of the code: it may be edited while the tests run."""
    return {name: re.sub(rb', "code": "\w+"', b"", (path / name).read_bytes()) for name in names}


def silent(config, path):
    return benchmarks.run(config, path, say=lambda _: None)


# ---- scores ----


def row(outcomes, answers=None, *, task="a", level="1", greedy=Outcome.WRONG, lengths=None, truncated=None):
    outcomes = [int(outcome) for outcome in outcomes]
    return {
        "task": task,
        "index": 0,
        "level": level,
        "outcomes": outcomes,
        "answers": answers or [None] * len(outcomes),
        "lengths": lengths or [1] * len(outcomes),
        "truncated": truncated or [False] * len(outcomes),
        "greedy": None if greedy is None else {"outcome": int(greedy), "length": 1, "truncated": False, "answer": None},
    }


def identity(*specs, k):
    tasks = {spec: {"max_length": 7, "notices": []} for spec in specs}
    model = {"name": "m", "checkpoint": None, "digest": "d"}
    settings = {"k": k, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 3}
    return {"tasks": tasks, "model": model, "compute_dtype": "float32", **settings}


@pytest.mark.parametrize(("k", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_pass_sizes(k, sizes):
    assert benchmark_report.pass_sizes(k) == sizes


def test_scores_are_those_of_enumeration():
    """pass@j of a problem: the share of the j-subsets of its samples that hold a right one; errors are not right."""
    generator = np.random.default_rng(0)
    rows = [row(generator.integers(0, 4, 6)) for _ in range(12)]
    values = benchmark_report.values_by_problem(rows)
    assert list(values) == ["avg@6", "pass@1", "pass@2", "pass@4", "pass@6", "maj@6", "greedy"]
    for j in (1, 2, 4, 6):
        subsets = list(itertools.combinations(range(6), j))
        expected = [np.mean([any(r["outcomes"][i] == 1 for i in s) for s in subsets]) for r in rows]
        np.testing.assert_allclose(values[f"pass@{j}"], expected, atol=1e-12)
    np.testing.assert_allclose(values["avg@6"], values["pass@1"])


def test_numbers_by_hand():
    """Three problems, two samples: both right, one right, an error and a timeout."""
    rows = [
        row([1, 1], ["7", "7"], greedy=Outcome.RIGHT, lengths=[3, 5]),
        row([0, 1], ["8", "9"], level="2", lengths=[1, 2], truncated=[True, False]),
        row([2, 3], ["7", None], level="2", greedy=Outcome.TIMEOUT),
    ]
    (benchmark,) = benchmark_report.summarize(identity("a", k=2), rows)["benchmarks"]
    scores = {name: score["value"] for name, score in benchmark["scores"].items()}
    expected = {"avg@2": 3 / 6, "pass@1": 3 / 6, "pass@2": 2 / 3, "maj@2": 1.5 / 3, "greedy": 1 / 3}
    assert scores == pytest.approx(expected)
    assert benchmark["response_length"] == {"mean": pytest.approx(13 / 6), "max": 5}
    assert benchmark["truncated"] == pytest.approx(1 / 6)
    assert benchmark["without_answer"] == pytest.approx(1 / 6)
    assert (benchmark["verifier_errors"], benchmark["verifier_timeouts"]) == (1, 1)
    assert (benchmark["greedy_verifier_errors"], benchmark["greedy_verifier_timeouts"]) == (0, 1)
    assert benchmark["levels"]["2"]["scores"]["avg@2"]["value"] == pytest.approx(1 / 4)
    for name, values in benchmark_report.values_by_problem(rows).items():
        low, high = estimators.bootstrap_interval(values)
        assert (benchmark["scores"][name]["low"], benchmark["scores"][name]["high"]) == (low, high)


def test_levels_add_up_and_are_in_their_order():
    generator = np.random.default_rng(1)
    labels = ["level 10", "level 9", "geometry", "level 9", "level 10", "level 9"]
    rows = [row(generator.integers(0, 2, 4), list("abab"), level=label) for label in labels]
    (benchmark,) = benchmark_report.summarize(identity("a", k=4), rows)["benchmarks"]
    assert list(benchmark["levels"]) == ["geometry", "level 9", "level 10"]
    groups = benchmark["levels"].values()
    assert sum(group["n"] for group in groups) == benchmark["n"] == 6
    assert sum(group["verifier_errors"] for group in groups) == benchmark["verifier_errors"]
    for name, score in benchmark["scores"].items():
        total = sum(group["n"] * group["scores"][name]["value"] for group in groups)
        assert score["value"] == pytest.approx(total / 6)


def test_every_row_of_every_table_says_how_it_was_made():
    rows = [row([1, 0], level=level, task=task) for task in ("a", "b|c") for level in "12" for _ in range(2)]
    summary = benchmark_report.summarize(identity("a", "b|c", k=2), rows)
    text = benchmark_report.markdown(summary)
    header, tables, seen = None, 0, []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        if header is None:
            header, tables = cells, tables + 1
        elif not set(line) <= {"|", "-"}:
            assert len(cells) == len(header)
            named = dict(zip(header, cells, strict=True))
            seen.append(cells[0])
            settings = [named[x] for x in ("n", "k", "temperature", "top-p", "top-k", "max length", "seed")]
            greedy = named.get("score") == "greedy"
            n = "2" if header[0] == "level" else "4"
            assert settings == [
                n,
                *(["1", "0", "-", "-", "7", "-"] if greedy else ["2", "0.6", "0.95", "20", "7", "3"]),
            ]
    assert tables == 2 + 2 * 3, "all benchmarks: scores, responses; each: scores, levels, responses by level"
    assert seen[:4] == ["a", "b/c", "a", "b/c"]
    assert {"avg@2", "pass@1", "pass@2", "maj@2", "greedy", "1", "2"} <= set(seen)
    assert text == benchmark_report.markdown(json.loads(json.dumps(summary)))


# ---- an evaluation ----


def test_outcomes_are_those_of_the_texts(make, finished):
    """The first response to each problem, read as text."""
    path, summary = finished
    rows = files.read_jsonl(path / "outcomes.jsonl")
    assert [r["index"] for r in rows] == list(range(NUM_PROBLEMS))
    for r in rows:
        (text,) = r["texts"]
        operands = r["prompt"].removesuffix("=").split("+")
        right = text.endswith(f";{sum(map(int, operands)) % 10}<eos>")
        assert r["outcomes"][0] == right
        assert r["answers"][0] == (text.removesuffix("<eos>").rpartition(";")[2] if text.endswith("<eos>") else None)
        assert r["level"] == str(len(operands))
        assert len(r["outcomes"]) == len(r["answers"]) == len(r["lengths"]) == len(r["truncated"]) == K
    (benchmark,) = summary["benchmarks"]
    assert 0 < benchmark["scores"]["avg@4"]["value"] < 1, "a base model that is right now and then is wanted"
    assert benchmark["n"] == NUM_PROBLEMS
    assert json.loads((path / "evaluation.json").read_text()) == summary
    assert f"| {NUM_PROBLEMS} " in (path / "evaluation.md").read_text()
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


def test_greedy_is_the_most_likely_token_each_time(finished, tiny_model, task):
    """Against the whole text put through the model anew for every token."""
    path, _ = finished
    model, params = tiny_model
    problems = task.problems("test", np.arange(NUM_PROBLEMS))
    width, size = task.max_prompt_length, task.max_response_length

    @jax.jit
    def logits(tokens, mask):
        return model.apply({"params": params}, tokens, mask=mask)

    tokens = np.concatenate([problems.tokens, np.zeros((NUM_PROBLEMS, size), np.int32)], axis=1)
    for step in range(size):
        mask = (np.arange(width + size) >= width - problems.length[:, None]) & (np.arange(width + size) < width + step)
        tokens[:, width + step] = np.argmax(
            logits(jnp.asarray(tokens), jnp.asarray(mask))[:, width + step - 1], axis=-1
        )
    differ = 0
    for r, response in zip(files.read_jsonl(path / "outcomes.jsonl"), tokens[:, width:], strict=True):
        ends = np.flatnonzero(np.isin(response, task.eos_ids))
        length = int(ends[0]) + 1 if len(ends) else size
        verdict = task.verify("test", np.array([r["index"]]), response[None], np.array([length]))
        assert r["greedy"] == {
            "outcome": int(verdict.outcome[0]),
            "length": length,
            "truncated": not len(ends),
            "answer": task.answers("test", [r["index"]], response[None], [length])[0],
        }
        differ += r["greedy"]["answer"] != r["answers"][0]
    assert differ, "samples are not greedy"


def test_batches_do_not_change_what_is_drawn(make, finished, tmp_path):
    """Batches of 5, the last one short, with 3 and 1 samples at one time; the first 7 problems with 3 samples each."""
    path, summary = finished
    again = silent(make(batch_size=5, samples_at_once=3), tmp_path / "five")
    assert again == summary
    assert contents(tmp_path / "five") == contents(path)
    silent(make(num_problems=7, k=3, batch_size=5, texts=0, greedy=False), tmp_path / "fewer")
    rows = files.read_jsonl(path / "outcomes.jsonl")
    fewer = files.read_jsonl(tmp_path / "fewer" / "outcomes.jsonl")
    assert len(fewer) == 7
    for few, full in zip(fewer, rows, strict=False):
        for name in ("outcomes", "lengths", "truncated", "answers"):
            assert few[name] == full[name][:3]
        assert few["greedy"] is None
        assert "texts" not in few


def test_another_seed_draws_other_samples(make, finished, tmp_path):
    silent(make(seed=1), tmp_path)
    other, rows = (files.read_jsonl(p / "outcomes.jsonl") for p in (tmp_path, finished[0]))
    assert [r["answers"] for r in other] != [r["answers"] for r in rows]
    assert [r["greedy"] for r in other] == [r["greedy"] for r in rows]
    assert [r["prompt"] for r in other] == [r["prompt"] for r in rows]


def test_several_benchmarks_are_told_apart(make, tmp_path):
    """The second has two operands only; the last batch of the first is not filled up with it."""
    shorter = TINY.replace("max_operands=3", "max_operands=2")
    summary = silent(make(tasks=f"{TINY}, {shorter}", num_problems=12, greedy=False), tmp_path)
    rows = files.read_jsonl(tmp_path / "outcomes.jsonl")
    assert [(r["task"], r["index"]) for r in rows] == [(task, i) for task in (TINY, shorter) for i in range(12)]
    assert [b["task"] for b in summary["benchmarks"]] == [TINY, shorter]
    assert list(summary["benchmarks"][1]["levels"]) == ["2"]
    assert {b["settings"]["max_length"] for b in summary["benchmarks"]} == {8, 14}


def test_errors_and_timeouts_are_counted_apart(make, monkeypatch, tmp_path):
    """A verifier that gives up on the first sample of each problem, and runs out of time on the second of every other."""
    real = benchmarks.make_task

    class Hesitant:
        def __init__(self, task):
            self._task = task
            self.notices = ["a notice"]

        def __getattr__(self, name):
            return getattr(self._task, name)

        def verify(self, split, index, responses, lengths):
            outcome = np.full(len(index), Outcome.RIGHT)
            if len(index) > BATCH:
                outcome[::K] = Outcome.ERROR
                outcome[1 :: 2 * K] = Outcome.TIMEOUT
            reasons = tuple("" if o == Outcome.RIGHT else f"reason {o}" for o in outcome)
            return Verdicts((outcome == Outcome.RIGHT).astype(np.float32), outcome, reasons=reasons)

    monkeypatch.setattr(benchmarks, "make_task", lambda *args: Hesitant(real(*args)))
    said = []
    summary = benchmarks.run(make(), tmp_path, say=said.append)
    (benchmark,) = summary["benchmarks"]
    assert (benchmark["verifier_errors"], benchmark["verifier_timeouts"]) == (16, 8)
    assert (benchmark["greedy_verifier_errors"], benchmark["greedy_verifier_timeouts"]) == (0, 0)
    assert benchmark["scores"]["avg@4"]["value"] == pytest.approx((2 + 3) / 8)
    assert benchmark["scores"]["greedy"]["value"] == 1.0
    assert all(r["reason"] == "reason 2" for r in files.read_jsonl(tmp_path / "outcomes.jsonl"))
    assert f"{TINY}: a notice" in said
    assert "a notice" in (tmp_path / "evaluation.md").read_text()


def test_prompts_of_data_sets(make, tmp_path):
    """auto: the tokenizer's chat template if it has one; the frame is --prompt_text; what cannot be read is said."""
    config = make(tasks="chain_sum?max_terms=2", num_problems=3, max_length=5, prompt_text="7+{question}", bos=False)
    base = benchmarks.open_base_model(config.model_config(config.model))
    plain = benchmarks.open_benchmark(config.tasks, config, base)
    base.tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    chat = benchmarks.open_benchmark(config.tasks, config, base)
    for benchmark, end in ((plain, "="), (chat, ";")):
        with contextlib.closing(benchmark.task):
            assert benchmark.num_problems == 3
            assert benchmark.problems.tokens.shape[1] % 32 == 0
            assert benchmark.problems.tokens.shape[1] - benchmark.problems.length.max() < 32
            for tokens, length in zip(benchmark.problems.tokens, benchmark.problems.length, strict=True):
                text = benchmark.task.decode(tokens[len(tokens) - length :])
                assert text.startswith("7+<pad>")
                assert text.endswith(end)
            assert any("unknown to the tokenizer" in notice for notice in benchmark.identity()["notices"])
            assert (benchmark.identity()["max_length"], benchmark.identity()["problems"]) == (5, 3)


# ---- continuing ----


def test_cut_anywhere_it_ends_the_same(make, finished, tmp_path):
    """Half a first line, within a batch, at its end, half a line of the second, all but the last byte."""
    whole = (finished[0] / "outcomes.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for number, length in enumerate((20, ends[2], ends[BATCH - 1], ends[BATCH + 1] + 9, len(whole) - 1)):
        path = tmp_path / str(number)
        path.mkdir()
        shutil.copy(finished[0] / "config.json", path)
        (path / "outcomes.jsonl").write_bytes(whole[:length])
        assert silent(make(), path) == finished[1]
        assert contents(path) == contents(finished[0])


def test_a_finished_one_reads_no_weights(make, finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "eval")
    (tmp_path / "eval" / "evaluation.md").unlink()
    monkeypatch.setattr(model_source.ModelSource, "load_params", None)
    assert silent(make(), tmp_path / "eval") == finished[1]
    assert contents(tmp_path / "eval") == contents(finished[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 8}, "k: 4 there, 8 here"),
        ({"temperature": 0.6}, "temperature: 1.0 there, 0.6 here"),
        ({"seed": 5}, "seed: 0 there, 5 here"),
        ({"num_problems": 20}, f"tasks.{TINY}.problems: 16 there, 20 here"),
        ({"greedy": False}, "greedy: True there, False here"),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(changes, said, make, finished):
    before = contents(finished[0])
    with pytest.raises(UsageError, match="another configuration") as error:
        silent(make(**changes), finished[0])
    assert said in str(error.value)
    assert "choose another --output" in str(error.value)
    assert contents(finished[0]) == before


def test_other_weights_are_refused(make, finished, tiny_checkpoint, tmp_path):
    """The same path, shapes and file size; one number differs."""
    shutil.copytree(finished[0], tmp_path / "eval")
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    content = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    config = json.loads((tmp_path / "eval" / "config.json").read_text())
    config["model"]["name"] = str(tmp_path / "model")
    (tmp_path / "eval" / "config.json").write_text(json.dumps(config))
    silent(make(model=str(tmp_path / "model")), tmp_path / "eval")
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="model.digest"):
        silent(make(model=str(tmp_path / "model")), tmp_path / "eval")


def test_outcomes_of_something_else_are_refused(make, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "eval")
    file = tmp_path / "eval" / "outcomes.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(UsageError, match="does not hold the problems"):
        silent(make(), tmp_path / "eval")
    file.write_text(lines[0] + "\0\0\n" + lines[1])
    with pytest.raises(UsageError, match="is damaged"):
        silent(make(), tmp_path / "eval")


def test_changed_code_is_said(make, finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "eval")
    file = tmp_path / "eval" / "outcomes.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:BATCH]))
    monkeypatch.setattr(benchmarks.code_identity, "of_package", lambda: "0123")
    said = []
    benchmarks.run(make(), tmp_path / "eval", say=said.append)
    assert any("the code has changed" in line for line in said)
    assert contents(tmp_path / "eval", FILES[2:]) == contents(finished[0], FILES[2:])


def test_a_signal_ends_after_the_batch_in_hand(make, finished, tmp_path, monkeypatch):
    append, said = benchmarks._append, []

    def append_and_interrupt(*args):
        append(*args)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(benchmarks, "_append", append_and_interrupt)
    assert benchmarks.run(make(), tmp_path, say=said.append) is None
    assert f"stopped after {BATCH} of {NUM_PROBLEMS} problems" in said[-1]
    assert len(files.read_jsonl(tmp_path / "outcomes.jsonl")) == BATCH
    assert not (tmp_path / "evaluation.json").exists()
    monkeypatch.undo()
    said.clear()
    benchmarks.run(make(), tmp_path, say=said.append)
    assert f"continuing: {BATCH} of {NUM_PROBLEMS} problems are done" in said
    assert contents(tmp_path) == contents(finished[0])


# One evaluation, killed by SIGKILL at every moment in turn, and then left to finish; each in a child of one process that
# has imported everything and computed nothing.
KILLER = """
import json, os, signal, sys
from r2vpo_jax import cli
from r2vpo_jax.evaluation import benchmarks
from r2vpo_jax.benchmark_config import EvaluationConfig

values, path = json.loads(sys.argv[1]), sys.argv[2]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(name, call=1):
    real, calls = getattr(benchmarks, name), [0]
    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            die()
        return real(*args, **kwargs)
    setattr(benchmarks, name, counted)

def torn(call):
    real, calls = benchmarks._append, [0]
    def half(file, rows):
        calls[0] += 1
        if calls[0] < call:
            return real(file, rows)
        text = "".join(json.dumps(row) + chr(10) for row in rows)
        with open(file, "a") as f:
            f.write(text[: len(text) // 2])
        die()
    benchmarks._append = half

def after_append():
    real = benchmarks._append
    def appended(*args):
        real(*args)
        die()
    benchmarks._append = appended

moments = {
    "nothing is written": lambda: before("claim_file"),
    "no outcomes": lambda: before("_append"),
    "half a batch": lambda: torn(1),
    "a batch": after_append,
    "half of another": lambda: torn(2),
    "no evaluation.json": lambda: before("_write_whole"),
    "no evaluation.md": lambda: before("_write_whole", 2),
    "end": lambda: None,
}
for name in sys.argv[3:]:
    child = os.fork()
    if not child:
        moments[name]()
        benchmarks.run(EvaluationConfig(**values), path, say=lambda _: None)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def killed(config, path, *moments):
    command = [sys.executable, "-c", KILLER, json.dumps(dataclasses.asdict(config)), str(path), *moments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    expected = [f"{name} {0 if name == 'end' else -signal.SIGKILL}" for name in moments]
    assert result.stdout.splitlines() == expected, result.stderr


def test_killed_and_continued_it_ends_the_same(make, finished, tmp_path):
    killed(make(), tmp_path / "eval", "half of another", "end")
    assert contents(tmp_path / "eval") == contents(finished[0])


@pytest.mark.slow
def test_killed_at_every_moment_it_ends_the_same(make, finished, tmp_path):
    moments = ["nothing is written", "no outcomes", "half a batch", "a batch", "half a batch"]
    killed(make(), tmp_path / "eval", *moments, "no evaluation.json", "no evaluation.md", "end")
    assert contents(tmp_path / "eval") == contents(finished[0])


# ---- what --model can be ----


@pytest.fixture(scope="module")
def unfinished(tiny_config, tiny_model, tmp_path_factory):
    """A run directory with checkpoints 2, 4 and 6, the 6 torn; validation was best at 2. Weights: i + those of the base."""
    path = tmp_path_factory.mktemp("run") / "run"
    model, params = tiny_model
    config = tiny_config()
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    learner = Learner(model, config, mesh)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    saver = checkpoints.Checkpointer(path / "checkpoints", max_to_keep=9)
    for step in (2, 4, 6):
        state = learner.init_state(jax.tree.map(lambda x: np.asarray(x) + step, params))  # noqa: B023
        saver.save(step, state, {}, score=1 / step)
    saver.close()
    file = max((path / "checkpoints" / "6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    file.write_bytes(file.read_bytes()[:-1])
    return path


@pytest.mark.parametrize(("checkpoint", "step"), [(None, 4), ("latest", 4), ("best", 2), ("2", 2)])
def test_a_run_that_has_not_finished(checkpoint, step, unfinished, make, tiny_model, tiny_checkpoint):
    before = {p: p.read_bytes() for p in unfinished.rglob("*") if p.is_file()}
    source = model_source.find(str(unfinished), checkpoint)
    assert (source.iteration, source.directory) == (step, tiny_checkpoint)
    base = benchmarks.open_base_model(make(compute_dtype="bfloat16").model_config(source.directory))
    params = source.load_params(base, sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
    jax.tree.map(
        lambda loaded, x: np.testing.assert_array_equal(loaded, np.asarray(x + step).astype(jnp.bfloat16)),
        params,
        tiny_model[1],
    )
    assert {p: p.read_bytes() for p in unfinished.rglob("*") if p.is_file()} == before
    assert source.digest() != model_source.find(str(tiny_checkpoint)).digest()
    others = {model_source.find(str(unfinished), other).digest() for other in ("2", "4")}
    assert len(others) == 2
    assert source.digest() in others


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [("3", "checkpoint 3 .* those there are: 2, 4, 6"), ("6", "is damaged"), ("newest", "neither an iteration nor")],
)
def test_checkpoints_that_cannot_be_used(checkpoint, said, unfinished):
    with pytest.raises(ValueError, match=said):
        model_source.find(str(unfinished), checkpoint)


def test_a_run_that_has_finished(unfinished, make, finished, tiny_checkpoint, tmp_path):
    """The exported model, unless a checkpoint is asked for; its outcomes are those of the same weights elsewhere."""
    shutil.copytree(unfinished, tmp_path / "run")
    shutil.copytree(tiny_checkpoint, tmp_path / "run" / "hf")
    (tmp_path / "run" / "report").mkdir()
    (tmp_path / "run" / "report" / "summary.json").write_text("{}")
    assert model_source.find(str(tmp_path / "run"), "best").iteration == 2
    summary = silent(make(model=str(tmp_path / "run")), tmp_path / "eval")
    assert summary["benchmarks"] == finished[1]["benchmarks"]
    assert summary["evaluated"]["model"]["digest"] == finished[1]["evaluated"]["model"]["digest"]
    silent(make(model=str(tmp_path / "run"), checkpoint="4", num_problems=BATCH), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["model"]["checkpoint"] == 4


def test_paths_that_are_no_model(tmp_path, tiny_config, tiny_checkpoint):
    with pytest.raises(FileNotFoundError, match="neither a Hugging Face directory nor a run"):
        model_source.find(str(tmp_path))
    with pytest.raises(ValueError, match="needs a run directory"):
        model_source.find(str(tiny_checkpoint), "4")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(tiny_config())))
    with pytest.raises(ValueError, match="without an intact checkpoint"):
        model_source.find(str(tmp_path))
    assert model_source.find(None).directory == model_source.find("arithmetic_base").directory
    assert model_source.find(None).name == "arithmetic_base (shipped)"


def test_large_files_are_digested_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(model_source, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(model_source, "_BLOCK_BYTES", 10)
    monkeypatch.setattr(model_source, "_BLOCKS", 5)
    file = tmp_path / "weights"
    file.write_bytes(bytes(1000))
    digest = model_source._content(file)
    for position, seen in {0: True, 9: True, 500: True, 999: True, 100: False}.items():
        content = bytearray(1000)
        content[position] = 1
        file.write_bytes(content)
        assert (model_source._content(file) != digest) == seen
    file.write_bytes(bytes(1001))
    assert model_source._content(file) != digest


# ---- the command line ----


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": None}, "--tasks is required"),
        ({"tasks": "arithmetic,"}, "--tasks is required"),
        ({"tasks": "arithmetic,arithmetic"}, "twice"),
        ({"k": 0}, "--k must be at least 1"),
        ({"samples_at_once": 0}, "--samples_at_once must be"),
        ({"top_p": 0.0}, "--top_p must be"),
        ({"temperature": -1.0}, "--temperature must be"),
        ({"template": "x"}, "--template=x is unknown"),
        ({"compute_dtype": "float64"}, "--compute_dtype=float64"),
        ({"time_limit": 0.0}, "--time_limit must be > 0"),
        ({"bad_gold": "x"}, "--bad_gold='x' is unknown"),
        ({"data_dir": "/nowhere"}, "--data_dir=/nowhere is not a folder"),
        ({"prompt_text": "no place"}, "--prompt_text must contain"),
    ],
)
def test_bad_values_name_their_flag(changes, said):
    with pytest.raises(ValueError, match="--") as error:
        EvaluationConfig(**{"tasks": "arithmetic"} | changes)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"tasks": "arithmetic?digits=3"}, "digits=3 is not one of"),
        ({"tasks": "arithmetic"}, None),  # its numbers are longer, but the symbols are the same
        ({"mesh_data": 7}, "--mesh_data"),
        ({"tasks": "no_such_data_set"}, "no_such_data_set"),
        ({"tasks": "word_problems", "template": "chat"}, "no chat template; set --template=plain"),
        (
            {"tasks": "chain_sum", "max_length": 500, "max_prompt_length": 32_500},
            "lower --max_prompt_length or --max_length",
        ),
        ({"tasks": "word_problems", "max_prompt_length": 2}, "--max_prompt_length=2"),
        ({"tasks": "aime24"}, "needs a data folder (--data_dir)"),
    ],
)
def test_what_cannot_work_is_said_before_weights_are_read(changes, said, make, tmp_path, monkeypatch):
    def load(*_):
        raise RuntimeError("weights are read")

    monkeypatch.setattr(model_source.ModelSource, "load_params", load)
    with pytest.raises(UsageError if said else RuntimeError) as error:
        silent(make(**changes), tmp_path / "eval")
    assert (said or "weights are read") in str(error.value)
    assert (tmp_path / "eval").exists() == (said is None)


def test_the_command_prints_the_table(finished, tiny_checkpoint, tmp_path):
    shutil.copytree(finished[0], tmp_path / "eval")
    flags = [f"--tasks={TINY}", f"--model={tiny_checkpoint}", f"--num_problems={NUM_PROBLEMS}", f"--k={K}"]
    result = command(*flags, f"--output={tmp_path / 'eval'}")
    assert result.returncode == 0, result.stderr
    assert (finished[0] / "evaluation.md").read_text() in result.stdout


@pytest.mark.slow
def test_refusals_of_the_command(finished, tmp_path):
    for flags, said in {
        (): "--tasks is required",
        ("--tasks=arithmetic", "--output="): "--output is required",
        ("--tasks=arithmetic", f"--output={tmp_path}", "--k=many"): "--k",
        ("--tasks=arithmetic", f"--output={tmp_path}", "--nonsense=1"): "nonsense",
        ("--tasks=arithmetic", f"--output={tmp_path}", "--top_p=2"): "--top_p must be",
        ("--tasks=arithmetic", f"--output={finished[0]}"): "another configuration",
    }.items():
        result = command(*flags)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert said in result.stderr
    assert list(tmp_path.iterdir()) == []
    result = command("--help")
    assert "Traceback" not in result.stdout + result.stderr
    assert all(f"--{f.name}" in result.stdout.replace("--[no]", "--") for f in dataclasses.fields(EvaluationConfig))


@pytest.mark.slow
def test_the_command_killed_by_the_clock(make, tiny_checkpoint, tmp_path):
    """Real processes, killed when so many lines are there; data sets with verifier processes among the benchmarks."""
    flags = [
        *(f"--tasks={TINY},chain_sum?max_terms=3&max_digits=2", f"--model={tiny_checkpoint}", "--num_problems=24"),
        *("--k=4", "--batch_size=4", "--max_length=16"),
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
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [
        f"--tasks={TINY}",
        f"--model={tiny_checkpoint}",
        f"--num_problems={NUM_PROBLEMS}",
        f"--k={K}",
        "--batch_size=8",
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
    assert "avg@4" in outputs[0]
    assert "avg@4" not in outputs[1]
    assert contents(tmp_path / "two", FILES[2:]) == contents(finished[0], FILES[2:])
