"""What the documents promise: listings run, links lead somewhere, flags, fields and metrics exist, and none is left out."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from r2vpo_jax import config

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "BUILD.md", *(ROOT / "docs").rglob("*.md")])
page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def listings(page):
    """Blocks of Python."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


# README.md ----------------------------------------------------------------------------------------------------


def test_readme_snippet_runs_as_printed():
    snippet = listings(ROOT / "README.md")[0]
    assert len(snippet.strip().splitlines()) <= 18
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loss, coefficient = (float(x) for x in done.stdout.split())
    # r = 1.2, 0.75, 0.8; A = 1, 1, -1: mean of rA = 1.15 / 3; mean (r-1)^2 = (0.04 + 0.0625 + 0.04) / 3 = 0.0475.
    assert loss == pytest.approx(-1.15 / 3 + 2.5 * 0.0475, rel=1e-5)
    # step (V / budget - 1) = 0.5 (0.0475 / 0.04 - 1) = 0.09375.
    assert coefficient == pytest.approx(2.5 + 0.09375, rel=1e-5)


def test_readme_quotes_the_algorithm_as_it_is():
    program = (ROOT / "experiments" / "minimal.py").read_text()
    assert all(listing.strip() in program for listing in listings(ROOT / "README.md")[1:])


# docs/extending.md --------------------------------------------------------------------------------------------

EXTENDING = ROOT / "docs" / "extending.md"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A working directory with the files of docs/extending.md, and the checkout's experiments."""
    directory = tmp_path_factory.mktemp("extending")
    (directory / "experiments").symlink_to(ROOT / "experiments")
    for listing in listings(EXTENDING):
        (directory / re.match(r"# (\w+\.py)\n", listing)[1]).write_text(listing)
    return directory


def run(workplace, *arguments):
    """The output of a Python program in the workplace."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=workplace, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(workdir, page=EXTENDING):
    """The arguments of the command of a page that has this --workdir."""
    blocks = re.findall(r"(?:^    .*\n)+", page.read_text(), flags=re.MULTILINE)
    (text,) = (b for b in blocks if b.startswith("    python -m experiments.train") and f"--workdir={workdir}" in b)
    return shlex.split(text.replace("\\\n", " "))[1:]


def rows(workplace, workdir):
    return [json.loads(line) for line in (workplace / workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_toy_loss_trains(workplace):
    run(workplace, *command("runs/toy_loss"))
    summary = json.loads((workplace / "runs" / "toy_loss" / "report" / "summary.json").read_text())
    assert (summary["num_iterations"], summary["num_updates"]) == (2, 16)
    saved = json.loads((workplace / "runs" / "toy_loss" / "config.json").read_text())
    assert saved["objective"]["loss"]["options"] == {"strength": 1.0}
    assert all(row["loss/penalty"] > 0 for row in rows(workplace, "runs/toy_loss") if row["kind"] == "train")


# What makes every metric appear.
EVERYTHING = (
    "--config.objective.advantage.estimator=gae",
    "--config.objective.kl.coef=0.01",
    "--config.objective.correction.mode=truncate",
    "--config.objective.correction.filter=mean_k3",
    "--config.objective.correction.filter_high=10.0",
    "--config.objective.correction.step_scaling=sqrt",
    "--config.objective.loss.imitation_coef=0.1",
    "--config.objective.dual.measure=after",
    "--config.replay.lag=1",
)
OF_OVERLAP = {"time/beside", "time/wait", "time/weights", "weights/bytes"}  # training/test_sampler_mesh.py
OF_ENGINES = {  # training/test_trainer_endpoint.py
    *("engine/requests", "engine/retries", "engine/weights_age"),
    *("time/engine_request", "throughput/engine_tokens_per_second"),
}
OF_TEXT_TASKS = {"reward/correct", "reward/format", "reward/function"}


@pytest.fixture(scope="module")
def toy_task_rows(workplace):
    run(workplace, *command("runs/toy_task"), *EVERYTHING)
    return rows(workplace, "runs/toy_task")


@pytest.mark.slow
def test_the_toy_task_is_learned_from(toy_task_rows, workplace):
    assert [row["kind"] for row in toy_task_rows if row["kind"] != "evaluation"] == ["fill", "train"]
    assert all(row["outcome/errors"] == 0 for row in toy_task_rows if row["kind"] != "evaluation")
    assert any(0 < row["reward/mean"] < 1 for row in toy_task_rows if row["kind"] == "train")
    samples = (workplace / "runs" / "toy_task" / "samples.jsonl").read_text()
    assert re.search(r'"prompt": "\d\d\+\d\d="', samples)


def test_options_are_set_in_a_config_file(workplace):
    text = EXTENDING.read_text()
    objective = re.search(r"^ +(objective=\{.*\}),?$", text, flags=re.MULTILINE)[1]
    task = re.search(r"`(task=\{.*?\}\})`", text)[1]
    program = f"""
