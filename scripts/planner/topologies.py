"""Chips and slices of Cloud TPU, as Google publishes them.

Per chip: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e. Interconnect is published as the sum over both directions of all
links of a chip; one direction is half of it. A mesh axis that lies on few of the links has less.

Names: a v5e or v6e slice is called by its chips (v5litepod-16 and v6e-16 have 16), a v5p slice by its TensorCores, two a chip
(v5p-16 has 8 chips, v5p-64 has 32). For JAX a chip is one device.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do."""

    flops: float  # bfloat16 operations a second
    memory: float  # GiB that the compiler lets a program use ("available HBM" in its messages)
    bandwidth: float  # bytes a second, of HBM
    links: float  # bytes a second that all links of a chip receive


CHIPS = {
    "v5e": Chip(197e12, 15.75, 819e9, 200e9),
    "v5p": Chip(459e12, 95.74, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25, 1638e9, 400e9),
}

_GRIDS = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # by chips
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"}  # by TensorCores
SLICES = {
    **{f"{chip}-{size}": f"{chip}:{grid}" for chip in ("v5e", "v6e") for size, grid in _GRIDS.items()},
    **{f"v5litepod-{size}": f"v5e:{grid}" for size, grid in _GRIDS.items()},
    **{f"v5p-{size}": f"v5p:{grid}" for size, grid in _CUBES.items()},
}


def grid_of(name: str) -> str:
    """The topology "CHIP:AxB" behind the name of a slice, or behind one itself.

    Raises:
      ValueError: the chip is unknown, or no slice has this name.
    """
    name = SLICES.get(name, name)
    chip, colon, _ = name.partition(":")
    if colon and chip in CHIPS:
        return name
    known = chip.partition("-")[0]
    if known in CHIPS:
        sizes = [slice_ for slice_ in SLICES if slice_.startswith(known)]
        raise ValueError(f"no such slice; one of {', '.join(sizes)}, or a grid such as {SLICES[sizes[1]]}")
    raise ValueError(f"the chip is not one of {', '.join(CHIPS)} (examples: v5e:4x4, v5p-16)")


def chip_of(name: str) -> Chip:
    """The chip of a slice or topology; raises as `grid_of`."""
    return CHIPS[grid_of(name).partition(":")[0]]


def chips_in(name: str) -> int:
    """How many chips a slice or topology has; raises as `grid_of`, and ValueError for a grid that is none."""
    sides = grid_of(name).partition(":")[2].split("x")
    if not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError("a grid is CHIP:AxB or CHIP:AxBxC, such as v5e:4x4")
    return math.prod(map(int, sides))
