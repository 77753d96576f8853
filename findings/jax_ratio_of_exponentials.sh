#!/usr/bin/env bash
# JAX 0.10.2: a ratio of two exponentials is right under jit and NaN outside of it.
#
# Expected by most: jit changes the speed and the last bits, not whether a result is a number.
# Seen: exp(a) / exp(b) of two sequences with log-probabilities of -200 is 0 / 0 = NaN when it is run op by op, and
# 1.2214 as soon as both exponentials stand in one jitted function, for XLA rewrites it to exp(a - b). Exponentials
# that come from another jitted function (a stored probability) give NaN again. So a test under jit proves nothing
# about the formula.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu venv/bin/python -I - <<'PYTHON'
import jax
import jax.numpy as jnp


def sequence_ratio(new, old):
    return jnp.exp(new.sum(-1)) / jnp.exp(old.sum(-1))


new = jnp.full((1, 200), -1.0)  # log-probabilities of 200 tokens
old = new - 0.001
by_op = sequence_ratio(new, old)
jitted = jax.jit(sequence_ratio)(new, old)
gradient = jax.jit(jax.grad(lambda x: sequence_ratio(x, old).sum()))(new)
probability = jax.jit(lambda x: jnp.exp(x.sum(-1)))
two_programs = jax.jit(lambda p, q: p / q)(probability(new), probability(old))
with jax.disable_jit():
    disabled = jax.jit(sequence_ratio)(new, old)
print(f"seen: op by op {by_op}, jitted {jitted}, gradient under jit {gradient[0, 0]:.4f}")
print(f"seen: the exponentials in a program of their own {two_programs}, with jit disabled {disabled}")
exact = jnp.exp(0.2)
assert jnp.isnan(by_op).all() and jnp.isnan(two_programs).all() and jnp.isnan(disabled).all()
assert jnp.allclose(jitted, exact, rtol=1e-3) and jnp.allclose(gradient, exact, rtol=1e-3)
PYTHON