from r2vpo_jax import config, tasks
made = config.from_flags(config.make({objective}, {task}))
task = tasks.make(made.task, tokenizer=None, eos_ids=(1,))
print(made.objective.loss.options["strength"], task._parity)
"""
    assert run(workplace, "-c", program).split() == ["0.5", "1"]


def test_the_task_that_can_be_fused_is_the_same_task(workplace):
    program = """
import jax
import numpy as np
from r2vpo_jax import config, tasks
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.sweeps import fused
base = open_base_model(config.ModelConfig())
section = {"name": "my_fused_task:FusedToy", "options": {"parity": 1}}
task = tasks.make(config.from_flags(config.make(task=section)).task, base.tokenizer, base.eos_ids)
index = np.array([0, 1, 1234, 2999, 3000])
for split in ("train", "validation", "test"):
    tokens, length = jax.jit(lambda index: task.traced_problems(split, index))(index)
    problems = task.problems(split, index)
    np.testing.assert_array_equal(tokens, problems.tokens)
    np.testing.assert_array_equal(length, problems.length)
rows = np.random.default_rng(0).integers(0, len(base.tokenizer), (4000, task.max_response_length))
lengths = np.random.default_rng(1).integers(1, task.max_response_length + 1, 4000)
ended = np.arange(4000) % 2 == 0
rows[ended, lengths[ended] - 1] = base.eos_ids[0]
index = np.zeros(4000, np.int32)
reward, outcome = jax.jit(lambda *x: task.traced_verify("train", *x))(index, rows, lengths)
verdicts = task.verify("train", index, rows, lengths)
np.testing.assert_array_equal(reward, verdicts.reward)
np.testing.assert_array_equal(outcome, verdicts.outcome)
print(0.1 < verdicts.reward.mean() < 0.9, fused.refusal(config.from_flags(config.make(task=section))))
print(fused.refusal(config.from_flags(config.make(task={"name": "my_tasks:Toy"}))))
"""
    same, refusal = run(workplace, "-c", program).splitlines()
    assert same == "True None"
    assert "my_tasks:Toy are not JAX" in refusal


def test_the_verifier_judges_in_its_own_process(workplace):
    program = r"""
from r2vpo_jax import verifiers
with verifiers.VerifierPool(num_workers=1) as pool:
    responses = [r"\boxed{b, a}", r"\boxed{a}", "nothing"]
    print(*pool.score("my_verifier:same_set", [""] * 3, responses, ["a, b"] * 3)[0])
"""
    assert run(workplace, "-c", program).split() == ["1.0", "0.0", "0.0"]


def test_the_config_file_sets_options_of_ones_own(workplace):
    shown = run(workplace, "-m", "experiments.train", "--config=my_config.py", "--print_config")
    shown = {
        name: value
        for name, value, *_ in (line.removeprefix("*").split() for line in shown.splitlines() if "." in line)
    }
    assert (shown["objective.loss.options.strength"], shown["task.options.parity"]) == ("0.5", "1")


def test_the_grid_is_what_the_page_says(workplace):
    shown = run(workplace, "-m", "experiments.sweep", "--config=my_sweep.py", "--print_config").splitlines()
    cells = [line.split()[2:] for line in shown if line.startswith("* cells[")]
    assert len(cells) == 16
    assert cells[0] == [
        "objective.name=r2vpo_fixed", "objective.dual.coef=0.5", "trainer.num_epochs=1", "replay.lag=0"
    ]  # fmt: skip
    assert any(line.split()[:3] == ["*", "trainer.num_iterations", "20"] for line in shown)


def test_the_advantage_and_the_family_are_what_the_page_says(workplace):
    program = """
