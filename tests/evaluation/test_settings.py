"""What is in force in an evaluation: defaults, under what the run was trained with, under flags."""

import dataclasses
import json
import re
import shutil

import jax
import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax.config.evaluation import EvaluationConfig, identity, spec_of
from r2vpo_jax.config.task import TaskConfig
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import benchmarks, model_source, settings
from r2vpo_jax.models.base import find_directory
from r2vpo_jax.run import files
from r2vpo_jax.training.trainer import train
from tests.helpers.evaluations import TINY, command
from tests.helpers.trees import merged

SPLITS = ("train", "validation", "test")
PROMPTS = {
    "chat": {"template": "chat", "system": "Answer in one line.", "text": "Q: {question} A:", "bos": True},
    "plain": {"template": "plain", "text": "Q: {question}\nA:", "bos": True},
}


@pytest.fixture(scope="module")
def text_sections(tmp_path_factory):
    """A run of one iteration on shipped word problems; the tokenizer names a BOS token."""
    folder = tmp_path_factory.mktemp("text")
    base, _ = find_directory("word_problems_base")
    shutil.copytree(base, folder / "base")
    tokenizer = folder / "base" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"bos_token": "<|im_start|>"}))
    lines = (base.parents[1] / "data" / "word_problems" / "train.jsonl").read_text().splitlines(keepends=True)
    for number, split in enumerate(SPLITS):
        (folder / f"{split}.jsonl").write_text("".join(lines[8 * number : 8 * number + 8]))
    return {
        "model": {"path": str(folder / "base")},
        "mesh": {"data": len(jax.devices())},
        "evaluation": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "batch_size": 6},
        "task": {
            "name": "text",
            "text": {
                "data_dir": str(folder),
                "max_response_length": 8,
                **{split: f"{split}.jsonl?answer_style=hash&kind=math" for split in SPLITS},
            },
            "prompt": {"max_length": 160},
            "verifier": {"num_workers": 1, "time_limit": 20.0, "tolerance": 0.01},
        },
        "sampler": {"group_size": 4},
        "trainer": {
            "num_iterations": 1,
            "prompts_per_rollout": 2,
            "num_minibatches": 2,
            "micro_batch_size": 4,
            "eval_problems": 2,
            "eval_samples": 2,
            "test_problems": 3,
            "test_samples": 2,
        },
    }


@pytest.fixture
def run_of(text_sections, tmp_path):
    """(configuration, directory) of a run that looks finished, with changed sections; nothing was trained."""

    def make(**changes):
        config = config_lib.from_flags(config_lib.make(**merged(text_sections, changes)))
        run = tmp_path / "run"
        shutil.copytree(config.model.path, run / "hf")
        (run / "report").mkdir()
        (run / "report" / "summary.json").write_text("{}")
        (run / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
        return config, str(run)

    return make


@pytest.mark.parametrize("template", PROMPTS)
def test_a_run_is_asked_what_it_was_trained_with(template, text_sections, tmp_path):
    """--model=RUN and no other flag about prompts: the prompts of outcomes.jsonl are those of the run, to the letter."""
    sections = merged(text_sections, {"task": {"prompt": PROMPTS[template]}})
    summary = train(config_lib.from_flags(config_lib.make(**sections)), tmp_path / "run", say=lambda _: None)
    said = []
    config = settings.resolve(model=str(tmp_path / "run"), num_problems=3, k=2, greedy=False)
    benchmarks.run(config, tmp_path / "eval", say=said.append)
    prompts = [row["prompt"] for row in files.read_jsonl(tmp_path / "eval" / "outcomes.jsonl")]
    assert prompts == [prompt for prompt, _ in summary["samples_before"]], (
        "the same test problems, asked in the same way"
    )

    def frame(text):
        """Everything but the question."""
        return re.sub(r"(?<=Q: ).*?(?=\s*A:)", "…", text, flags=re.DOTALL)

    trained = [sample["prompt"] for sample in files.read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert {frame(prompt) for prompt in (*prompts, *trained)} == {
        "chat": {
            "<|im_start|>system\nAnswer in one line.<|im_end|>\n<|im_start|>user\nQ: … A:<|im_end|>\n"
            "<|im_start|>assistant\n"
        },
        "plain": {"<|im_start|>Q: …\nA:"},
    }[template]
    assert not any("differs from the run" in line for line in said)


def test_what_is_taken_from_a_run(run_of):
    run, path = run_of(
        task={"prompt": PROMPTS["chat"], "reward": {"correct": 0.0, "function": "math:floor"}},
        model={"compute_dtype": "bfloat16", "float32_scores": True, "scan_layers": True, "attention_block_size": 16},
        sampler={"stop": ("\nQuestion:", "</answer>")},
    )
    config = settings.resolve(model=path)
    assert config.tasks == (run.task.text.test,)
    assert config.task.prompt == run.task.prompt
    assert config.task.verifier == run.task.verifier
    assert config.task.reward == run.task.reward
    assert config.evaluation == run.evaluation
    assert config.sampler.stop == run.sampler.stop == ("\nQuestion:", "</answer>")
    assert identity(config)["sampler"] == {"stop": run.sampler.stop}
    other = settings.resolve(model=path, sections={"sampler": {"stop": ("\n",)}})
    assert settings.differences(other, run) == [f"sampler.stop {run.sampler.stop} there, ('\\n',) here"]
    assert dataclasses.asdict(config.task.text).items() <= dataclasses.asdict(run.task.text).items()
    assert dataclasses.asdict(config.model) == {
        "path": path,
        "compute_dtype": "bfloat16",
        "float32_residual": False,
        "float32_scores": True,
        "float32_logits": False,
        "scan_layers": True,
        "attention": "auto",
        "attention_block_size": 16,
    }
    assert settings.differences(config, run) == []
    (spec,) = config.tasks
    task = config.task_config(spec)
    assert (task.prompt, task.verifier, task.reward) == (run.task.prompt, run.task.verifier, run.task.reward)
    assert (task.text.test, task.text.data_dir) == (run.task.text.test, run.task.text.data_dir)
    # Other problems are judged by correctness, whatever the run was rewarded for.
    assert settings.resolve(model=path, tasks="word_problems").task.reward.correct == 1.0


def test_flags_come_last_and_what_differs_is_said(run_of, tmp_path):
    run, path = run_of(task={"prompt": PROMPTS["chat"]})
    sections = {
        "task": {"prompt": {"template": "plain"}, "text": {"max_response_length": 4}, "verifier": {"num_workers": 2}},
        "evaluation": {"temperature": 0.7, "batch_size": 2},
    }
    config = settings.resolve(model=path, sections=sections, num_problems=1, k=1, greedy=False)
    assert settings.differences(config, run) == [
        "task.text.max_response_length 8 there, 4 here",
        "task.prompt.template chat there, plain here",
        "task.prompt.system Answer in one line. there, None here",
    ]
    said = []
    benchmarks.run(config, tmp_path / "eval", say=said.append)
    assert said[0] == f"differs from the run: {'; '.join(settings.differences(config, run))}"
    with pytest.raises(UsageError, match="task.prompt.system needs task.prompt.template=chat"):
        settings.resolve(model=path, sections={"task": {"prompt": {"template": "plain", "system": "x"}}})


def test_the_embedded_task_of_a_run(unfinished):
    config = settings.resolve(model=str(unfinished), checkpoint="best")
    assert config.tasks == (TINY,)
    assert config.checkpoint == "best"
    assert "task" not in config_lib.to_dict(config)
    assert settings.differences(config, model_source.find(str(unfinished)).run) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"digit": 7}, {"rate": 0.5, "on": True, "off": None}, {"word": "a, b&c=d?e+f", "text": "7", "list": [1, 2]}],
)
def test_options_of_ones_own_task_survive_being_a_name(options):
    task = TaskConfig(name="my.module:Own", options=options)
    config = EvaluationConfig(tasks=(spec_of(task),))
    assert config.task_config(*config.tasks) == task
    assert "," not in spec_of(task)


