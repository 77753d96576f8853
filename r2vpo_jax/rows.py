"""Which rows of a batch a process has on its host: the whole groups of its own devices, and no others.

A batch of N groups of G rows lies on the mesh as `sharding.RULES` says of "batch". The processes whose devices hold the
same rows have a *share*; shares are disjoint and equally large, and together they are the batch. The lowest-numbered
process of those that hold a share leads it: it judges and writes, and tells the others. Where rows cannot be divided so,
there is one share: everybody holds everything.

What all must know of all rows is small: a number a row (`whole`), an `outline`, or a few words (`exchange`). What
has to move from one share to another goes over the devices (`bring`).
"""

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import sharding

_LETTERS = 256  # what is said is filled up to a multiple of so many bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch of N groups, as they are spread over processes; `rows_of` makes one.

    Attributes:
      mesh: on whose devices the batch lies.
      group_size: G.
      shares: of each share the numbers of its groups, ascending.
      holders: of each share the processes that hold it, ascending; the first leads.
      mine: number of the share of this process.
    """

    mesh: jax.sharding.Mesh
    group_size: int
    shares: tuple[np.ndarray, ...]
    holders: tuple[tuple[int, ...], ...]
    mine: int

    @property
    def num_groups(self) -> int:
        """N."""
        return sum(map(len, self.shares))

    @property
    def is_all(self) -> bool:
        """Whether every process holds all rows."""
        return len(self.shares) == 1

    def why_all(self) -> str:
        """For people, where there is one share: why every process holds all rows."""
        return (
            f"{self.num_groups} groups of {self.group_size} rows are not spread over the {len(self.holders[0])} processes: "
            "each holds all of them on its host. Whole groups divide where trainer.prompts_per_rollout is a multiple of "
            "mesh.data * mesh.fsdp, and these axes span the processes"
        )

    @property
    def leads(self) -> bool:
        """Whether this process judges and writes for its share."""
        return self.holders[self.mine][0] == jax.process_index()

    @property
    def groups(self) -> np.ndarray:
        """The groups that this process holds, int [n], ascending."""
        return self.shares[self.mine]

    @functools.cached_property
    def index(self) -> np.ndarray:
        """The rows that this process holds, int [n * G], ascending: their numbers in the batch."""
        return rows_of_groups(self.groups, self.group_size)

    @functools.cached_property
    def _home(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each group the share that it belongs to, and its place there, int [N] each."""
        share, place = np.empty(self.num_groups, np.int32), np.empty(self.num_groups, np.int32)
        for number, groups in enumerate(self.shares):
            share[groups], place[groups] = number, np.arange(len(groups))
        return share, place

    # Hosts and devices -----------------------------------------------------------------------------------

    def put(self, tree):
        """Arrays of this process's rows -> global arrays of all rows, over the data-parallel axes.

        Args:
          tree: NumPy arrays [n * G, ...].
        """

        def place(x):
            x, shape = np.asarray(x), (self.num_groups * self.group_size, *np.shape(x)[1:])

            def part(index):
                first, last, _ = index[0].indices(shape[0])
                at = int(np.searchsorted(self.index, first))
                return x[(slice(at, at + last - first), *index[1:])]

            return jax.make_array_from_callback(shape, sharding.batch_sharding(shape, self.mesh), part)

        return jax.tree.map(place, tree)

    def fetch(self, tree):
        """Global arrays [N * G, ...] -> NumPy arrays of this process's rows [n * G, ...]; others stay as they are."""
        if self.is_all:
            return sharding.to_host(tree)

        def local(x):
            if not isinstance(x, jax.Array):
                return x
            where = sharding.batch_sharding(x.shape, self.mesh)
            if not x.sharding.is_equivalent_to(where, x.ndim):
                x = sharding.relaid(where)(x)
            out = np.empty((len(self.index), *x.shape[1:]), x.dtype)
            for first, data in {s.index[0].indices(x.shape[0])[0]: s.data for s in x.addressable_shards}.items():
                at = int(np.searchsorted(self.index, first))
                out[at : at + len(data)] = data
            return out

        return jax.tree.map(local, tree)

    # What all know of all --------------------------------------------------------------------------------

    def whole(self, tree):
        """Small arrays of this process's rows [n * G, ...] -> those of all rows, on every host."""
        if self.is_all or not jax.tree.leaves(tree):
            return tree
        return jax.tree.map(
            lambda x: np.asarray(x.addressable_data(0)), sharding.relaid(sharding.replicated(self.mesh))(self.put(tree))
        )

    def outline(self, batch):
        """What is known of every row of a batch: the numbers of rows, without their tokens.

        Args:
          batch: a tree (a `Rollout`) of this process's rows.

        Returns:
          The same of all rows, on every host. With several shares, arrays of more than a number a row are 0 there and take
          no memory.
        """
        if self.is_all:
            return batch
        leaves, structure = jax.tree.flatten(batch)
        found = self.whole({i: leaf for i, leaf in enumerate(leaves) if leaf.ndim == 1})
        total = self.num_groups * self.group_size
        rest = {i: _zeros((total, *leaf.shape[1:]), leaf) for i, leaf in enumerate(leaves) if leaf.ndim > 1}
        return jax.tree.unflatten(structure, [(found | rest)[i] for i in range(len(leaves))])

    def exchange(self, value) -> list:
        """What each share has to say, in the order of the shares, on every process: of few words.

        Args:
          value: as JSON has them; of the processes that hold a share, the first one's counts.
        """
        if self.is_all:
            return [value]
        said = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = _heard(self.mesh, np.int32(len(said)))
        # Few lengths, since each is a program of its own.
        padded = np.zeros(-(-max(sizes.values()) // _LETTERS) * _LETTERS, np.uint8)
        padded[: len(said)] = said
        heard = _heard(self.mesh, padded)
        return [json.loads(heard[first][: sizes[first]].tobytes()) for first, *_ in self.holders]

    def of_leader(self, tree):
        """Arrays of the process that leads this share, on all that hold it; every process calls this."""
        return tree if self.is_all else self.told(tree)

    def told(self, tree):
        """The same, also where every process holds all rows: for what they would not find out alike."""
        if all(len(processes) == 1 for processes in self.holders):
            return tree
        return jax.tree.map(lambda x: _heard(self.mesh, x)[self.holders[self.mine][0]], tree)

    # What moves ------------------------------------------------------------------------------------------

    def bring(self, batches, chosen):
        """A batch made of groups of several: each process gets the rows of its own places in it.

        Groups whose places are with another share move over the devices, one share's worth at a time: hosts hold no more
        than that.

        Args:
          batches: trees of this process's rows [n * G, ...] of several batches of N groups.
          chosen: int [N, 2], of each place the number of the batch and of the group in it; any number of places where
            every process holds all rows.
        """
        chosen, (share, place) = np.asarray(chosen), self._home
        from_share, from_place = share[chosen[:, 1]], place[chosen[:, 1]]

        sources = list(zip(chosen[:, 0].tolist(), from_place.tolist(), strict=True))
        if self.is_all:
            return taken(batches, sources, self.group_size)
        if np.array_equal(from_share, share):
            return taken(batches, [sources[group] for group in self.groups], self.group_size)
        turn = np.empty(len(chosen), np.int32)  # of each place, its turn in the share that it comes from
        for number in range(len(self.shares)):
            members = np.flatnonzero(from_share == number)
            turn[members] = np.arange(len(members))
        result = None
        for number in range(1 + int(turn.max()) // len(self.groups)):
            now = turn // len(self.groups) == number
            mine = [sources[i] for i in np.flatnonzero(now & (from_share == self.mine))]
            unused = [(0, 0)] * (len(self.groups) - len(mine))
            part = self.put(taken(batches, mine + unused, self.group_size))
            source = np.full(len(chosen), -1)
            for i in np.flatnonzero(now):
                source[i] = self.shares[from_share[i]][turn[i] % len(self.groups)]
            rows = np.where(source < 0, -1, source * self.group_size)[:, None] + np.arange(self.group_size)
            rows = np.where(source[:, None] < 0, -1, rows).reshape(-1)
            result = self._with_rows(part if result is None else result, part, rows)
            del part  # before the host makes the next
        return self.fetch(result)

    def _with_rows(self, tree, other, rows: np.ndarray):
        """Row rows[r] of another batch in the place of row r, where that is not negative: one array after the other."""
        rows = sharding.put_batch(rows.astype(np.int32), self.mesh)
        return jax.tree.map(lambda x, y: _take(x, y, rows, self.mesh), tree, other)


def taken(batches, places, group_size: int):
    """The rows of groups of several trees [n * G, ...] on the host.

    Args:
      batches: the trees.
      places: of each group, in the order wanted, the number of its tree and its place there.
      group_size: G.
    """
    at = [(number, slice(place * group_size, (place + 1) * group_size)) for number, place in places]
    return jax.tree.map(lambda *x: np.concatenate([x[number][rows] for number, rows in at]), *batches)


@functools.lru_cache(maxsize=64)
def rows_of(mesh: jax.sharding.Mesh, num_groups: int, group_size: int) -> Rows:
    """How the rows of a batch are spread over the processes of a mesh.

    Args:
      mesh: the batch lies on its devices.
      num_groups: N.
      group_size: G.
    """
    total = num_groups * group_size
    held = collections.defaultdict(set)
    for device, (part,) in sharding.batch_sharding((total,), mesh).devices_indices_map((total,)).items():
        held[device.process_index].add(part.indices(total)[:2])
    holders = collections.defaultdict(list)
    for process in sorted(held):
        holders[tuple(sorted(held[process]))].append(process)
    shares = [_whole_groups(np.concatenate([np.arange(*part) for part in parts]), group_size) for parts in holders]
    sizes = {len(groups) for groups in shares if groups is not None}
    if any(groups is None for groups in shares) or len(sizes) != 1 or sizes.pop() * len(shares) != num_groups:
        return all_rows(mesh, num_groups, group_size)
    mine = next((i for i, p in enumerate(holders.values()) if jax.process_index() in p), 0)
    return Rows(mesh, group_size, tuple(shares), tuple(map(tuple, holders.values())), mine)


def rows_on_both(
    mesh: jax.sharding.Mesh, other: jax.sharding.Mesh, num_groups: int, group_size: int
) -> tuple[Rows, Rows]:
    """How the rows of a batch are spread that lies on two meshes of the same processes, one after the other.

    Each process has the same rows on both; where the two would differ, everybody holds everything.

    Args:
      mesh, other: the meshes.
      num_groups, group_size: as of `rows_of`.
    """
    here, there = (rows_of(m, num_groups, group_size) for m in (mesh, other))
    if here.holders == there.holders and all(map(np.array_equal, here.shares, there.shares)):
        return here, there
    return all_rows(mesh, num_groups, group_size), all_rows(other, num_groups, group_size)


def all_rows(mesh: jax.sharding.Mesh, num_groups: int, group_size: int) -> Rows:
    """One share: every process holds everything. Arguments as of `rows_of`."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    return Rows(mesh, group_size, (np.arange(num_groups),), (tuple(processes),), 0)


def _whole_groups(rows: np.ndarray, group_size: int) -> np.ndarray | None:
    """The groups that rows consist of, or None if one is torn."""
    groups = rows[::group_size] // group_size
    return groups if np.array_equal(rows_of_groups(groups, group_size), rows) else None


def rows_of_groups(groups, group_size: int) -> np.ndarray:
    """int [n * G]: the rows of groups int [n], in their order."""
    return (np.asarray(groups)[:, None] * group_size + np.arange(group_size)).reshape(-1)


def joined(outlines):
    """Outlines of several batches, one after the other, as one."""
    if len(outlines) == 1:
        return outlines[0]

    def join(*leaves):
        if leaves[0].ndim > 1 and not any(leaves[0].strides):
            return _zeros((sum(map(len, leaves)), *leaves[0].shape[1:]), leaves[0])
        return np.concatenate(leaves)

    return jax.tree.map(join, *outlines)


def _zeros(shape, like):
    return np.broadcast_to(np.zeros((), like.dtype), shape)


def _heard(mesh, x) -> dict[int, np.ndarray]:
    """What each process says: process -> array. Over the devices of the mesh alone; others may be at work meanwhile."""
    x = np.asarray(x)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    said = jax.make_array_from_callback((mesh.size, *x.shape), where, lambda _: x[None])
    heard = np.asarray(sharding.relaid(sharding.replicated(mesh))(said).addressable_data(0))
    by_process = {}
    for number, device in enumerate(mesh.devices.flat):
        by_process.setdefault(device.process_index, heard[number])
    return by_process


@functools.partial(jax.jit, static_argnames="mesh")
def _take(x, other, rows, mesh):
    """x [R, ...] with row rows[r] of `other` as row r, where that is not negative."""
    # Gathered whole on each device first: the compiler would add up zeros of all rows instead, which is more.
    other = jax.lax.with_sharding_constraint(other, sharding.replicated(mesh))
    taken = jnp.take(other, jnp.maximum(rows, 0), axis=0)
    result = jnp.where((rows >= 0).reshape(-1, *(1,) * (x.ndim - 1)), taken, x)
    return jax.lax.with_sharding_constraint(result, sharding.batch_sharding(result.shape, mesh))
