"""The command line: what the user got wrong is one line and exit code 2, and nothing is overwritten."""

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r2vpo_jax import cli, config
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import files
from r2vpo_jax.run.directory import claim
from tests.helpers.paths import ROOT
from tests.helpers.trees import leaves


def command(*args, program="train"):
    return [sys.executable, "-m", f"experiments.{program}", *map(str, args)]


# Where another platform's library is installed, JAX would speak of that.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


def run(*args, program="train"):
    return subprocess.run(
        command(*args, program=program), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def assert_refused(result, *parts):
    """One line that starts with "error:" and says each of these parts; exit code 2."""
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---- flags and fields ----


BAD_VALUES = {
    "--nonsense=1": ["Unknown command line flag 'nonsense'"],
    "--config.trainer.nonsense=1": ["unknown config field trainer.nonsense"],
    "--config.nonsense.field=1": ["unknown config field nonsense.field"],
    "--config.objective.kl_coef=0.1": ["config field objective.kl_coef is now objective.kl.coef"],
    "--config.objective.loss=ppo_clip": ["config field objective.loss is now objective.loss.name"],
    "--config.task.num_digits=2": ["config field task.num_digits is now task.arithmetic.num_digits"],
    "--config.objective.loss.options.clip_low=0.1": ["clip_low is not a hyper-parameter of loss r2vpo; it takes"],
    "--config.trainer.num_iterations=many": ["trainer.num_iterations", "many"],
    "--config.objective.name=nope": ["objective.name='nope'", "policy_gradient, ppo, ppo_clip"],
    "--config.trainer.prompts_per_rollout=5": ["prompts_per_rollout=5", "num_minibatches=2"],
    "--config.trainer.micro_batch_size=3": ["8 rows", "micro_batch_size=3"],
    "--config.task.arithmetic.num_digits=9": ["num_digits must be 1 to 6, got 9"],
    "--config.mesh.data=7": ["needs 7 devices"],
    "--profile_steps=5": ["--profile_steps=5", "first:last"],
    "stray": ["unexpected argument 'stray'"],
    "--config.model.path=/nowhere/at/all": ["/nowhere/at/all"],
    "--config.sampler.prompt_buckets=16,x": ["sampler.prompt_buckets must be whole numbers >= 1; '16,x' is not"],
    "--workdir=s3://bucket/run": ["--workdir=s3://bucket/run is an address", "gs://BUCKET/NAME"],
}


@pytest.fixture(scope="module")
def answers(config_file, tmp_path_factory):
    """flag -> (future answer, workdir): two at a time, a process spends its second on imports."""
    workdirs = {flag: tmp_path_factory.mktemp("bad") / "run" for flag in BAD_VALUES}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            flag: (pool.submit(run, f"--config={config_file}", f"--workdir={workdir}", flag), workdir)
            for flag, workdir in workdirs.items()
        }


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_bad_values_are_one_line(flag, answers):
    answer, workdir = answers[flag]
    assert_refused(answer.result(), *BAD_VALUES[flag])
    assert not workdir.exists()
    assert not (ROOT / "s3:").exists()


