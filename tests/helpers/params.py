"""Parameters, variations of a decoder, and what its programs hold."""

import dataclasses
import math

import jax
import jax.extend
import numpy as np

from r2vpo_jax import models


def random_params(model, seed=0):
    """NumPy parameters none of which is at a value that hides it (biases at 0, norms at 1); compiles nothing."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = {"embed": 0.6, "scale": 0.2}.get(path[-1].key, 0.3)
        center = 1.0 if path[-1].key == "scale" else 0.0
        return np.asarray(center + spread * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, models.abstract_params(model))


def with_config(model, **changes):
    """The same decoder with other fields of its configuration."""
    return models.Decoder(dataclasses.replace(model.config, **changes))


def jaxpr_sizes(jaxpr):
    """Elements of every array in a jaxpr, those of the programs inside of it too."""
    kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield math.prod(getattr(variable.aval, "shape", ()))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, kinds)):
            if isinstance(value, kinds):
                yield from jaxpr_sizes(getattr(value, "jaxpr", value))
