"""The golden checkpoints (scripts/make_golden.py), and what the tests of this directory do with them."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import models

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir())
QWEN2 = [case for case in CASES if case.startswith("kv")]
TOLERANCE = 2e-4  # times the largest logit
SHOWS = 100 * TOLERANCE  # what a fault must move the logits by


# Each program runs a few times at most: it needs no optimized code.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def jitted_apply(model, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask=mask)


def apply(model, params, tokens, mask):
    return np.asarray(jitted_apply(model, params, tokens, mask))


@functools.cache
def golden(case):
    """(model, params, tokens, mask, expected logits), everything in float32."""
    expected = np.load(GOLDEN / case / "expected.npz", allow_pickle=False)
    model, params = models.from_pretrained(GOLDEN / case, param_dtype=jnp.float32)
    return model, params, expected["tokens"], expected["mask"].astype(bool), expected["logits"]


def distance(logits, expected, mask):
    """Largest difference on valid positions, in units of the largest expected logit."""
    return np.max(np.abs(logits - expected)[mask]) / np.max(np.abs(expected[mask]))


def raw_config(case):
    return json.loads((GOLDEN / case / "config.json").read_text())


def copy(case, destination, **changes):
    """A golden checkpoint with some fields of its config.json replaced; None removes a field."""
    shutil.copytree(GOLDEN / case, destination)
    raw = {key: value for key, value in (raw_config(case) | changes).items() if value is not None}
    (destination / "config.json").write_text(json.dumps(raw))
    return destination


def replaced(params, path, value):
    """The tree with `value(leaf)` in place of one leaf."""
    if len(path) == 1:
        return params | {path[0]: value(params[path[0]])}
    return params | {path[0]: replaced(params[path[0]], path[1:], value)}


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def write_index(path, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
