"""Every command of docs/rewards.md and docs/evaluation.md runs as it is printed, but for sizes, on the fixtures."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "data" / "fixtures"
REWARDS, EVALUATION = ROOT / "docs" / "rewards.md", ROOT / "docs" / "evaluation.md"
BASE = "models/DeepSeek-R1-Distill-Qwen-1.5B"  # the name that the pages give to a model of the reader's

# What makes it small. Later flags win.
OF_EVALUATE = (
    "--num_problems=3",
    "--k=2",
    "--config.task.text.max_response_length=8",
    "--config.evaluation.batch_size=4",
)
OF_TRAIN = (
    "--config.trainer.num_iterations=1",
    "--config.trainer.prompts_per_rollout=4",
    "--config.trainer.num_minibatches=2",
    "--config.trainer.micro_batch_size=4",
    "--config.trainer.eval_problems=2",
    "--config.trainer.eval_samples=1",
    "--config.trainer.test_problems=2",
    "--config.trainer.test_samples=1",
    "--config.trainer.checkpoint_every=1",
)


def commands(page):
    """The arguments of each command of a page, after `python`."""
    blocks = re.findall(r"(?:^    .*\n)+", page.read_text(), flags=re.MULTILINE)
    return [
        shlex.split(block.replace("\\\n", " ").replace("=$'", "='"))[1:] for block in blocks if "    python" in block
    ]


def test_the_pages_have_these_commands():
    """So that none is left out below without being noticed."""
    outputs = [
        a for page in (REWARDS, EVALUATION) for c in commands(page) for a in c if re.match("--(workdir|output)=", a)
    ]
    assert outputs == [
        "--workdir=runs/brief",
        "--workdir=runs/units",
        "--output=runs/eval",
        "--output=runs/eval_arithmetic",
        "--output=runs/eval_sample",
        "--output=runs/eval/r1_distill",
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A working directory with the fixtures as data, the functions of docs/rewards.md, a model, and a run."""
    directory = tmp_path_factory.mktemp("commands")
    (directory / "experiments").symlink_to(ROOT / "experiments")
    (directory / "data").symlink_to(FIXTURES)
    (listing,) = re.findall(r"```python\n(# my_rewards.*?)```", REWARDS.read_text(), flags=re.DOTALL)
    (directory / "my_rewards.py").write_text(listing)
    shutil.copytree(ROOT / "r2vpo_jax" / "assets" / "models" / "word_problems_base", directory / BASE)
    shape = json.loads((directory / BASE / "config.json").read_text())
    (directory / BASE / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 4096}))
    run(directory, ["-m", "experiments.train", "--config=experiments/configs/arithmetic.py", *OF_TRAIN])
    return directory


def run(workplace, arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=workplace, env=environment, timeout=900
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_rewards(workplace):
    longer = ("--config.task.prompt.max_length=1000", f"--config.model.path={BASE}")
    own = {"brief": "reward/function", "units": "reward/function_ends_with_unit"}
    for arguments in commands(REWARDS):
        if "experiments.train" in arguments:
            run(workplace, [*arguments, *OF_TRAIN, *longer])
            name = next(a for a in arguments if a.startswith("--workdir=")).rpartition("/")[2]
            rows = [json.loads(line) for line in (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()]
            (row,) = [row for row in rows if row["kind"] == "train"]
            assert (row["outcome/judged"], own[name] in row) == (1, True)
        else:
            assert arguments == ["scripts/benchmark.py", "verifiers"]


@pytest.mark.slow
def test_the_commands_of_evaluation(workplace):
    for arguments in commands(EVALUATION):
        said = run(workplace, arguments if "--print_config" in arguments else [*arguments, *OF_EVALUATE])
        if "--output=runs/eval_sample" in arguments:
            page = (workplace / "runs" / "eval_sample" / "evaluation.md").read_text()
            notice = (
                "test: scored on a fixed sample of 3 of 264 problems, the same for all runs (word_problems 3, gsm8k 0)"
            )
            assert notice in said
            assert notice in page
            assert "warning: no problem of gsm8k is scored in test; score more problems" in page
