"""Where arrays live; and that it makes no difference."""

import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from r2vpo_jax import sharding
from tests import run_on_eight_devices
from tests.helpers.paths import ROOT


def run_script(*args):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.run_on_eight_devices", *args]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


# ---- one device and eight ----


@pytest.fixture(scope="module")
def comparison():
    return run_script()


@pytest.mark.slow
@pytest.mark.parametrize("case", run_on_eight_devices.CASES)
@pytest.mark.parametrize(
    "check", [*run_on_eight_devices.CHECKS, *(f"packed {check}" for check in run_on_eight_devices.PACKED_CHECKS)]
)
def test_eight_devices_agree_with_one(check, case, comparison):
    assert comparison[f"{check} on {case}"] is None, comparison[f"{check} on {case}"]


@pytest.mark.slow
def test_prompts_that_do_not_divide_draw_the_same(comparison):
    assert comparison["three draws on 8,1,1"] is None, comparison["three draws on 8,1,1"]


@pytest.mark.slow
def test_adapters_get_the_same_update(comparison):
    assert comparison["update of adapters on 2,2,2"] is None, comparison["update of adapters on 2,2,2"]


@pytest.mark.slow
@pytest.mark.parametrize("case", run_on_eight_devices.HEADS)
@pytest.mark.parametrize("way", run_on_eight_devices.WAYS)
def test_attention_is_computed_where_rows_and_heads_are(way, case, comparison):
    assert comparison[f"{way} on {case}"] is None, comparison[f"{way} on {case}"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["8,1,1", "2,2,2"])
def test_segments_on_eight_devices_draw_the_same(case, comparison):
    assert comparison[f"segments on {case}"] is None, comparison[f"segments on {case}"]


@pytest.fixture(scope="module")
def placement():
    return run_script("placement")


@pytest.mark.parametrize("check", [check.__name__ for check in run_on_eight_devices.PLACEMENT])
def test_placement(check, placement):
    assert placement[check] is None, placement[check]


# ---- the rules ----


def sizes(data, fsdp, tensor):
    """Enough of a mesh for the rules."""
    return types.SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(
    ("axes", "shape", "mesh_shape", "expected"),
    [
        (("batch", None), (8, 5), (2, 2, 2), (("data", "fsdp"), None)),
        (("vocab", "embed"), (32, 16), (2, 2, 2), (("tensor",), ("fsdp",))),
        (("embed", "mlp"), (16, 32), (8, 1, 1), (None, None)),
        # 6 rows do not divide over 2 x 2, but over the last 2; 5 over none.
        (("batch",), (6,), (2, 2, 1), (("fsdp",),)),
        (("batch",), (5,), (2, 2, 1), (None,)),
        (("embed", "kv_heads", None), (16, 2, 4), (1, 1, 8), (None, None, None)),
        # The vocabulary of logits comes first and takes fsdp from the rows.
        (("batch", None, "logits"), (8, 3, 32), (2, 2, 2), (("data",), None, ("fsdp", "tensor"))),
        # A name that is not in the table is replicated.
        (("layers", "embed"), (2, 16), (1, 2, 1), (None, ("fsdp",))),
    ],
)
def test_partition_spec(axes, shape, mesh_shape, expected):
    assert sharding.partition_spec(axes, shape, sizes(*mesh_shape)) == PartitionSpec(*expected)


def test_the_table_says_what_does_not_divide():
    axes = {"k": ("embed", "kv_heads", None), "q": ("embed", "heads", None)}
    arrays = {"k": np.zeros((16, 2, 4)), "q": np.zeros((16, 8, 4))}
    k, q = sharding.placement_table(axes, arrays, sizes(1, 2, 4)).splitlines()
    assert " ".join(k.split()) == "k (16, 2, 4) [fsdp, -, -] (replicated, does not divide: kv_heads)"
    assert " ".join(q.split()) == "q (16, 8, 4) [fsdp, tensor, -]"
    rows = sharding.placement_table({"x": ("batch",)}, {"x": np.zeros(8)}, sizes(2, 2, 1))
    assert " ".join(rows.split()) == "x (8,) [data+fsdp]"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1), "3 numbers"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 1), "positive"),
        ((2, 1, 1), "needs 2 devices, but there are 1"),
        ((-1, 2, 1), "does not divide 1 devices"),
    ],
)
def test_bad_meshes_raise(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape, jax.devices()[:1])


def test_on_one_device_nothing_is_constrained(mesh):
    x = np.ones((3, 2))
    with sharding.activate(mesh):
        assert sharding.constrain(x, "batch", None) is x


def test_to_host_leaves_other_things_alone():
    tree = sharding.to_host({"a": jax.numpy.arange(3), "b": np.arange(2), "c": "text"})
    assert isinstance(tree["a"], np.ndarray)
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])
    assert tree["c"] == "text"
