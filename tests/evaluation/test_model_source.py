"""What --model can be: a Hugging Face directory, a shipped model, a run at one of its checkpoints."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import config as config_lib
from r2vpo_jax import sharding
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import model_source
from r2vpo_jax.models import identity
from r2vpo_jax.models.base import open_base_model
from tests.helpers.evaluations import BATCH, silent


@pytest.mark.parametrize(("checkpoint", "step"), [(None, 4), ("latest", 4), ("best", 2), ("2", 2)])
def test_a_run_that_has_not_finished(checkpoint, step, unfinished, make, tiny_model, tiny_checkpoint):
    before = {p: p.read_bytes() for p in unfinished.rglob("*") if p.is_file()}
    source = model_source.find(str(unfinished), checkpoint)
    assert (source.iteration, source.directory) == (step, tiny_checkpoint)
    base = open_base_model(make({"model": {"compute_dtype": "bfloat16"}}).model_config(source.directory))
    params = source.load_params(base, sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
    jax.tree.map(
        lambda loaded, x: np.testing.assert_array_equal(loaded, np.asarray(x + step).astype(jnp.bfloat16)),
        params,
        tiny_model[1],
    )
    assert {p: p.read_bytes() for p in unfinished.rglob("*") if p.is_file()} == before
    parts = {name: model_source.find(str(unfinished), name).identity(base) for name in ("2", "4")}
    assert source.identity(base) in parts.values()
    assert identity.differing(parts["2"], parts["4"]) == identity.differing(base.identity(), parts["2"]) == ["weights"]


def test_a_checkpoint_is_not_joined_to_another_base_model(unfinished, make, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'))
    source = dataclasses.replace(model_source.find(str(unfinished), "4"), directory=tmp_path / "other")
    base = open_base_model(make().model_config(source.directory))
    with pytest.raises(UsageError, match=r"is not the base model that .* was started from: it differs in architecture"):
        source.load_params(base, sharding.make_mesh((1, 1, 1), jax.devices()[:1]))


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
    assert config["checkpoint"] == 4


def test_paths_that_are_no_model(tmp_path, tiny_config, tiny_checkpoint):
    with pytest.raises(FileNotFoundError, match="neither a Hugging Face directory nor a run"):
        model_source.find(str(tmp_path))
    with pytest.raises(ValueError, match="needs a run directory"):
        model_source.find(str(tiny_checkpoint), "4")
    config = config_lib.to_dict(tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="without an intact checkpoint"):
        model_source.find(str(tmp_path))
    config["objective"]["variance_budget"] = 0.01
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"not of this version .*objective.dual.budget.*; evaluate .*hf"):
        model_source.find(str(tmp_path))
    assert model_source.find(None).directory == model_source.find("arithmetic_base").directory
    assert model_source.find(None).name == "arithmetic_base"
