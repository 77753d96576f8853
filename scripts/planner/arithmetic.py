"""Bytes and floating-point operations of a device, from shapes and the rules of the mesh alone.

The compiler counts the body of a loop once, and nothing of a Pallas kernel (for such programs its sum may be negative), so
operations are counted here. Bounds on time are of the published speeds: a program that waits for nothing else needs that
long. What XLA writes and reads between its kernels, and the latency of collectives, are not in them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from planner.topologies import Chip
from r2vpo_jax import models, sharding
from r2vpo_jax.models import lora
from r2vpo_jax.models.decoder import abstract_params, logical_axes
from r2vpo_jax.sampler.segments import column_sizes

_SPLASH_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of an iteration."""

    prompts: int
    prompts_at_a_time: int  # of one call of the sampler
    group_size: int
    prompt_length: int
    response_length: int
    num_minibatches: int
    micro_batch_size: int
    segment_length: int

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def minibatch(self) -> int:
        return self.rows // self.num_minibatches

    @property
    def columns(self) -> list[int]:
        """Lengths of the sampler's caches, ascending."""
        return column_sizes(self.segment_length or self.response_length, self.response_length)


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that the parts of a chip need at least."""

    products: float
    memory: float
    links: float

    @property
    def overlapped(self) -> float:
        """All at the same time: of an update, whose collectives can run beside products."""
        return max(self.products, self.memory, self.links)

    @property
    def serial(self) -> float:
        """Collectives one after the other with the rest: of a decode step, in which each waits for the last."""
        return max(self.products, self.memory) + self.links


class Arithmetic:
    """Counts for one model, mesh and workload; a device's share.

    Args:
      config: of the decoder.
      mesh: anything with `shape`; no devices are needed.
      workload: sizes.
      attention: how rows are attended to, of `attention.way`.
    """

    def __init__(self, config: models.DecoderConfig, mesh, workload: Workload, attention: str):
        self.config, self.mesh, self.workload, self.attention = config, mesh, workload, attention
        self.model = models.Decoder(config)
        self.devices = math.prod(mesh.shape.values())

    def share(self, axes, shape) -> float:
        """Elements of a device's part of an array with these logical axes."""
        spec = sharding.partition_spec(axes, shape, self.mesh)
        split = [name for names in spec if names for name in ([names] if isinstance(names, str) else names)]
        return math.prod(shape) / math.prod(self.mesh.shape[name] for name in split)

    # Bytes ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _parameters(self) -> list[tuple[tuple, tuple, bool]]:
        """(logical axes, shape, whether of a layer) of each parameter."""
        axes = jax.tree_util.tree_leaves_with_path(logical_axes(self.model), is_leaf=lambda x: isinstance(x, tuple))
        shapes = jax.tree.leaves(abstract_params(self.model))
        return [(a, x.shape, path[0].key == "layers") for (path, a), x in zip(axes, shapes, strict=True)]

    def parameters(self) -> float:
        """A device's part of the parameters, how many."""
        return sum(self.share(axes, shape) for axes, shape, _ in self._parameters)

    def trained(self) -> float:
        """Those of them that are trained: adapters, where there are any."""
        if self.config.lora is None:
            return self.parameters()
        axes, shapes = (lora.split(tree)[0] for tree in (logical_axes(self.model), abstract_params(self.model)))
        axes = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        return sum(self.share(a, x.shape) for a, x in zip(axes, jax.tree.leaves(shapes), strict=True))

    def gathered(self) -> float:
        """Those that a decode step reads: layers whole but for the tensor axis, and the unembedding."""
        layers = sum(
            self.share(tuple(None if name == "embed" else name for name in axes), shape)
            for axes, shape, of_layer in self._parameters
            if of_layer
        )
        return layers + self.share((None, "logits"), (self.config.hidden_size, self.config.vocab_size))

    def cache_bytes(self, columns: int) -> float:
        """Keys and values of prompts at one time, and of their responses in a cache for as many tokens."""
        c, w = self.config, self.workload
        heads = self.share(("batch", "kv_heads"), (w.prompts_at_a_time, c.num_kv_heads))
        return self._bytes_a_column() * heads * (w.prompt_length + w.group_size * columns)

    def _bytes_a_column(self) -> int:
        c = self.config
        return 2 * c.num_layers * c.head_dim * jnp.dtype(c.compute_dtype).itemsize

    def least_memory(self) -> dict[str, float]:
        """Bytes that must be there at one time, whatever the compiler does, by program."""
        c, part, trained = self.config, self.parameters(), self.trained()
        weights = trained * c.param_dtype.itemsize + (part - trained) * c.weights_dtype.itemsize
        moments, copy = 8 * trained, c.compute_dtype.itemsize
        copied = trained if c.weights_dtype == c.compute_dtype else part  # frozen weights are shared
        sampler = weights + moments + copy * copied + self.cache_bytes(self.workload.columns[-1])
        if self.mesh.shape["fsdp"] > 1:  # beside the copy that is split
            sampler += copy * self.gathered()
        return {"sampler": sampler, "update": weights + moments + 4 * trained}

    # Operations ----------------------------------------------------------------------------------------------

    def _per_token(self) -> float:
        """Of a token in one layer, attention itself not counted."""
        c = self.config
        return 2 * c.hidden_size * (2 * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.intermediate_size)

    def _forward(self, tokens: float, columns: float, unembedded: float) -> float:
        c = self.config
        attention = 4 * c.num_heads * c.head_dim * columns
        return c.num_layers * tokens * (self._per_token() + attention) + unembedded * 2 * c.hidden_size * c.vocab_size

    def attended(self, size: int) -> float:
        """Columns that a token of a row of `size` is multiplied with, on average: blocks in the future are left out."""
        if self.attention == "splash":
            return (size + size / math.ceil(size / _SPLASH_BLOCK)) / 2
        return size * 5 / 8 if self.attention == "blockwise" and size > 4 * 512 else size

    def flops(self) -> dict[str, float]:
        """Of the matrix products of each program, recomputation included."""
        w = self.workload
        prompt, size = w.prompt_length, w.prompt_length + w.response_length
        row = self._forward(size, self.attended(size), w.response_length)
        group = w.group_size * self._forward(w.response_length, size, w.response_length)
        sampled = w.prompts_at_a_time * (self._forward(prompt, self.attended(prompt), 1) + group)
        passes = self._passes()
        counts = {"sampler": sampled, "scoring": w.rows * row, "update": passes * row * w.minibatch}
        return {name: count / self.devices for name, count in counts.items()}

    def _passes(self) -> int:
        """Forward passes that an update costs. Backward costs two, or one where weights are frozen."""
        return 3 + self.config.remat - (self.config.lora is not None)

    # Time ----------------------------------------------------------------------------------------------------

    def decode_step(self, chip: Chip, received: float) -> Bound:
        """One token of all rows at one time, with the longest cache; `received` bytes from other chips."""
        c, w = self.config, self.workload
        columns, itemsize = w.columns[-1], jnp.dtype(c.compute_dtype).itemsize
        rows = self.share(("batch",), (w.prompts_at_a_time,)) * w.group_size
        logits = self.share(("batch", "vocab"), (w.prompts_at_a_time, c.vocab_size)) * w.group_size
        size = itemsize * self.gathered() + self.cache_bytes(columns) + 8 * logits  # written, and read
        heads = self.share(("heads",), (c.num_heads,)) / c.num_heads
        products = (
            c.num_layers
            * rows
            * heads
            * (self._per_token() + 4 * c.num_heads * c.head_dim * (w.prompt_length + columns))
        )
        products += 2 * c.hidden_size * w.prompts_at_a_time * w.group_size * self.share(("logits",), (c.vocab_size,))
        return Bound(products / chip.flops, size / chip.bandwidth, received / chip.links)

    def update(self, chip: Chip, received: float) -> Bound:
        """One optimizer update."""
        passes, trained = self._passes(), self.trained()
        micro = self.workload.minibatch // self.workload.micro_batch_size
        part, fsdp = self.parameters(), self.mesh.shape["fsdp"]
        itemsize = jnp.dtype(self.config.compute_dtype).itemsize
        # Each pass reads the weights; a micro-batch adds to the gradients; the optimizer reads four and writes three.
        size = micro * (passes * itemsize * part * fsdp + 8 * trained) + 28 * trained
        return Bound(self.flops()["update"] / chip.flops, size / chip.bandwidth, received / chip.links)

    def scoring(self, chip: Chip, received: float) -> Bound:
        """All rows of an iteration."""
        micro = self.workload.rows // self.workload.micro_batch_size
        size = micro * jnp.dtype(self.config.compute_dtype).itemsize * self.parameters() * self.mesh.shape["fsdp"]
        return Bound(self.flops()["scoring"] / chip.flops, size / chip.bandwidth, received / chip.links)

    def iteration(self, chip: Chip, step: float, score: float, update: float) -> float:
        """Seconds of rollouts in which every response is as long as it may be, scoring, and updates of one epoch."""
        w = self.workload
        return (
            math.ceil(w.prompts / w.prompts_at_a_time) * w.response_length * step + score + w.num_minibatches * update
        )

    def estimated_traffic(self) -> dict[str, float]:
        """Bytes that a device receives in a decode step and in an update, before anything is compiled."""
        c, w = self.config, self.workload
        data, fsdp, tensor = (self.mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
        itemsize, size = jnp.dtype(c.compute_dtype).itemsize, w.prompt_length + w.response_length
        micro, part, trained = w.minibatch // w.micro_batch_size, self.parameters(), self.trained()

        def of(devices):
            return (devices - 1) / devices

        rows = self.share(("batch",), (w.prompts_at_a_time,)) * w.group_size
        sums = 2 * 2 * of(tensor) * c.num_layers * c.hidden_size * itemsize  # of a token, after attention and the MLP
        # Weights twice, and gradients.
        per_update = fsdp * of(fsdp) * (2 * itemsize * part + 4 * trained) + 2 * of(data) * 4 * trained
        per_update += 3 * sums * w.micro_batch_size / (data * fsdp) * size
        return {"step": rows * sums, "update": micro * per_update}
