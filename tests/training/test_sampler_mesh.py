"""Rollouts on devices of their own: the same run, whether the two meshes take turns or not."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from r2vpo_jax.run import files
from tests.helpers.paths import ROOT
from tests.helpers.runs import rows, undocumented

pytestmark = pytest.mark.slow


def test_two_meshes_do_what_one_does(tmp_path):
    """Bit for bit beside and in turns, also when it was stopped between; to rounding on one mesh of four devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.run_on_two_meshes", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert any(line == "sampling on a mesh of its own: {'data': 2, 'fsdp': 1, 'tensor': 2}" for line in said)
    assert any(line.startswith("note: 4 devices sample and the others learn, in turns") for line in said)

    turns, beside, one = (rows(tmp_path / name) for name in ("turns", "beside", "one"))
    assert beside == turns
    assert rows(tmp_path / "beside", "samples") == rows(tmp_path / "turns", "samples")
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("turns", "beside")]
    assert weights[0] == weights[1]
    for a, b in zip(beside, one, strict=True):
        assert a.keys() - b.keys() == ({"weights/bytes"} if a["kind"] != "evaluation" else set())
        for name, value in b.items():
            if isinstance(value, str):
                assert a[name] == value
            else:  # what is sampled is the same, what is summed is so to rounding
                np.testing.assert_allclose(a[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    trained = [row for row in files.read_jsonl(tmp_path / "beside" / "metrics.jsonl") if row["kind"] == "train"]
    assert {"time/beside", "time/weights", "time/wait", "weights/bytes"} <= trained[0].keys()
    assert not undocumented(trained[0])
