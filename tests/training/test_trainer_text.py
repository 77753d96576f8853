"""The trainer on text: a shipped checkpoint, its tokenizer and chat template, a JSONL data set, Math-Verify."""

import json
import shutil

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from r2vpo_jax import config, models
from r2vpo_jax.errors import UsageError
from r2vpo_jax.models import base as base_model
from r2vpo_jax.models.tokenizer import end_of_text_ids
from r2vpo_jax.run import files
from r2vpo_jax.run.directory import claim
from r2vpo_jax.training.trainer import train
from tests.helpers.runs import stop
from tests.helpers.trees import merged

PROBLEMS = 24


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The first problems of the shipped data set, so that loading takes no time."""
    folder = tmp_path_factory.mktemp("data")
    import importlib.resources

    lines = (
        (importlib.resources.files("r2vpo_jax") / "assets" / "data" / "word_problems" / "train.jsonl")
        .read_text()
        .splitlines()
    )
    for number, split in enumerate(("train", "validation", "test")):
        (folder / f"{split}.jsonl").write_text("\n".join(lines[PROBLEMS * number : PROBLEMS * (number + 1)]) + "\n")
    return folder


@pytest.fixture(scope="module")
def make(data_dir):
    def make(**overrides):
        sections = {
            "model": {"path": "word_problems_base"},
            "mesh": {"data": 1},
            "objective": {"dual": {"budget": 0.01}, "groups": {"verifier_errors": "wrong"}},
            "task": {
                "name": "text",
                "text": {
                    "data_dir": str(data_dir),
                    **{
                        split: f"{split}.jsonl?answer_style=hash&kind=math" for split in ("train", "validation", "test")
                    },
                    "max_response_length": 48,
                },
                "prompt": {"max_length": 112},
                "verifier": {"num_workers": 1, "time_limit": 20.0},
            },
            "sampler": {"group_size": 4, "batch_size": 8, "prompt_buckets": (80,)},
            "evaluation": {"batch_size": 8},
            "trainer": {
                "num_iterations": 2,
                "prompts_per_rollout": 4,
                "num_minibatches": 2,
                "micro_batch_size": 4,
                "eval_every": 2,
                "eval_problems": 4,
                "eval_samples": 1,
                "test_problems": 100,
                "test_samples": 2,
                "checkpoint_every": 1,
                "samples_per_iteration": 3,
            },
        }
        return config.from_flags(config.make(**merged(sections, overrides)))

    return make


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory):
    """(workdir, summary, lines said) of a run with rewards of two parts that was stopped and continued."""
    workdir, said = tmp_path_factory.mktemp("text") / "run", []
    chosen = make(task={"reward": {"correct": 1.0, "format": 0.25, "format_pattern": "(?s).*####.*"}})
    stop(chosen, workdir, 1, say=said.append)
    return workdir, train(chosen, workdir, say=said.append), said


def test_what_was_read_is_said(finished):
    _, _, said = finished
    assert any(line.startswith(f"train: {PROBLEMS} problems") for line in said)


def test_samples_are_readable(finished):
    samples = files.read_jsonl(finished[0] / "samples.jsonl")
    assert len(samples) == 6
    for sample in samples:
        assert sample["prompt"].startswith("<|im_start|>user\n")
        assert sample["prompt"].endswith("<|im_start|>assistant\n")
        assert sample["response"].isascii()
        assert sample["outcome"] in ("right", "wrong", "error", "timeout")


def test_parts_of_the_reward_are_metrics(finished):
    rows = [row for row in files.read_jsonl(finished[0] / "metrics.jsonl") if row["kind"] == "train"]
    for row in rows:
        np.testing.assert_allclose(row["reward/correct"] + row["reward/format"], row["reward/mean"], rtol=1e-5)
        assert 0 < row["reward/format"] <= 0.25, "the model writes in the form that it has learned"
        assert row["outcome/errors"] == row["outcome/timeouts"] == 0


def test_a_finite_test_set_is_scored_whole(finished):
    workdir, summary, said = finished
    assert summary["num_eval_problems"] == PROBLEMS
    assert summary["average_at"] == 2
    assert "2 samples" in said[-2]
    tests = [row for row in files.read_jsonl(workdir / "metrics.jsonl") if row.get("split") == "test"]
    assert [row["problems"] for row in tests] == [PROBLEMS] * 2


def test_the_export_is_a_model_with_all_its_ends_of_text(finished):
    hf = finished[0] / "hf"
    tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
    assert tokenizer.chat_template
    assert len(end_of_text_ids(hf, tokenizer)) == 2
    model, params = models.from_pretrained(hf)
    assert model.config.family == "qwen2"
    assert set(params) >= {"embed", "layers", "final_norm"}


def test_other_data_are_refused_on_resume(make, data_dir, tmp_path):
    stop(make(), tmp_path / "run", 1, say=lambda _: None)
    file = data_dir / "train.jsonl"
    before = file.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    rows[5]["question"] += " Think twice."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        with pytest.raises(UsageError, match="not those that .* was started with"):
            train(make(), tmp_path / "run", say=lambda _: None)
    finally:
        file.write_text(before)


def other_weights(base):
    model, params = models.from_pretrained(base)
    params = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.001), params)
    tokenizer, _ = base_model.load_tokenizer(base)
    models.save_pretrained(base, model, params, tokenizer, eos_ids=(2, 0))


def other_prompts(base):
    file = base / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant", "bot"))


def another_end(base):
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 0, 7]}')


@pytest.mark.slow
def test_another_base_is_refused_on_resume(make, tmp_path):
    """Also where nothing but its weights are others, behind a link. And stop strings end what is learned from."""
    original = base_model.find_directory("word_problems_base")[0]
    base = tmp_path / "link"
    chosen = make(model={"path": str(base)}, sampler={"stop": ("\n",)})
    base.symlink_to(original)
    stop(chosen, tmp_path / "run", 1, say=lambda _: None)
    responses = [sample["response"] for sample in files.read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert len(responses) == 3
    assert all("\n" not in response[:-1] for response in responses)
    assert any(response.endswith("\n") for response in responses)
    (row,) = (row for row in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train")
    assert row["ratio/variance"] < 1e-3
    for change, part in ((other_weights, "weights"), (other_prompts, "chat template"), (another_end, "ends of text")):
        copy = tmp_path / change.__name__
        shutil.copytree(original, copy)
        change(copy)
        base.unlink()
        base.symlink_to(copy)
        with pytest.raises(UsageError, match=f"the base model is not the one that .*: it differs in .*{part}"):
            train(chosen, tmp_path / "run", say=lambda _: None)
    base.unlink()
    shutil.copytree(original, base)
    stop(chosen, tmp_path / "run", 1, say=lambda _: None)  # the same, elsewhere


def test_stop_strings_are_for_text(make):
    with pytest.raises(ValueError, match="sampler.stop is for task.name=text: task arithmetic says itself"):
        config.from_dict({"sampler": {"stop": ("x",)}})
    for wrong in (("",), (3,)):
        with pytest.raises(ValueError, match="must be strings that are not empty"):
            make(sampler={"stop": wrong})


def test_errors_are_events_and_cost_no_run(make, tmp_path, monkeypatch):
    """A reward function that fails on every second batch: counted, named, and nothing is learned from those."""
    (tmp_path / "failing.py").write_text(
        "def score(questions, responses, answers):\n"
        "    if len(responses[0]) % 2 and 'boxed' not in responses[0]:\n"
        "        raise KeyError('odd')\n"
        "    return [len(r) / 100 for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = {"reward": {"correct": 0.0, "function": "failing:score", "function_batch_size": 1}}
    chosen = make(task=task, objective={"dual": {"budget": 0.01}, "groups": {"verifier_errors": "abstain"}})
    stop(chosen, tmp_path / "run", 1, say=lambda _: None)
    (row,) = (row for row in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train")
    assert 0 < row["outcome/errors"] < 16
    assert row["reward/kept"] == 1 - row["outcome/errors"] / 16
    events = [event for event in files.read_jsonl(tmp_path / "run" / "events.jsonl") if event["event"] == "unjudged"]
    assert [(event["responses"], "odd" in event["first"]) for event in events] == [(row["outcome/errors"], True)]


def test_a_run_without_verdicts_says_why_blames_nothing_else_and_ends(make, tmp_path, monkeypatch):
    """A function that works on gold answers and fails on everything that the model writes."""
    (tmp_path / "boxed_only.py").write_text(
        "def score(completions, **columns):\n"
        "    if not all('boxed' in completion for completion in completions):\n"
        "        raise KeyError('no box')\n"
        "    return [1.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    said = []
    chosen = make(
        task={"reward": {"function": "boxed_only:score", "function_weight": 0.5}},
        objective={"dual": {"budget": 0.01}, "groups": {"verifier_errors": "abstain"}},
        trainer={"num_iterations": 5},
        alarms={"patience": 2, "min_entropy": 100.0},
    )
    assert stop(chosen, tmp_path / "run", None, say=said.append).startswith("stopped after iteration 2 of 5")
    (line,) = [line for line in said if "have no verdict; the first reason" in line]
    assert line.startswith("iteration 1: 16 of 16 responses have no verdict; the first reason: KeyError: 'no box'")
    (alarm,) = [line for line in said if line.startswith("ALARM")]
    assert alarm.startswith("ALARM verdicts: outcome/judged = 0 for 2 iterations")
    # Validation judges by correctness alone, and has its verdicts.
    assert not any(line.startswith("validation: ") and "have no verdict" in line for line in said)
    (row, _) = (row for row in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train")
    over_verdicts = ("mean", "learned", "correct", "function", "zero_variance_groups", "all_right_groups")
    assert {row[f"reward/{name}"] for name in over_verdicts} == {"nan"}
    assert row["policy/entropy"] == "nan"
    assert (row["outcome/judged"], row["outcome/errors"], row["reward/kept"]) == (0, 16, 0)


def test_too_long_for_the_model_is_refused(make, tmp_path):
    task = {"text": {"max_response_length": 100_000}}
    with pytest.raises(UsageError, match="the model has positions for"):
        train(make(task=task), tmp_path / "run", say=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_cheap_refusals_come_before_the_data_are_read(make, tmp_path, monkeypatch):
    """A directory of another run, a mesh that cannot be, an end of text outside of the vocabulary."""
    from r2vpo_jax.training import trainer

    monkeypatch.setattr(trainer.tasks, "make", lambda *_, **__: pytest.fail("the data were read"))
    claim(tmp_path / "run", make(trainer={"num_iterations": 3}))
    with pytest.raises(UsageError, match="another configuration"):
        train(make(), tmp_path / "run", say=lambda _: None)
    with pytest.raises(UsageError, match="mesh shape"):
        train(make(mesh={"data": 1, "fsdp": 64}), tmp_path / "mesh", say=lambda _: None)
    base = tmp_path / "base"
    shutil.copytree(base_model.find_directory("word_problems_base")[0], base)
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 99999]}')
    with pytest.raises(UsageError, match="end-of-text ids"):
        train(make(model={"path": str(base)}), tmp_path / "eos", say=lambda _: None)


def test_a_task_is_closed_when_the_weights_cannot_be_read(make, tmp_path, monkeypatch):
    from r2vpo_jax.tasks.text import TextTask

    base, closed = tmp_path / "base", []
    shutil.copytree(base_model.find_directory("word_problems_base")[0], base)
    (base / "model.safetensors").write_bytes(b"torn")
    close = TextTask.close
    monkeypatch.setattr(TextTask, "close", lambda task: (closed.append(True), close(task)))
    with pytest.raises(UsageError, match="cannot load the base model"):
        train(make(model={"path": str(base)}), tmp_path / "run", say=lambda _: None)
    assert closed
    assert not (tmp_path / "run").exists()
