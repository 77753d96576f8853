#!/usr/bin/env bash
# JAX 0.10.2: draws from bfloat16 logits prefer low token ids.
#
# Expected by most: logits that are all equal are drawn from uniformly, in whatever dtype they are.
# Seen: of 4,096 equal logits in bfloat16 the first 512 get 98 % of the draws. The noise is made in the dtype of the
# logits, where it has 128 values by default; with a vocabulary there are always ties for the largest, and the lowest
# index wins. mode="high", whose documentation speaks of float32 only, nearly mends it. `bernoulli` with a bfloat16
# probability of 0.001 says yes 7.7 times too often.
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
import numpy as np

VOCABULARY, DRAWS = 4_096, 20_000
share = {}
for dtype in ("float32", "bfloat16"):
    logits = jnp.zeros(VOCABULARY, dtype)
    tokens = np.asarray(jax.random.categorical(jax.random.key(0), logits, shape=(DRAWS,)))
    share[dtype] = (tokens < VOCABULARY // 8).mean()
    print(f"seen: {dtype}: {share[dtype]:.1%} of the draws on the first eighth, {len(np.unique(tokens))} ids occur")
high = jax.random.categorical(jax.random.key(0), jnp.zeros(VOCABULARY, "bfloat16"), shape=(DRAWS,), mode="high")
high = (np.asarray(high) < VOCABULARY // 8).mean()
print(f"seen: bfloat16 with mode='high': {high:.1%} of the draws on the first eighth")
assert abs(high - 0.125) < 0.02
noise = np.asarray(jax.random.uniform(jax.random.key(1), (100_000,), jnp.bfloat16)).astype(np.float32)
print(f"seen: bfloat16 uniform has {len(np.unique(noise))} values")
assert abs(share["float32"] - 0.125) < 0.02 and share["bfloat16"] > 0.9 and len(np.unique(noise)) == 128
rate = {}
for dtype in ("float32", "bfloat16"):
    rate[dtype] = float(jax.random.bernoulli(jax.random.key(2), jnp.asarray(0.001, dtype), (1_000_000,)).mean())
    print(f"seen: bernoulli(0.001) in {dtype}: {rate[dtype]:.5f}")
assert abs(rate["float32"] - 0.001) < 2e-4 and rate["bfloat16"] > 0.006
PYTHON
