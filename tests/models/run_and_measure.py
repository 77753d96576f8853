"""What reading and writing a checkpoint holds in memory. Run by test_streaming.py in a process of its own:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.run_and_measure DIRECTORY

Prints one line of JSON: anonymous resident memory in bytes, above that of before, at its highest. It is looked at
wherever it can be highest: after each tensor is read or fetched, and before and after each parameter is placed.
(The peak that the system keeps counts the pages of mapped files too, which it can drop at any time.)
"""

import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import models, sharding
from r2vpo_jax.models import huggingface
from tests.models.goldens import assert_identical

# Most of it in stacked kernels; each device holds one eighth of those.
CONFIG = models.DecoderConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=1024,
    num_layers=16,
    num_heads=16,
    num_kv_heads=8,
    head_dim=16,
    tie_word_embeddings=False,
    family="llama",
    qkv_bias=False,
    param_dtype=jnp.bfloat16,
)


def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The highest `resident` at the calls of the wrapped functions."""

    def __init__(self):
        gc.collect()
        self.base = self.highest = resident()

    def look(self):
        self.highest = max(self.highest, resident())

    def wrap(self, owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.look()
            value = function(*args, **kwargs)
            self.look()
            return value

        setattr(owner, name, wrapped)
        return lambda: setattr(owner, name, function)

    def above(self):
        self.look()
        return self.highest - self.base


def measure(function):
    """(result, bytes at the highest above those before)."""
    peak = Peak()
    undo = [
        peak.wrap(huggingface.Tensors, "get"),
        peak.wrap(huggingface, "_place"),
        peak.wrap(huggingface._Entry, "fetch"),
        peak.wrap(huggingface, "_cast"),
    ]
    result = function()
    highest = peak.above()
    for restore in undo:
        restore()
    return result, highest


def all_at_once(path, mesh):
    """How not to do it: the model on the host, then on the devices."""
    model, params = models.from_pretrained(path)
    shardings = sharding.tree_shardings(models.logical_axes(model), params, mesh)
    return model, jax.tree.map(huggingface._place, params, shardings)


def main():
    root = pathlib.Path(sys.argv[1])
    model = models.Decoder(CONFIG)
    generator = np.random.default_rng(0)
    host = jax.tree.map(
        lambda x: generator.standard_normal(x.shape, np.float32).astype(x.dtype), models.abstract_params(model)
    )
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(host)]
    out = {"model": sum(sizes), "largest": max(sizes), "tensor": host["embed"].nbytes}
    models.save_pretrained(root / "original", model, host, max_shard_bytes=4_000_000)
    mesh = sharding.make_mesh((1, 4, 2))

    params = None
    for name, load in (("load", models.from_pretrained), ("load_all_at_once", all_at_once)):
        del params
        for _ in range(2):  # the first time around, code is loaded and pools grow
            params = None
            (_, params), out[name] = measure(lambda load=load: load(root / "original", mesh=mesh))
    shardings = sharding.tree_shardings(models.logical_axes(model), params, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, shardings))
    assert_identical(jax.tree.map(np.asarray, params), host)
    del host

    for _ in range(2):
        del params
        params = models.load_params(root / "original", model, mesh)
        before = resident()
        _, out["save"] = measure(
            lambda: models.save_pretrained(root / "export", model, params, max_shard_bytes=4_000_000)  # noqa: B023
        )
        gc.collect()
        out["kept_after_save"] = resident() - before
    files = sorted(file.name for file in (root / "original").glob("*.safetensors"))
    out["files"] = len(files)
    out["same_files"] = files == sorted(file.name for file in (root / "export").glob("*.safetensors")) and all(
        (root / "original" / file).read_bytes() == (root / "export" / file).read_bytes() for file in files
    )
    print(json.dumps(out))


if __name__ == "__main__":
    main()
