"""Low-rank adapters as parameters: apart from the weights that are frozen beside them, at their start, and merged.

In the decoder's tree the factors of an adapter lie beside the kernel that they are added to, `lora_a` [inputs, rank] and
`lora_b` [rank, outputs]. Without these leaves the same decoder is the base model.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from r2vpo_jax import sharding
from r2vpo_jax.models.decoder import Decoder, abstract_params, init_params, logical_axes

FACTORS = ("lora_a", "lora_b")

# Trees --------------------------------------------------------------------------------------------------


def split(params) -> tuple[Any, dict]:
    """(what is trained, what is frozen beside it) of a decoder's tree, whatever its leaves are.

    These are the adapters and all else; without adapters everything is trained and the second is empty.
    """
    adapters = _part(params, True) if isinstance(params, Mapping) else {}
    return (adapters, _part(params, False)) if adapters else (params, {})


def join(frozen: Mapping, trained):
    """The whole tree again, of the parts that `split` gives."""
    if not frozen:
        return trained
    joined = dict(frozen)
    for name, value in trained.items():
        joined[name] = join(joined.get(name, {}), value) if isinstance(value, Mapping) else value
    return joined


def without_adapters(params: Mapping) -> dict:
    """The tree of the model under the adapters."""
    return _part(params, False)


def _part(tree: Mapping, adapters: bool) -> dict:
    result = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if inner := _part(value, adapters):
                result[name] = inner
        elif (name in FACTORS) == adapters:
            result[name] = value
    return result


def notice(model: Decoder) -> str:
    """A line about what is trained, and beside what."""
    config, (adapters, frozen) = model.config.lora, split(abstract_params(model))
    trained, weights = (sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for part in (adapters, frozen))
    return (
        f"adapters of rank {config.rank} beside {', '.join(config.target_modules)}: {trained:,} parameters are trained, and "
        f"{weights:,} are frozen in {model.config.weights_dtype.name}"
    )


# The start ----------------------------------------------------------------------------------------------


def init(model: Decoder, seed: int, mesh: Mesh | None = None) -> dict:
    """The adapters before training: A uniform in +-1/sqrt(inputs), as PEFT has it, and B zero, so that A B is too.

    Args:
      model: a decoder with adapters.
      seed: of the run.
      mesh: where to place them, by the rules of sharding.py; None: NumPy arrays.
    """
    # Iterations fold their numbers in; none has this one.
    key = jax.random.fold_in(jax.random.key(seed), 0xFFFFFFFF)
    abstract, _ = split(abstract_params(model))
    axes, _ = split(logical_axes(model))
    where = None if mesh is None else sharding.tree_shardings(axes, abstract, mesh)
    adapters = jax.jit(lambda key: split(init_params(model, key))[0], out_shardings=where)(key)
    return jax.tree.map(np.asarray, adapters) if mesh is None else adapters


# Merged -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A stacked kernel with its adapter, to be merged layer by layer.

    Attributes:
      kernel: [layers, inputs…, outputs…].
      a, b: [layers, inputs…, rank], [layers, rank, outputs…].
      scale: what A B is multiplied by.
    """

    kernel: Any
    a: Any
    b: Any
    scale: float

    @property
    def shape(self):
        return self.kernel.shape

    @property
    def dtype(self):
        return self.kernel.dtype


def merged(kernel, a, b, scale: float):
    """kernel + scale * a b, float32, of one layer; NumPy arrays, or on devices and where the kernel is."""
    if isinstance(kernel, jax.Array):
        where = kernel.sharding if isinstance(kernel.sharding, NamedSharding) else None
        return _merge(where)(kernel, a, b, scale)
    kernel, a, b = (np.asarray(x, np.float32) for x in (kernel, a, b))
    return kernel + np.float32(scale) * np.tensordot(a, b, axes=1)


@functools.cache
def _merge(where):
    def merge(kernel, a, b, scale):
        kernel, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
        return kernel + scale * jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)

    return jax.jit(merge, out_shardings=where)


def adapted(params: Mapping, scale: float) -> dict:
    """The tree of the model under the adapters, in which a kernel that has one is an `Adapted`."""
    if not any(isinstance(value, Mapping) for value in params.values()):
        weights = without_adapters(params)
        a, b = (params.get(name) for name in FACTORS)
        return weights if a is None else weights | {"kernel": Adapted(params["kernel"], a, b, scale)}
    return {k: adapted(v, scale) if isinstance(v, Mapping) else v for k, v in params.items()}
