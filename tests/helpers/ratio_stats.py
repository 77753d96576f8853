"""Arrays for the statistics of the ratios, of one shape."""

import jax
import numpy as np

from r2vpo_jax import ratio_stats

# One shape for most tests, so that they share a compiled function.
ROWS, COLUMNS = 4, 6
compute = jax.jit(ratio_stats.compute)
# NaN where no token is in Z.
QUOTIENTS = {
    f"keeps/{name}" + ("" if split == "all" else f"_{split}")
    for name in ("retained", "restoring")
    for split in ratio_stats.SPLITS
}


def batch(seed=0, spread=0.4, rows=ROWS):
    rng = np.random.default_rng(seed)
    behavior_logp = -rng.exponential(2.0, (rows, COLUMNS)).astype(np.float32)
    return {
        "logp": behavior_logp + rng.normal(0, spread, (rows, COLUMNS)).astype(np.float32),
        "behavior_logp": behavior_logp,
        "advantages": rng.choice([-1.5, -0.5, 0.0, 1.0], (rows, COLUMNS)).astype(np.float32),
        "mask": np.arange(COLUMNS) < rng.integers(2, COLUMNS, (rows, 1)),
    }


def by_hand(log_ratio, advantages):
    """Ragged rows of log-ratios and advantages (one number a row, or one a token) as arrays of that shape."""
    arrays = {k: np.zeros((ROWS, COLUMNS), np.float32) for k in ("logp", "behavior_logp", "advantages")}
    arrays["mask"] = np.zeros((ROWS, COLUMNS), bool)
    for i, row in enumerate(log_ratio):
        arrays["logp"][i, : len(row)] = row
        arrays["advantages"][i, : len(row)] = advantages[i]
        arrays["mask"][i, : len(row)] = True
    return arrays


def extras(seed=0):
    """A coefficient, weights and ages to go with a batch."""
    rng = np.random.default_rng(100 + seed)
    return {
        "coefficient": rng.normal(0, 1, (ROWS, COLUMNS)).astype(np.float32),
        "weights": rng.uniform(0.5, 2.0, (ROWS, COLUMNS)).astype(np.float32),
        "age": rng.choice([0, 1, 7, 8, 63, 64, 500], ROWS).astype(np.int32),
    }