def test_what_is_missing_is_named(config_file, tmp_path):
    assert_refused(run(f"--workdir={tmp_path}"), "--config is required")
    assert_refused(run("--config=/nowhere/config.py", f"--workdir={tmp_path}"), "/nowhere/config.py")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_directory_goes_where_its_configuration_says(config_file):
    code = (
        "import sys\nfrom r2vpo_jax import cli\nfrom absl import flags\nflag = cli.define_config()\n"
        "flags.FLAGS(sys.argv)\nprint(cli.directory_of(flag))\n"
    )
    for file, expected in (
        (config_file, f"runs/{config_file.stem}"),
        (ROOT / "experiments/configs/math_reasoning.py:qwen3_8b,grpo", "runs/math_reasoning_qwen3_8b_grpo"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, f"--config={file}"],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert result.stdout.strip() == expected, result.stderr


def test_a_directory_that_cannot_be_written_is_refused(config_file, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    result = run(f"--config={config_file}", f"--workdir={tmp_path / 'file' / 'run'}")
    assert_refused(result, "cannot write to --workdir")
    assert (tmp_path / "file").read_text() == "not a directory"


def test_what_has_no_effect_is_said(config_file, tmp_path):
    """The file sets budget and step of a multiplier, which a clip does not have; then there is no such model."""
    flags = "--config.objective.name=ppo_clip", "--config.model.path=/nowhere/at/all"
    result = run(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *flags)
    note, error = result.stderr.splitlines()
    assert note == "note: objective.dual.budget, objective.dual.step have no effect with these settings"
    assert error.startswith("error: ")
    assert result.returncode == 2


def printed(*flags):
    """{field: (mark, value, help)} of --print_config."""
    result = run(*flags, "--print_config")
    assert result.returncode == 0, result.stderr
    *lines, blank, legend = result.stdout.splitlines()
    assert (blank, legend) == ("", "* differs from the defaults of its preset")
    lines = [(line[0], *line[2:].split(None, 2)) for line in lines if line]
    return {name: (mark, value, text) for mark, name, value, text in lines}


def test_print_config_shows_every_field_in_force(config_file, tiny_config):
    lines = printed(f"--config={config_file}", "--config.trainer.eval_every=7")
    in_force = dict(leaves(config.to_dict(tiny_config(trainer={"eval_every": 7}))))
    assert lines.keys() == in_force.keys()
    for name, (mark, value, _) in lines.items():
        assert value == str(in_force[name]), name
        assert mark in " *"
    assert lines["trainer.eval_every"] == ("*", "7", "iterations between validations")
    assert lines["trainer.eval_samples"][:2] == ("*", "2")
    assert lines["trainer.max_checkpoints"][:2] == (" ", "2")
    assert {"seed", "task.arithmetic.num_digits", "evaluation.top_p", "objective.dual.budget"} < lines.keys()
    assert not [name for name in lines if name.startswith(("task.prompt.", "task.verifier.", "task.text."))]


def test_print_config_shows_the_bounds_of_a_clip_and_no_multiplier(config_file):
    lines = printed(f"--config={config_file}", "--config.objective.name=ppo_clip")
    bounds = {name: lines[f"objective.loss.options.{name}"][:2] for name in ("clip_low", "clip_high")}
    assert bounds == {"clip_low": (" ", "0.2"), "clip_high": (" ", "0.2")}
    assert not [name for name in lines if "dual." in name or "budget" in name or "variance_coef" in name]


def test_what_a_configuration_file_refuses_is_said(tmp_path):
    for file, part in (
        ("math_reasoning.py:qwen3_8b,sgd", "'sgd' is unknown: write MODEL,METHOD,SIZE"),
        ("sweep_variance.py:huge", "full and smoke"),
    ):
        arguments = f"--config=experiments/configs/{file}", f"--workdir={tmp_path / 'run'}"
        assert_refused(run(*arguments), part)


def test_help_lists_the_flags():
    result = run("--help")
    assert result.returncode in (0, 1)  # absl exits with 1
    assert "Traceback" not in result.stdout + result.stderr
    for flag in ("--config", "--workdir", "--stop_after_iteration"):
        assert flag in result.stdout


# ---- sweeps ----

SWEEP = "--config=experiments/configs/sweep_variance.py:smoke"
BAD_SWEEPS = {
    "--config.sweep.clips=(0.1, 0.2)": ["sweep.clips is now part of sweep.cells", "clip_low", "grid.values("],
    "--config.sweep.presets=('ppo',)": [
        "sweep.presets is now part of sweep.cells",
        'grid.values("objective.name", ...)',
    ],
    "--config.sweep.nonsense=1": ["unknown config field sweep.nonsense"],
    "--config.sweep.seeds=(1, 1)": ["sweep.seeds has a value twice"],
    "--config.sweep.seeds=0.5,1": ["sweep.seeds must be whole numbers >= 0; 0.5 is not"],
    "--config.sweep.seeds=True,-1": ["sweep.seeds must be whole numbers >= 0; True is not"],
    "--config.sweep.cells=nothing": ["a grid's text must be JSON"],
    '--config.sweep.cells=[{"objective.dual.cof": 1}]': ["cof=1: unknown config field objective.dual.cof", "coef"],
    "--config.base.objective.kl_coef=0.1": ["config field base.objective.kl_coef is now base.objective.kl.coef"],
    "--mode=magic": ["mode", "auto", "fused", "processes"],
    "--mode=processes --runs_at_once=2": ["--runs_at_once is for --mode=fused"],
    "--mode=fused --processes=2": ["--processes is for --mode=processes"],
    "--mode=processes --processes=0": ["--processes must be at least 1, got 0"],
}


@pytest.fixture(scope="module")
def sweep_answers(tmp_path_factory):
    """flags -> (future answer, workdir)."""
    workdirs = {given: tmp_path_factory.mktemp("bad") / "sweep" for given in BAD_SWEEPS}
    split = {given: given.split() if given.startswith("--mode") else [given] for given in BAD_SWEEPS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            given: (pool.submit(run, SWEEP, f"--workdir={workdir}", *split[given], program="sweep"), workdir)
            for given, workdir in workdirs.items()
        }


@pytest.mark.parametrize("given", BAD_SWEEPS)
def test_bad_sweeps_are_one_line(given, sweep_answers):
    answer, workdir = sweep_answers[given]
    assert_refused(answer.result(), *BAD_SWEEPS[given])
    assert not workdir.exists()


def test_a_sweep_says_what_it_would_do():
    flags = SWEEP, "--config.sweep.seeds=(3, 4)", "--config.base.trainer.eval_every=7", "--print_config"
    result = run(*flags, program="sweep")
    assert result.returncode == 0, result.stderr
    lines = [line[2:].split(None, 1) for line in result.stdout.splitlines() if "  " in line]
    shown = {name: text for name, text in lines}
    assert shown["cells[5]"].startswith("objective.name=ppo_clip objective.loss.options.clip_low=0.3")
    assert shown["seeds"].startswith("(3, 4)")
    assert shown["trainer.eval_every"].startswith("7 ")


# ---- base models ----


@pytest.fixture
def base(tiny_checkpoint, tmp_path):
    """A copy of the base model to be damaged."""
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    return tmp_path / "base"


def remove_a_tensor(base):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    return ["model.layers.0.mlp.up_proj.weight"]


def reshape_a_tensor(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(12, np.float32)
    save_file(tensors, base / "model.safetensors")
    return ["model.norm.weight", "(12,)", "(16,)"]


def shrink_the_vocabulary(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:10].copy()
    save_file(tensors, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    return ["the tokenizer knows 17 tokens", "the embedding has 10 rows"]


def exchange_two_symbols(base):
    text = (base / "tokenizer.json").read_text()
    text = text.replace('"+": 12', '"+": 13').replace('"=": 13', '"=": 12')
    (base / "tokenizer.json").write_text(text)
    return ["tokenizer does not belong to the arithmetic task"]


def remove_the_tokenizer(base):
    for path in base.glob("tokenizer*"):
        path.unlink()
    return ["cannot load the base model"]


@pytest.mark.parametrize(
    "damage",
    [remove_a_tensor, reshape_a_tensor, shrink_the_vocabulary, exchange_two_symbols, remove_the_tokenizer],
)
def test_a_base_model_that_does_not_fit_is_refused(damage, base, config_file, tmp_path):
    parts = damage(base)
    before = snapshot(base)
    result = run(f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--config.model.path={base}")
    assert_refused(result, *parts)
    assert snapshot(base) == before
    assert not (tmp_path / "run").exists()


# ---- run directories ----


def test_the_directory_of_another_run_is_refused(config_file, tiny_config, tmp_path):
    claim(tmp_path / "run", tiny_config())
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    before = snapshot(tmp_path)
    arguments = f"--config={config_file}", f"--workdir={tmp_path / 'run'}"
    assert_refused(run(*arguments, "--config.seed=5"), "another configuration (seed: 0 there, 5 here)")
    assert snapshot(tmp_path) == before
    (tmp_path / "run" / "config.json").write_text("{torn")
    assert_refused(run(*arguments), "config.json is not valid JSON")
    assert (tmp_path / "run" / "config.json").read_text() == "{torn"


def test_claiming_twice_is_fine(tiny_config, tmp_path):
    claim(tmp_path / "new" / "run", tiny_config())
    before = snapshot(tmp_path)
    claim(tmp_path / "new" / "run", tiny_config())
    assert snapshot(tmp_path) == before
    claim(tmp_path / "reader", tiny_config(), write=False)
    assert not (tmp_path / "reader").exists()


# ---- ranges ----


@pytest.mark.parametrize(("text", "expected"), [(None, None), ("5:7", (5, 7)), ("1:1", (1, 1))])
def test_parse_range(text, expected):
    assert cli.parse_range("profile_steps", text) == expected


@pytest.mark.parametrize("text", ["5", "5:", "a:b", "0:3", "4:3", "1:2:3"])
def test_bad_ranges_raise(text):
    with pytest.raises(UsageError, match="--profile_steps"):
        cli.parse_range("profile_steps", text)


def test_what_several_processes_compare(tiny_config):
    """All fields but the places of files, which may differ from host to host, as JSON values."""
    compared = cli.settings_to_compare(tiny_config(), stop_after_iteration=3)
    assert compared == json.loads(json.dumps(compared))
    assert (compared["optimizer.learning_rate"], compared["stop_after_iteration"]) == (1e-3, 3)
    assert not {"model.path", "task.text.data_dir"} & compared.keys()


# ---- Ctrl-C ----


@pytest.mark.slow
def test_ctrl_c_ends_with_a_checkpoint_and_the_run_goes_on(config_file, tmp_path):
    """Sent once there are rows; a run of 60 iterations is then still going."""
    arguments = (
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.trainer.num_iterations=60",
        "--config.trainer.eval_every=60",
        "--config.trainer.checkpoint_every=60",
    )
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and '"kind": "train"' in file.read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "the same command goes on from there" in output
    assert "SIGINT: stopping after the iteration" in errors
    assert "Traceback" not in errors
    done = [row["iteration"] for row in files.read_jsonl(file) if row["kind"] == "train"]
    assert 1 <= len(done) < 60
    assert done == list(range(1, len(done) + 1))
    assert (tmp_path / "run" / "checkpoints" / str(len(done))).is_dir()
    assert not (tmp_path / "run" / "report").exists()

    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert f"from iteration {len(done)}" in result.stdout
    done = [row["iteration"] for row in files.read_jsonl(file) if row["kind"] == "train"]
    assert done == list(range(1, 61))
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert summary["num_updates"] == 60 * 4
