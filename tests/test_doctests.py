"""The examples in the docstrings of the mathematics, and of grids, say what the functions return."""

import doctest
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import advantages, corrections, dual, kl
from r2vpo_jax.config import grid
from r2vpo_jax.losses import clipped, penalized, sequence, soft


@pytest.mark.parametrize(
    "module",
    [clipped, penalized, sequence, soft, advantages, corrections, dual, kl, grid],
    ids=lambda module: module.__name__.removeprefix("r2vpo_jax."),
)
def test_examples(module):
    public = {
        name
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    found = {x.name.rpartition(".")[2] for x in doctest.DocTestFinder().find(module) if x.examples}
    assert public <= found, "every public function has an example"
    results = doctest.testmod(module, extraglobs={"jnp": jnp, "np": np})
    assert results.failed == 0, "doctest has printed what differs"
