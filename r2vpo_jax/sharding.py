"""One mesh, and a table of rules from logical axis names to its axes.

Parameters and activations say what their axes *are* ("batch", "heads", "vocab"); only this module knows
where those live. An axis that its mesh axes do not divide evenly takes fewer of them, at last none: it is
replicated, and `placement_table` shows it.
"""

import contextlib
import contextvars
import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Activation axes that are not named here are replicated. Within one array a mesh
# axis serves one axis only: the one that comes first here.
RULES = {
    # The vocabulary of logits. It takes "fsdp" from their rows: gathering a chunk's hidden states (6 MB at 1.5B
    # parameters on 16 devices) is cheaper than gathering the unembedding (470 MB) for each chunk.
    "logits": ("fsdp", "tensor"),
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

_active_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("r2vpo_mesh", default=None)


def make_mesh(shape=(1, 1, 1), devices=None) -> Mesh:
    """The run's mesh with axes ("data", "fsdp", "tensor").

    Args:
      shape: devices along each axis; one entry may be -1 and takes what is left.
      devices: default all devices of all processes.

    Raises:
      ValueError: the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = list(shape)
    if len(shape) != len(MESH_AXES):
        raise ValueError(f"a mesh shape needs {len(MESH_AXES)} numbers {MESH_AXES}, got {tuple(shape)}")
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise ValueError(f"mesh shape {tuple(shape)}: entries are positive, at most one is -1")
    if -1 in shape:
        known = -math.prod(shape)
        if len(devices) % known:
            raise ValueError(f"mesh shape {tuple(shape)} does not divide {len(devices)} devices")
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh shape {tuple(shape)} needs {math.prod(shape)} devices, but there are {len(devices)}; "
            "set --config.mesh.data/fsdp/tensor (one may be -1: all that is left)"
        )
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(logical_axes, shape, mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: replicated)."""
    order = list(RULES)
    named = [i for i, name in enumerate(logical_axes) if name in RULES]
    spec, taken = [None] * len(shape), set()
    for i in sorted(named, key=lambda i: order.index(logical_axes[i])):
        axes = tuple(a for a in RULES[logical_axes[i]] if a not in taken)
        while shape[i] % math.prod(mesh.shape[a] for a in axes):
            axes = axes[1:]  # does not divide: over fewer mesh axes, at last over none
        if math.prod(mesh.shape[a] for a in axes) > 1:
            spec[i] = axes
            taken.update(axes)
    return PartitionSpec(*spec)


def named_sharding(logical_axes, shape, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(logical_axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(shape, mesh: Mesh) -> NamedSharding:
    """Rows over the data-parallel axes, everything else replicated."""
    return named_sharding(("batch",) + (None,) * (len(shape) - 1), shape, mesh) if shape else replicated(mesh)


def tree_shardings(logical_axes, tree, mesh: Mesh):
    """Shardings of a parameter tree, from its logical axes (tuples as leaves)."""
    return jax.tree.map(
        lambda axes, leaf: named_sharding(axes, leaf.shape, mesh),
        logical_axes,
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@contextlib.contextmanager
def activate(mesh: Mesh | None):
    """While tracing inside, `constrain` refers to this mesh."""
    token = _active_mesh.set(mesh)
    try:
        yield
    finally:
        _active_mesh.reset(token)


def constrain(x, *logical_axes):
    """Pin an activation to the layout of its logical axes; nothing outside `activate` or on one device."""
    mesh = _active_mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(logical_axes, x.shape, mesh))


def device():
    """A device that the program at hand is traced for: of the active mesh, else JAX's first."""
    mesh = _active_mesh.get()
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def is_split(logical_axes, shape, axis: int) -> bool:
    """Whether the active mesh splits this axis of an array."""
    mesh = _active_mesh.get()
    return mesh is not None and partition_spec(logical_axes, shape, mesh)[axis] is not None


def on_shards(function, arguments, logical_axes):
    """`function(*arguments)`, each device on the part that it holds: for kernels that the partitioner cannot split.

    Args:
      function: of arrays, to one array with the axes of the first.
      arguments: arrays, batch and heads of which `function` treats one by one.
      logical_axes: of each, a tuple of names.
    """
    mesh = _active_mesh.get()
    if mesh is None or mesh.size == 1:
        return function(*arguments)
    specs = tuple(partition_spec(axes, x.shape, mesh) for axes, x in zip(logical_axes, arguments, strict=True))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)


def put_batch(tree, mesh: Mesh):
    """Host arrays -> global arrays with rows over the data-parallel axes.

    Every process holds the same host values (rollouts are made and verified deterministically).
    """

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, batch_sharding(x.shape, mesh), lambda index: x[index])

    return jax.tree.map(put, tree)


@functools.cache
def relaid(where):
    """A program that lays arrays out as `where` says, one sharding for all or a tree of them."""
    return jax.jit(lambda tree: tree, out_shardings=where)


def to_host(tree):
    """Global arrays -> NumPy, on every process (np.asarray on an array of other hosts would raise)."""

    def fetch(x):
        if not isinstance(x, jax.Array):
            return x
        if x.is_fully_addressable:
            return np.asarray(x)
        if not x.is_fully_replicated:
            x = relaid(replicated(x.sharding.mesh))(x)
        return np.asarray(x.addressable_data(0))

    return jax.tree.map(fetch, tree)


def placement_table(logical_axes, tree, mesh: Mesh) -> str:
    """One line a parameter: shape, logical axes, where they live, and which axes did not divide."""
    rows = []
    paths = jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, axes), leaf in zip(paths, jax.tree.leaves(tree), strict=True):
        spec = partition_spec(axes, leaf.shape, mesh)
        undivided = [
            name
            for name, size, placed in zip(axes, leaf.shape, spec, strict=True)
            if placed is None and size % math.prod(mesh.shape[a] for a in RULES.get(name, ()))
        ]
        note = f"  (replicated, does not divide: {', '.join(undivided)})" if undivided else ""
        name = "/".join(str(getattr(k, "key", k)) for k in path)
        where = ", ".join("-" if s is None else s if isinstance(s, str) else "+".join(s) for s in spec)
        rows.append(f"  {name:42s} {tuple(leaf.shape)!s:24s} [{where}]{note}")
    return "\n".join(rows)
