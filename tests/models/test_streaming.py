"""Checkpoints onto and off a mesh, parameter by parameter."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open

from r2vpo_jax import config, models, sharding
from r2vpo_jax.training.learner import Learner
from tests.helpers.paths import ROOT
from tests.models.goldens import GOLDEN, assert_identical


def start(module, *args, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.models.{module}", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """What they printed; all must have ended well."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [output for output, _ in outputs]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("resident memory is read from /proc")
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed is given back, and does not hide in a pool
    }
    (output,) = finish(start("run_and_measure", tmp_path_factory.mktemp("measured"), **environment))
    return json.loads(output.splitlines()[-1])


def test_loading_holds_one_stacked_parameter_above_the_model(measured):
    bound = measured["model"] + measured["largest"] + 1_000_000
    assert measured["model"] <= measured["load"] <= bound
    assert measured["load_all_at_once"] > 1.4 * bound, "this measurement would not see a second copy of the model"


def test_exporting_holds_a_few_tensors(measured):
    assert measured["save"] <= 4 * measured["tensor"] + 1_000_000
    assert measured["save"] < measured["model"] / 4
    assert measured["kept_after_save"] < measured["tensor"]


def test_what_is_read_from_eight_devices_is_written_again(measured):
    assert measured["files"] > 2
    assert measured["same_files"]


@pytest.mark.slow
def test_two_processes_read_and_write_together(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    checkpoint = GOLDEN / "llama_llama3_untied"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    outputs = finish(*(start("run_as_process", port, i, checkpoint, tmp_path, **flags) for i in range(2)))
    assert all("parameter embed is not finite" in output for output in outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert len(list((tmp_path / "0").glob("model-*.safetensors"))) > 1
    assert_identical(models.from_pretrained(tmp_path / "0")[1], models.from_pretrained(checkpoint)[1])


@pytest.mark.parametrize("case", ["kv1_tied_rope_theta", "qwen3_untied_bias", "pangu_untied"])
def test_on_a_mesh_or_on_the_host_the_same_is_read(case, mesh):
    model, params = models.from_pretrained(GOLDEN / case)
    same_model, placed = models.from_pretrained(GOLDEN / case, mesh=mesh)
    assert same_model.config == model.config
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding.mesh, placed)) == [mesh] * len(jax.tree.leaves(placed))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert_identical(jax.device_get(placed), params)


def test_the_model_is_known_before_its_weights(monkeypatch):
    path = GOLDEN / "kv4_tied_rope_theta"
    expected_model, expected = models.from_pretrained(path)
    read = []
    get = models.huggingface.Tensors.get
    monkeypatch.setattr(models.huggingface.Tensors, "get", lambda self, name: read.append(name) or get(self, name))
    model = models.read_model(path)
    assert models.stored_dtype(path) == model.config.param_dtype == "bfloat16"
    assert model.config == expected_model.config
    assert not read
    assert_identical(models.load_params(path, model), expected)
    assert len(read) == len(set(read)) == len(safe_open(path / "model.safetensors", "np").keys())


def test_the_largest_parameters_are_read_first(monkeypatch, mesh):
    sizes = []
    place = models.huggingface._place
    monkeypatch.setattr(models.huggingface, "_place", lambda x, where: sizes.append(x.size) or place(x, where))
    models.from_pretrained(GOLDEN / "qwen3_tied", mesh=mesh)
    assert sizes == sorted(sizes, reverse=True)


@pytest.fixture(scope="module")
def learner(mesh):
    sections = {"trainer": {"micro_batch_size": 4}, "mesh": {"data": 1}}
    return Learner(models.read_model(GOLDEN / "kv4_tied_rope_theta"), config.from_flags(config.make(**sections)), mesh)


def test_a_state_takes_placed_parameters_as_they_are(learner, monkeypatch):
    """Not over the host, and without a copy: the buffers are the state's now."""
    path = GOLDEN / "kv4_tied_rope_theta"
    host = models.load_params(path, learner.model)
    placed = models.load_params(path, learner.model, learner.mesh)
    monkeypatch.setattr(jax, "make_array_from_callback", None)
    monkeypatch.setattr(jax, "device_put", None)
    state = learner.init_state(placed)
    monkeypatch.undo()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(placed))
    assert_identical(jax.device_get(state.params), host)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state.params, learner.param_shardings))
    assert_identical(jax.device_get(learner.init_state(host).params), host)


def test_a_state_moves_parameters_that_are_elsewhere(learner):
    host = models.load_params(GOLDEN / "kv4_tied_rope_theta", learner.model)
    state = learner.init_state(jax.device_put(host, jax.devices()[0]))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state.params, learner.param_shardings))
    assert_identical(jax.device_get(state.params), host)
    assert sharding.to_host(state.version) == 0
