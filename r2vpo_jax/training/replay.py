"""Rollouts by policy version: what is kept, what is drawn, how old it is.

A FIFO of whole rollout batches on the host. Each batch is written once, as an immutable file whose checksum is kept
in the checkpoint; a checkpoint lists batches and does not rewrite them. Groups (the G samples of a prompt) are the
unit of everything: they are never torn, and each has its own count of uses.

Two kinds of staleness, both reported in optimizer updates (learner version - behavior version): the number of
updates a rollout batch is trained on, and the queue's lag: with lag K an iteration trains on what was generated K
iterations ago (as in M2PO, arXiv 2510.01161).
"""

import dataclasses
import io
import pathlib

import jax
import numpy as np

from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.run import files


class ReplayError(ValueError):
    """A replay file is missing or damaged, or a rollout does not belong into the buffer."""


@dataclasses.dataclass
class _Entry:
    """One rollout batch."""

    iteration: int  # that generated it
    rollout: Rollout  # NumPy arrays
    uses: np.ndarray  # int64 [groups], how often each group was drawn
    sha256: str
    num_bytes: int

    @property
    def version(self) -> int:
        return int(self.rollout.version[0])


class ReplayBuffer:
    """The batches of one run that may still be trained on."""

    def __init__(self, directory, config: ReplayConfig, group_size: int, *, write=True):
        """An empty buffer.

        Args:
          directory: where batches are written; made when the first one is.
          config: capacity, lag and how to draw.
          group_size: G.
          write: False on processes that only read and draw.
        """
        self._directory = pathlib.Path(directory)
        self._config, self._group, self._write = config, group_size, write
        self._entries: list[_Entry] = []
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    # In ------------------------------------------------------------------------------------------------

    def add(self, iteration: int, rollout: Rollout, *, version: int) -> None:
        """Take the batch that an iteration generated; the oldest ones leave when there are too many.

        Args:
          iteration: later than that of any batch in the buffer.
          rollout: of NumPy arrays, with advantages; all of one version.
          version: the learner's now.

        Raises:
          ReplayError: torn groups, mixed or future versions, ids that are not unique, or a second batch of the
            same iteration.
          OSError: the file cannot be written (disk full).
        """
        self._check(iteration, rollout, version)
        data = _encode(rollout)
        checksum = files.sha256_of(data)
        if self._write:
            files.write_atomically(self.path(iteration), data)
        uses = np.zeros(len(rollout.group_id) // self._group, np.int64)
        self._entries.append(_Entry(iteration, rollout, uses, checksum, len(data)))
        self._evict(iteration)

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
            most = self._config.lag + max(self._config.capacity, 1)
            return len(self._entries) > most or (limit is not None and size > limit)

        # What the queue has not let through yet is never evicted.
        while too_much() and self._entries[0].iteration < iteration - self._config.lag:
            self._entries.pop(0)
            self.evicted += 1

    # Out -----------------------------------------------------------------------------------------------

    def draw(self, iteration: int, num_groups: int, *, version: int, seed: int, number: int = 0) -> Rollout | None:
        """A training batch of `num_groups` groups, or None while the queue fills.

        The newest batch that the queue lets through is the fresh one; what is older is stale. A draw is a function
        of (seed, iteration, number, contents), and takes no group twice.

        Args:
          iteration: now, counted as in `add`.
          num_groups: at most the groups of the fresh batch, unless older ones may fill up.
          version: the learner's now, for the limit on age.
          seed: the run's.
          number: of the draw in this iteration.

        Raises:
          ReplayError: fewer than num_groups groups are within the limits on age and use.
        """
        exposed = [e for e in self._entries if e.iteration <= iteration - self._config.lag]
        if not exposed:
            return None
        generator = np.random.default_rng([seed, iteration, number, 0x7E91A7])
        fresh = self._candidates(exposed[-1:], version, is_fresh=True)
        stale = self._candidates(exposed[:-1], version, is_fresh=False)
        chosen = self._choose(generator, fresh, stale, num_groups)
        if len(chosen) < num_groups:
            raise ReplayError(
                f"only {len(chosen)} of {num_groups} groups are within replay.max_age={self._config.max_age} and "
                f"replay.max_uses={self._config.max_uses}; raise them, or replay.capacity"
            )
        for entry, group in chosen:
            entry.uses[group] += 1
        rows = [
            jax.tree.map(lambda x, g=group: x[g * self._group : (g + 1) * self._group], entry.rollout)
            for entry, group in chosen
        ]
        return jax.tree.map(lambda *x: np.concatenate(x), *rows)

    def _candidates(self, entries, version, *, is_fresh) -> list[tuple[_Entry, int]]:
        """(batch, group) pairs within the limits, oldest first. The lag itself is no reason to leave one out."""
        config = self._config
        return [
            (entry, group)
            for entry in entries
            if is_fresh or config.max_age is None or version - entry.version <= config.max_age
            for group in range(len(entry.uses))
            if config.max_uses is None or entry.uses[group] < config.max_uses
        ]

    def _choose(self, generator, fresh, stale, num_groups) -> list[tuple[_Entry, int]]:
        def some(candidates, number):
            number = min(number, len(candidates))
            picked = generator.choice(len(candidates), size=number, replace=False) if number else []
            return [candidates[i] for i in sorted(picked)]

        def by_priority(candidates):
            weights = np.array([_priority(entry, group, self._group) for entry, group in candidates])
            useful = np.flatnonzero(weights > 0)
            number = min(num_groups, len(useful))
            p = weights[useful] / weights[useful].sum() if number else None
            first = generator.choice(useful, size=number, replace=False, p=p) if number else []
            # Groups without a gradient come last, when there are too few others.
            rest = some([c for i, c in enumerate(candidates) if not weights[i] > 0], num_groups - number)
            return [candidates[i] for i in sorted(first)] + rest

        match self._config.draw:
            case "newest":
                return fresh[:num_groups]
            case "uniform":
                return some(stale + fresh, num_groups)
            case "mixed":
                wanted = round(self._config.stale_fraction * num_groups)
                old = some(stale, wanted)
                # The least used first: two draws of an iteration share the fresh batch out between them.
                unused = generator.permutation(len(fresh))
                unused = sorted(unused, key=lambda i: fresh[i][0].uses[fresh[i][1]])[: num_groups - len(old)]
                chosen = old + [fresh[i] for i in sorted(unused)]
                taken = {(entry.iteration, group) for entry, group in chosen}
                left = [c for c in stale if (c[0].iteration, c[1]) not in taken]
                return chosen + some(left, num_groups - len(chosen))
            case "priority":
                return by_priority(stale + fresh)
        raise ValueError(f"unknown replay.draw {self._config.draw!r}")

    def statistics(self, batch: Rollout | None, version: int) -> dict[str, float]:
        """Named numbers of the buffer, and of the ages in a drawn batch. docs/metrics.md explains each."""
        uses = np.concatenate([e.uses for e in self._entries]) if self._entries else np.zeros(1)
        age = np.zeros(1) if batch is None else version - batch.version
        return {
            "replay/age_mean": float(age.mean()),
            "replay/age_max": int(age.max()),
            "replay/batches": len(self._entries),
            "replay/bytes": sum(e.num_bytes for e in self._entries),
            "replay/evicted": self.evicted,
            "replay/uses_mean": float(uses.mean()),
            "replay/uses_max": int(uses.max()),
        }

    # Files ---------------------------------------------------------------------------------------------

    def path(self, iteration: int) -> pathlib.Path:
        """The file of the batch that an iteration generated."""
        return self._directory / f"rollout_{iteration:08d}.npz"

    def listing(self) -> dict:
        """What a checkpoint says of the buffer, as JSON."""
        return {
            "evicted": self.evicted,
            "batches": [{"iteration": e.iteration, "sha256": e.sha256, "uses": e.uses.tolist()} for e in self._entries],
        }

    def restore(self, listing: dict) -> None:
        """Read back the batches of a listing.

        Raises:
          ReplayError: a file is missing, or its checksum is not the listed one.
        """
        entries = []
        for item in listing["batches"]:
            path = self.path(item["iteration"])
            try:
                data = path.read_bytes()
            except OSError as error:
                raise ReplayError(f"cannot read replay file {path}: {error.strerror}") from error
            if files.sha256_of(data) != item["sha256"]:
                raise ReplayError(f"replay file {path} is damaged: its checksum is not the one in the checkpoint")
            uses = np.asarray(item["uses"], np.int64)
            entries.append(_Entry(item["iteration"], _decode(data), uses, item["sha256"], len(data)))
        self._entries, self.evicted = entries, listing["evicted"]

    def collect_garbage(self, listings: list[dict]) -> None:
        """Delete files of batches that neither the buffer nor any of these listings (of kept checkpoints) needs."""
        if not self._write or not self._directory.exists():
            return
        needed = {e.iteration for e in self._entries}
        needed |= {item["iteration"] for listing in listings for item in listing["batches"]}
        keep = {self.path(i).name for i in needed}
        for file in self._directory.glob("rollout_*.npz"):
            if file.name not in keep:
                file.unlink(missing_ok=True)


def _priority(entry: _Entry, group: int, group_size: int) -> float:
    """Mean |A| over the tokens of a group that take part."""
    rows = slice(group * group_size, (group + 1) * group_size)
    rollout = jax.tree.map(lambda x: x[rows], entry.rollout)
    mask = rollout.learning_mask
    advantage = rollout.advantage if rollout.advantage.ndim == 2 else rollout.advantage[:, None]
    return float(np.abs(np.where(mask, advantage, 0.0)).sum() / max(mask.sum(), 1))


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
