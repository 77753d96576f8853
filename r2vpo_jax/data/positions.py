"""From an integer position to a row: shuffled epochs, with random access.

A training position is `(stretch << 20) + offset`: each seed of a run has a stretch of its own. Within a stretch,
epoch e is the offsets [e * n, (e + 1) * n), in an order that (stretch, epoch) decides.

Orders come from the raw output of PCG64 seeded by a SeedSequence, which NumPy keeps stable for ever (NEP 19), and a
stable sort; `Generator.permutation` may change from one NumPy version to the next.
"""

import functools

import numpy as np

STRETCH_BITS = 20


def split_position(position: int) -> tuple[int, int]:
    """(stretch, offset) of a training position."""
    return position >> STRETCH_BITS, position & ((1 << STRETCH_BITS) - 1)


@functools.lru_cache(maxsize=64)
def permutation(size: int, *key: int) -> np.ndarray:
    """An order of [0, size) that the non-negative integers of `key` decide."""
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    order = np.argsort(raw, kind="stable")
    order.setflags(write=False)
    return order


def row_of_position(position: int, size: int) -> int:
    """The row, in [0, size), at a training position."""
    stretch, offset = split_position(position)
    epoch, index = divmod(offset, size)
    return int(permutation(size, stretch, epoch)[index])
