"""experiments.export: a checkpoint of a run as a Hugging Face directory."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from r2vpo_jax import models
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import exports
from tests.helpers.paths import ROOT
from tests.models.goldens import assert_identical


@pytest.mark.parametrize(("checkpoint", "step"), [("best", 2), ("last", 4), ("latest", 4), ("4", 4)])
def test_a_checkpoint_becomes_a_directory(checkpoint, step, unfinished, tiny_model, tiny_checkpoint, tmp_path):
    """Of a run that has not finished; the last one is torn. The run is only looked at."""
    before = {p: p.read_bytes() for p in unfinished.rglob("*") if p.is_file()}
    said = []
    exports.export(str(unfinished), checkpoint, tmp_path / "out", say=said.append)
    assert {p: p.read_bytes() for p in unfinished.rglob("*") if p.is_file()} == before
    params = models.from_pretrained(tmp_path / "out")[1]
    assert_identical(params, jax.tree.map(lambda x: np.asarray(x + np.float32(step)), tiny_model[1]))
    names = {file.name for file in tiny_checkpoint.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tiny_checkpoint / name).read_text())
    assert said[-1].startswith(f"written: {tmp_path / 'out'}, iteration {step} of {unfinished}; ")
    assert "% of the weights are those of the base model" in said[-1]


def test_another_dtype(unfinished, tiny_model, tmp_path):
    exports.export(str(unfinished), "best", tmp_path, dtype="bfloat16", say=lambda _: None)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    expected = jax.tree.map(lambda x: np.asarray(x + np.float32(2)).astype(jax.numpy.bfloat16), tiny_model[1])
    assert_identical(models.from_pretrained(tmp_path)[1], expected)


def test_what_cannot_be_exported_is_refused(unfinished, tiny_checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    moved = tmp_path / "moved"
    moved.mkdir()
    raw = json.loads((unfinished / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(raw | {"model": raw["model"] | {"path": str(tmp_path / "gone")}}))
    (moved / "checkpoints").symlink_to(unfinished / "checkpoints")
    for run, checkpoint, output, said in (
        (unfinished, "3", "out", "checkpoint 3 .* cannot be used: .*those there are: 2, 4, 6"),
        (unfinished, "6", "out", "is damaged"),
        (unfinished, "first", "out", "--checkpoint=first is neither an iteration nor last nor best"),
        (unfinished, "best", "full", "full is not empty; choose another directory"),
        (unfinished, "best", "file", "file"),
        (tiny_checkpoint, "last", "out", "needs a run directory"),
        (tmp_path / "nothing", "last", "out", "neither a Hugging Face directory nor a run"),
        (moved, "last", "out", "the base model of .*moved is not where it was .*gone"),
    ):
        with pytest.raises(UsageError, match=said):
            exports.export(str(run), checkpoint, tmp_path / output, say=lambda _: None)
        assert not (tmp_path / "out").exists(), said
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_the_command_line(unfinished, tmp_path):
    """What it says when all is well, and one line when it is not."""

    def command(*arguments):
        call = [sys.executable, "-m", "experiments.export", f"--model={unfinished}", *arguments]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)

    result = command("--checkpoint=best", f"--output={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"written: {tmp_path / 'out'}, iteration 2 of {unfinished}; ")
    again = command("--checkpoint=best", f"--output={tmp_path / 'out'}")
    assert again.returncode == 2
    assert again.stderr == f"error: --output={tmp_path / 'out'} is not empty; choose another directory\n"
