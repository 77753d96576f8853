"""Rollouts by policy version: what is kept, what is drawn, how old it is.

A FIFO of whole rollout batches on the host: of several processes each keeps its own rows, and knows of all groups their
uses, versions and priorities, so that all draw alike. Each batch is written once, as an immutable file (of several
shares, one each) whose checksum is kept in the checkpoint; a checkpoint lists batches and does not rewrite them. Groups (the G samples of a prompt) are the
unit of everything: they are never torn, and each has its own count of uses. `replay_rules.choose` says which are drawn;
`ring` is the same replay inside of a compiled program.

Two kinds of staleness, both reported in optimizer updates (learner version - behavior version): the number of
updates a rollout batch is trained on, and the queue's lag: with lag K an iteration trains on what was generated K
iterations ago (as in M2PO, arXiv 2510.01161).
"""

import dataclasses
import io

import jax
import numpy as np

from r2vpo_jax import storage
from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.rows import Rows, taken
from r2vpo_jax.run import files
from r2vpo_jax.training import replay_rules

# Shapes are those of a full buffer from the beginning, so that both are compiled once a run.
_choose = jax.jit(replay_rules.choose, static_argnames=("config", "num_groups"))
_priorities = jax.jit(replay_rules.priorities, static_argnames="num_groups")
_draw_key = jax.jit(replay_rules.draw_key)


class ReplayError(ValueError):
    """A replay file is missing or damaged, or a rollout does not belong into the buffer."""


@dataclasses.dataclass
class _Entry:
    """One rollout batch."""

    iteration: int  # that generated it
    rollout: Rollout  # NumPy arrays, this process's rows
    uses: np.ndarray  # int64 [groups], how often each group was drawn
    files: list[dict]  # of each its sha256 and, of several, the groups in it as [[first, end], ...]
    num_bytes: int  # of the whole batch in one file
    priority: np.ndarray | None  # f32 [groups], when groups are drawn by it

    @property
    def version(self) -> int:
        return int(self.rollout.version[0])


