"""What this device can do at most, measured: products of matrices, and bytes copied."""

import time

import jax
import jax.numpy as jnp

ROUNDS, CALLS = 8, 4


def measure(compute_dtype: str, *, tiny: bool = False) -> dict[str, float]:
    """Rates of one device, the best of several rounds.

    Args:
      compute_dtype: of the matrix product; float32 is exact (`highest`), as in the decoder.
      tiny: small arrays, for tests.

    Returns:
      {"flops_per_second": of a square product, "bytes_per_second": read plus written by an elementwise operation}.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 128 if tiny else 1024 if on_cpu else 8192
    words = 2**16 if tiny else 2**25 if on_cpu else 2**29
    x = jnp.ones((size, size), compute_dtype)
    precision = "highest" if compute_dtype == "float32" else None
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision) / size)
    y = jnp.ones(words, jnp.float32)
    copy = jax.jit(lambda y: y + 1)
    return {
        "flops_per_second": 2 * size**3 / _seconds(product, x),
        "bytes_per_second": 2 * y.nbytes / _seconds(copy, y),
    }


def _seconds(function, x) -> float:
    """Of one call among several in a row: the wait for the host counts little."""
    jax.block_until_ready(function(x))
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        out = x
        for _ in range(CALLS):
            out = function(out)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / CALLS)
    return best