import numpy as np
from my_advantages import best_of_group
from r2vpo_jax import advantages
rewards = advantages.Rewards(np.float32([[1], [0], [0], [1]]), np.ones((4, 1), bool), group_size=2)
print(best_of_group(rewards, scale="std"))
import my_family
from r2vpo_jax.models import families
shape = dict(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
fields = families.read_fields(dict(shape, model_type="my_model", attention_bias=True))
print(fields["family"], fields["qkv_bias"], fields["max_position_embeddings"])
"""
    first, second = run(workplace, "-c", program).splitlines()
    # Two groups of deviation 1 / sqrt(2): +-0.7071; the lower ones become 0.
    assert [float(x) for x in first.strip("[]").split()] == pytest.approx([0.7071, 0, 0, 0.7071], abs=1e-3)
    assert second == "my_family True 8192"


@pytest.mark.slow
def test_my_model_and_my_data(workplace):
    """The command of README.md with a model that ships, 150 problems in place of the data, and small sizes."""
    (workplace / "data").mkdir()
    problems = [
        {"question": f"Ann has {a} pens and finds {b} more. How many pens are there?", "answer": str(a + b)}
        for a in range(2, 17)
        for b in range(2, 12)
    ]
    (workplace / "data" / "my.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    given = [a.replace("models/MY_MODEL", "word_problems_base") for a in command("runs/mine", ROOT / "README.md")]
    small = ("num_iterations=1", "prompts_per_rollout=4", "eval_problems=8", "test_problems=8")
    run(
        workplace,
        *given,
        *(f"--config.trainer.{size}" for size in small),
        "--config.task.prompt.max_length=48",
        "--config.task.text.max_response_length=16",
    )
    assert (workplace / "runs" / "mine" / "hf" / "model.safetensors").exists()


# docs/data.md -------------------------------------------------------------------------------------------------

DATA = ROOT / "docs" / "data.md"


def blocks_of(page):
    """Blocks of commands."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run_blocks(blocks, directory, timeout=900):
    """The output of blocks of commands, one after the other, in a directory with the folders that they name."""
    for name in ("experiments", "scripts", "tests"):
        if not (directory / name).exists():
            (directory / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DATA": "tests/data/fixtures",
    }
    script = "set -euo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def is_light(block):
    """Whether it needs neither a model nor generators."""
    return "experiments." not in block and "chain_sum" not in block


def test_what_the_data_page_reads_is_there(tmp_path):
    shown = run_blocks([block for block in blocks_of(DATA) if is_light(block)], tmp_path)
    for said in (r"answer='10,\\!080'", "answer='naD'", "answer='six'", "question='What is $3^2$?'"):
        assert said in shown


@pytest.mark.slow
def test_the_other_commands_of_the_data_page_run(tmp_path):
    small = ("prompts_per_rollout=4", "num_minibatches=2", "eval_problems=2", "test_samples=1")
    flags = " ".join(f"--config.trainer.{setting}" for setting in small) + " --config.task.verifier.num_workers=1"
    blocks = [
        block.replace("--stop_after", f"{flags} --stop_after") for block in blocks_of(DATA) if not is_light(block)
    ]
    shown = run_blocks(blocks, tmp_path)
    assert "train: 8 problems" in shown
    assert "test: 10 problems" in shown
    assert "source='countdown'" in shown
    sources = next(line.split() for line in shown.splitlines() if line.count("dapo_math_17k ") > 1)
    assert (sources.count("dapo_math_17k"), sources.count("chain_sum")) == (6, 2)
    outcomes = (tmp_path / "runs" / "evaluation_stop" / "outcomes.jsonl").read_text().splitlines()
    assert all("\nThat" not in text[:-5] for line in outcomes for text in json.loads(line)["texts"])


# docs/metrics.md ----------------------------------------------------------------------------------------------


def documented_metrics():
    """First columns of the tables under "The lines", and the names of evaluation lines."""
    text = (ROOT / "docs" / "metrics.md").read_text().partition("## The lines")[2].partition("## The other files")[0]
    return {
        n for line in re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE) for n in re.findall(r"`([^`]+)`", line)
    }


def test_every_metric_is_documented_and_every_documented_metric_exists(toy_task_rows):
    written = {name for row in toy_task_rows for name in row} - {"kind", "split"}
    assert documented_metrics() == written | OF_TEXT_TASKS | OF_OVERLAP | OF_ENGINES


# All pages ----------------------------------------------------------------------------------------------------


@page_by_page
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


@page_by_page
def test_config_flags_exist(page):
    for flag in re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)+)", page.read_text()):
        assert is_field(flag), f"{page.name} names --config.{flag}"


@page_by_page
def test_config_fields_exist(page):
    """`objective.kl.coef`, `objective.kl.coef=0.1` in prose."""
    sections = "objective|trainer|sampler|optimizer|replay|alarms|mesh|evaluation|task|model"
    for field in re.findall(rf"`((?:{sections})\.[a-z_0-9.]+)(?:=[^`]*)?`", page.read_text()):
        assert is_field(field) or field.endswith((".py", ".md", ".json", ".jsonl", ".apply")), f"{page.name}: {field}"


def is_field(path):
    section, _, name = path.partition(".")
    if section == "sweep":
        return name in {field.name for field in dataclasses.fields(config.SweepConfig)}
    node = config.make()
    for name in path.split("."):
        if name not in node:
            return False
        node = node[name]
    return True