class ReplayBuffer:
    """The batches of one run that may still be trained on."""

    def __init__(self, directory, config: ReplayConfig, group_size: int, *, write=True, rows: Rows | None = None):
        """An empty buffer.

        Args:
          directory: where batches are written; made when the first one is.
          config: capacity, lag and how to draw.
          group_size: G.
          write: False on processes that only read and draw. Where rows are spread, it is about deleting alone: who leads
            a share writes it.
          rows: how a batch is spread over processes; default: every process has all of it.
        """
        self._directory = storage.path(directory)
        self._config, self._group, self._write = config, group_size, write
        self._rows = None if rows is None or rows.is_all else rows
        self._entries: list[_Entry] = []
        self._awaited = 0  # batches that have a place already
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    # In ------------------------------------------------------------------------------------------------

    def make_room(self, iteration: int) -> None:
        """Let what is too old leave, as `add` would, for a batch that is still being sampled: the lag holds it back.

        Draws until then are those of the buffer with the batch.

        Args:
          iteration: that generates it; with a lag, and without a limit on bytes.
        """
        self._awaited = 1
        self._evict(iteration)

    def add(self, iteration: int, rollout: Rollout, *, version: int) -> None:
        """Take the batch that an iteration generated; the oldest ones leave when there are too many.

        Args:
          iteration: later than that of any batch in the buffer.
          rollout: of NumPy arrays, with advantages; all of one version. This process's rows.
          version: the learner's now.

        Raises:
          ReplayError: torn groups, mixed or future versions, ids that are not unique, or a second batch of the
            same iteration.
          OSError: the file cannot be written (disk full).
        """
        self._check(iteration, rollout, version)
        data = _encode(rollout)
        written = {"sha256": files.sha256_of(data)}
        if self._rows is None:
            if self._write:
                files.write_atomically(self.path(iteration), data)
            listed, size, num_groups = [written], len(data), len(rollout.group_id) // self._group
        else:
            shares = self._rows.shares
            if self._rows.leads:
                files.write_atomically(self.path(iteration, self._rows.mine, len(shares)), data)
            said = self._rows.exchange([written, len(data)])
            listed = [item | {"groups": _ranges(groups)} for (item, _), groups in zip(said, shares, strict=True)]
            # As one file would have it: what is not rows is in each of them.
            rest = len(_encode(jax.tree.map(lambda x: x[:0], rollout)))
            size, num_groups = sum(size - rest for _, size in said) + rest, self._rows.num_groups
        self._entries.append(self._entry(iteration, rollout, np.zeros(num_groups, np.int64), listed, size))
        self._awaited = 0
        self._evict(iteration)

    def _entry(self, iteration, rollout, uses, listed, num_bytes) -> _Entry:
        priority = None
        if self._config.draw == "priority":
            priority = np.asarray(_priorities(rollout, num_groups=len(rollout.group_id) // self._group))
            if self._rows is not None:
                priority = self._rows.whole(np.repeat(priority, self._group))[:: self._group]
        return _Entry(iteration, rollout, uses, listed, num_bytes, priority)

    def _check(self, iteration, rollout, version):
        rows = len(rollout.group_id)
        if rows == 0 or rows % self._group or np.ptp(rollout.group_id.reshape(-1, self._group), axis=1).any():
            raise ReplayError(f"a rollout of {rows} rows is not made of whole groups of {self._group}")
        if len(np.unique(rollout.rollout_id)) != rows:
            raise ReplayError("the rollout ids of a batch are not unique")
        if len(np.unique(rollout.version)) != 1:
            raise ReplayError("a rollout batch has more than one behavior version")
        if int(rollout.version[0]) > version:
            raise ReplayError(f"a rollout of version {int(rollout.version[0])} is from the future: now is {version}")
        if self._entries:
            newest = self._entries[-1]
            if iteration <= newest.iteration or rollout.rollout_id.min() <= newest.rollout.rollout_id.max():
                raise ReplayError(f"iteration {iteration} or its rollouts are not newer than what is in the buffer")

    def _evict(self, iteration: int) -> None:
        def too_much():
            size = sum(e.num_bytes for e in self._entries)
            limit = self._config.capacity_bytes
            return len(self._entries) + self._awaited > self._config.slots or (limit is not None and size > limit)

        # What the queue has not let through yet is never evicted.
        while too_much() and self._entries[0].iteration < iteration - self._config.lag:
            self._entries.pop(0)
            self.evicted += 1

    # Out -----------------------------------------------------------------------------------------------

    def draw(self, iteration: int, num_groups: int, *, version: int, key: jax.Array, number: int = 0) -> Rollout | None:
        """A training batch of `num_groups` groups, or None while the queue fills.

        The newest batch that the queue lets through is the fresh one; what is older is stale. A draw is a function
        of (key, iteration, number, contents), and takes no group twice.

        Args:
          iteration: now, counted as in `add`.
          num_groups: at most the groups of the fresh batch, unless older ones may fill up. Those of a batch, where rows are
            spread over processes: this process gets the rows of its places.
          version: the learner's now, for the limit on age.
          key: the run's.
          number: of the draw in this iteration.

        Raises:
          ReplayError: fewer than num_groups groups are within the limits on age and use.
        """
        newest = iteration - self._config.lag
        fresh = max((e.iteration for e in self._entries if e.iteration <= newest), default=None)
        if fresh is None:
            return None
        by_priority = self._config.draw == "priority"
        chosen, found = _choose(
            self._config,
            _draw_key(key, iteration, number),
            exposed=self._by_slot(lambda e: e.iteration <= newest, bool),
            is_fresh=self._by_slot(lambda e: e.iteration == fresh, bool),
            age=self._by_slot(lambda e: version - e.version, np.int32),
            uses=self._by_slot(lambda e: e.uses, np.int32),
            priority=self._by_slot(lambda e: e.priority, np.float32) if by_priority else None,
            num_groups=num_groups,
        )
        if found < num_groups:
            raise ReplayError(
                f"only {found} of {num_groups} groups are within replay.max_age={self._config.max_age} and "
                f"replay.max_uses={self._config.max_uses}; raise them, or replay.capacity"
            )
        places = np.stack(np.divmod(chosen, self._groups_a_batch), axis=1) - [
            self._config.slots - self._awaited - len(self),
            0,
        ]
        for number, group in places:
            self._entries[number].uses[group] += 1
        batches = [entry.rollout for entry in self._entries]
        return taken(batches, places, self._group) if self._rows is None else self._rows.bring(batches, places)

    @property
    def _groups_a_batch(self) -> int:
        """Of the largest batch."""
        return max((len(e.uses) for e in self._entries), default=1)

    def _by_slot(self, value, dtype) -> np.ndarray:
        """[slots, groups] of a value of each batch, or of each group of it: oldest first, 0 before the first batch."""
        array = np.zeros((self._config.slots, self._groups_a_batch), dtype)
        for slot, entry in enumerate(self._entries, start=len(array) - self._awaited - len(self)):
            array[slot, : len(entry.uses)] = value(entry)
        return array

    def statistics(self, batch: Rollout | None, version: int) -> dict[str, float]:
        """Named numbers of the buffer, and of the ages in a drawn batch. docs/metrics.md explains each."""
        shared = replay_rules.statistics(
            age=np.zeros(1, np.int32) if batch is None else version - batch.version,
            uses=self._by_slot(lambda e: e.uses, np.int32),
            there=self._by_slot(lambda _: True, bool),
            num_batches=len(self._entries),
            evicted=self.evicted,
        )
        size = sum(e.num_bytes for e in self._entries)
        return {name: np.asarray(value).item() for name, value in shared.items()} | {"replay/bytes": size}

    # Files ---------------------------------------------------------------------------------------------

    def path(self, iteration: int, share: int = 0, shares: int = 1):
        """The file of the batch that an iteration generated, or of one share of several."""
        part = f".p{share}-of-{shares}" if shares > 1 else ""
        return self._directory / f"rollout_{iteration:08d}{part}.npz"

    def listing(self) -> dict:
        """What a checkpoint says of the buffer, as JSON."""

        def item(entry: _Entry) -> dict:
            alone = len(entry.files) == 1
            said = entry.files[0] if alone else {"files": entry.files, "bytes": entry.num_bytes}
            return {"iteration": entry.iteration, **said, "uses": entry.uses.tolist()}

        return {"evicted": self.evicted, "batches": [item(entry) for entry in self._entries]}

    def restore(self, listing: dict) -> None:
        """Read back the batches of a listing: this process's rows, whichever processes wrote them.

        Raises:
          ReplayError: a file is missing, or its checksum is not the listed one, on this process or on another.
        """
        entries, problem = [], None
        try:
            read = [self._read(item) for item in listing["batches"]]
        except ReplayError as error:
            problem = str(error)
        problems = [problem] if self._rows is None else self._rows.exchange(problem)
        if found := next(filter(None, (problem, *problems)), None):
            raise ReplayError(found)
        for item, (rollout, size) in zip(listing["batches"], read, strict=True):
            listed = item.get("files", [{"sha256": item.get("sha256")}])
            entries.append(self._entry(item["iteration"], rollout, np.asarray(item["uses"], np.int64), listed, size))
        self._entries, self.evicted = entries, listing["evicted"]

    def _read(self, item: dict) -> tuple[Rollout, int]:
        """This process's rows of a listed batch, and the bytes of all."""
        everything = np.arange(len(item["uses"]))
        wanted = everything if self._rows is None else self._rows.groups
        if "files" not in item:
            data = _read(self.path(item["iteration"]), item["sha256"])
            return taken([_decode(data)], [(0, group) for group in wanted], self._group), len(data)
        parts, places = [], {}
        for share, file in enumerate(item["files"]):
            groups = np.concatenate([np.arange(*ends) for ends in file["groups"]])
            here = {group: (len(parts), place) for place, group in enumerate(groups.tolist())}
            if not here.keys().isdisjoint(wanted.tolist()):
                parts.append(_decode(_read(self.path(item["iteration"], share, len(item["files"])), file["sha256"])))
                places |= here
        return taken(parts, [places[group] for group in wanted.tolist()], self._group), item["bytes"]

    def collect_garbage(self, listings: list[dict]) -> None:
        """Delete files of batches that neither the buffer nor any of these listings (of kept checkpoints) needs."""
        if not self._write or not self._directory.exists():
            return
        needed = [batch for listing in (self.listing(), *listings) for batch in listing["batches"]]
        keep = set()
        for batch in needed:
            number = len(batch.get("files", [batch]))
            keep |= {self.path(batch["iteration"], share, number).name for share in range(number)}
        for file in self._directory.glob("rollout_*.npz"):
            if file.name not in keep:
                file.unlink(missing_ok=True)


def _read(path, sha256: str) -> bytes:
    """A replay file; ReplayError if it is missing or damaged."""
    try:
        with storage.spoken(path):
            data = path.read_bytes()
    except OSError as error:
        if storage.out_of_reach(path, error):
            raise
        raise ReplayError(f"cannot read replay file {path}: {error.strerror or 'it is missing'}") from error
    if files.sha256_of(data) != sha256:
        raise ReplayError(f"replay file {path} is damaged: its checksum is not the one in the checkpoint")
    return data


def _ranges(numbers: np.ndarray) -> list[list[int]]:
    """Ascending numbers as [[first, end], ...]."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [[int(run[0]), int(run[-1]) + 1] for run in runs]


def _encode(rollout: Rollout) -> bytes:
    """The bytes of an .npz of all fields; the same for the same rollout."""
    arrays = {k: np.asarray(v) for k, v in vars(rollout).items() if v is not None}
    if any(x.dtype.hasobject for x in arrays.values()):  # NumPy would pickle it
        raise ReplayError("a rollout consists of numbers")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _decode(data: bytes) -> Rollout:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return Rollout(**{name: arrays[name] for name in arrays.files})
