"""An evaluation from problems to files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import tasks
from r2vpo_jax.evaluation import benchmarks, subsets
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import files
from r2vpo_jax.tasks import Outcome, Verdicts
from tests.helpers.evaluations import BATCH, FILES, NUM_PROBLEMS, TINY, K, contents, row, silent


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
    assert 0 < benchmark["scores"]["pass_at_1"]["value"] < 1, "a base model that is right now and then is wanted"
    assert benchmark["problems"] == NUM_PROBLEMS
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
    """One problem at one time, with 3 samples and then 1; the first 7 problems, 5 and then 2, with 3 samples each."""
    path, summary = finished
    again = silent(make({"evaluation": {"batch_size": 3}}), tmp_path / "three")
    assert again == summary
    assert contents(tmp_path / "three") == contents(path)
    few = make({"evaluation": {"batch_size": 15}}, num_problems=7, k=3, texts=0, greedy=False)
    silent(few, tmp_path / "fewer")
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
    assert {b["settings"]["max_response_length"] for b in summary["benchmarks"]} == {8, 14}


def test_errors_and_timeouts_are_counted_apart(make, monkeypatch, tmp_path):
    """A verifier that gives up on the first sample of each problem, and runs out of time on the second of every other."""
    real = tasks.make

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

    monkeypatch.setattr(benchmarks.tasks, "make", lambda *args, **kwargs: Hesitant(real(*args, **kwargs)))
    said = []
    summary = benchmarks.run(make(), tmp_path, say=said.append)
    (benchmark,) = summary["benchmarks"]
    assert (benchmark["verifier_errors"], benchmark["verifier_timeouts"]) == (16, 8)
    assert (benchmark["greedy_verifier_errors"], benchmark["greedy_verifier_timeouts"]) == (0, 0)
    assert benchmark["scores"]["pass_at_1"]["value"] == pytest.approx((2 + 3) / 8)
    assert benchmark["scores"]["greedy"]["value"] == 1.0
    assert all(r["reason"] == "reason 2" for r in files.read_jsonl(tmp_path / "outcomes.jsonl"))
    assert f"{TINY}: a notice" in said
    assert not any("no verdict" in line for line in said), "not most"
    none = [row([Outcome.ERROR] * 3 + [Outcome.WRONG]) | {"reason": "KeyError: 1"}]
    assert benchmarks._without_verdicts(none).startswith(
        "3 of 4 samples have no verdict, and count as not right; the first"
    )
    assert "a notice" in (tmp_path / "evaluation.md").read_text()


def test_prompts_of_data_sets(make):
    """Without a run: the tokenizer's chat template if it has one; what cannot be read is said."""
    sections = {"task": {"text": {"max_response_length": 5}, "prompt": {"text": "7+{question}", "bos": False}}}
    config = make(sections, tasks="chain_sum?max_terms=2", num_problems=3)
    assert config.task.prompt.template == "plain"
    base = open_base_model(config.model_config(config.model.path))
    benchmark = benchmarks.open_benchmark(*config.tasks, config, base)
    benchmark.task.close()
    assert benchmark.num_problems == 3
    assert benchmark.problems.tokens.shape[1] % 32 == 0
    assert benchmark.problems.tokens.shape[1] - benchmark.problems.length.max() < 32
    for number in range(3):
        assert benchmark.prompt(number).startswith("7+<pad>")
        assert benchmark.prompt(number).endswith("=")
    assert any("unknown to the tokenizer" in notice for notice in benchmark.identity()["notices"])
    assert (benchmark.identity()["max_response_length"], benchmark.identity()["problems"]) == (5, 3)


def test_a_task_of_ones_own(make, tmp_path):
    """module:Class with options, in no table of the package."""
    spec = "tests.helpers.own_tasks:FirstDigit?digit=7"
    summary = silent(make(tasks=spec, num_problems=6, greedy=False), tmp_path)
    rows = files.read_jsonl(tmp_path / "outcomes.jsonl")
    chosen = subsets.positions(10, 6).tolist()
    assert [r["index"] for r in rows] == chosen
    assert [r["prompt"] for r in rows] == [f"{i}+7=" for i in chosen]
    notice = "test: scored on a fixed sample of 6 of 10 problems, the same for all runs"
    assert summary["benchmarks"][0]["notices"] == [notice]
    assert notice in (tmp_path / "evaluation.md").read_text()
    assert [r["outcomes"][0] for r in rows] == [int(r["texts"][0].startswith("7")) for r in rows]
    assert [b["task"] for b in summary["benchmarks"]] == [spec]