def test_without_a_run_the_model_says_how_it_is_asked():
    """Lengths within the 512 positions of the model: three quarters for the prompt, unless the response takes more."""
    shipped = settings.resolve(model="word_problems_base", tasks="word_problems")
    assert shipped.task.prompt.template == "chat"
    assert (shipped.task.prompt.max_length, shipped.task.text.max_response_length) == (384, 128)
    long = settings.resolve(
        model="word_problems_base", tasks="word_problems", sections={"task": {"text": {"max_response_length": 500}}}
    )
    assert (long.task.prompt.max_length, long.task.text.max_response_length) == (12, 500)
    assert settings.resolve(tasks="word_problems").task.prompt.template == "plain", "its tokenizer has no chat template"


def test_the_identity_is_what_is_in_force_but_for_speed():
    config = settings.resolve(model="word_problems_base", tasks="arithmetic,word_problems")
    faster = settings.resolve(
        model="word_problems_base",
        tasks="arithmetic,word_problems",
        num_problems=5,
        texts=3,
        sections={
            "mesh": {"fsdp": 2},
            "evaluation": {"batch_size": 3},
            "model": {"scan_layers": True, "attention_block_size": 4},
            "task": {"verifier": {"num_workers": 7}, "text": {"data_dir": "."}},
        },
    )
    assert identity(faster) == identity(config)
    for sections in (
        {"evaluation": {"top_k": 1}},
        {"model": {"compute_dtype": "bfloat16"}},
        {"task": {"verifier": {"tolerance": 0.1}}},
        {"task": {"prompt": {"system": "x"}}},
    ):
        other = settings.resolve(model="word_problems_base", tasks="arithmetic,word_problems", sections=sections)
        assert identity(other) != identity(config)


def test_print_config_shows_what_is_in_force(run_of):
    _, path = run_of(task={"prompt": PROMPTS["plain"]})
    result = command(f"--model={path}", "--print_config", "--config.evaluation.top_p=0.5", "--k=3")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line]
    shown = {line[2:].split()[0]: (line[0], line[2:].split()[1]) for line in lines}
    assert shown["evaluation.top_p"] == ("*", "0.5")
    assert shown["evaluation.temperature"] == (" ", "0.7")
    assert shown["task.prompt.template"] == (" ", "plain")
    assert shown["task.prompt.bos"] == (" ", "True")
    assert shown["task.verifier.tolerance"] == (" ", "0.01")
    assert shown["k"] == ("*", "3")
    assert "task.reward.correct" not in shown
