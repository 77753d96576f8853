"""Replay that lives inside of a compiled program: a ring of the last rollout batches, on the device.

It keeps, draws and counts what `replay.ReplayBuffer` does, and chooses groups by the same function with the same keys,
but writes no files, and checks nothing. All functions are pure; under `jax.vmap` over runs the iteration is best left
unmapped, so that every run reads and writes the same slot.
"""

import jax
import jax.numpy as jnp
from flax import struct

from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.training import replay_rules


@struct.dataclass
class Ring:
    """The batches of one run that may still be trained on; that of iteration i is in slot i % slots."""

    rollouts: Rollout  # every field [slots, ...]
    uses: jax.Array  # int32 [slots, groups], how often each group was drawn
    iteration: jax.Array  # int32 [slots] that generated the batch, -1: none yet
    priority: jax.Array | None  # f32 [slots, groups], when groups are drawn by it


def refusal(config: ReplayConfig) -> str | None:
    """Why a ring cannot do what is asked for, or None."""
    if config.capacity_bytes is not None:
        return "replay.capacity_bytes limits replay on the host only; set replay.capacity"
    return None


def init(rollout: Rollout, config: ReplayConfig, group_size: int) -> Ring:
    """An empty ring.

    Args:
      rollout: what every batch is like: of arrays, or of shapes (`jax.eval_shape`).
      config: lag and capacity.
      group_size: G.

    Raises:
      ValueError: what `refusal` says, or a batch that is not made of whole groups.
    """
    if reason := refusal(config):
        raise ValueError(reason)
    slots, rows = config.slots, rollout.group_id.shape[0]
    if rows == 0 or rows % group_size:
        raise ValueError(f"a rollout of {rows} rows is not made of whole groups of {group_size}")
    groups = rows // group_size
    return Ring(
        rollouts=jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), rollout),
        uses=jnp.zeros((slots, groups), jnp.int32),
        iteration=jnp.full(slots, -1, jnp.int32),
        priority=jnp.zeros((slots, groups), jnp.float32) if config.draw == "priority" else None,
    )


def add(ring: Ring, iteration: jax.Array, rollout: Rollout) -> Ring:
    """The ring with the batch that an iteration generated, in the place of the oldest.

    Args:
      ring: of the iterations before.
      iteration: counted from 0, none left out.
      rollout: with advantages; all of one version.
    """
    slots, groups = ring.uses.shape
    batch = Ring(
        rollouts=rollout,
        uses=jnp.zeros(groups, jnp.int32),
        iteration=jnp.asarray(iteration, jnp.int32),
        priority=None if ring.priority is None else replay_rules.priorities(rollout, groups),
    )
    slot = iteration % slots
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, slot, axis=0), ring, batch)


def draw(
    ring: Ring,
    config: ReplayConfig,
    iteration: jax.Array,
    num_groups: int,
    *,
    version: jax.Array,
    key: jax.Array,
    number: jax.Array = 0,
) -> tuple[Ring, Rollout, jax.Array]:
    """A training batch, as `ReplayBuffer.draw` gives it.

    Args:
      ring: with the batch of this iteration.
      config: that of `init`.
      iteration: now.
      num_groups: how many are drawn; static.
      version: the learner's now, for the limit on age.
      key: the run's.
      number: of the draw in this iteration.

    Returns:
      The ring with uses counted.
      The batch of num_groups groups.
      bool: whether so many groups are within the limits on age and use; False while the queue fills, too. Where it is
        False no use is counted, and the batch is of any groups.
    """
    slots, groups = ring.uses.shape
    newest = iteration - config.lag
    if config.draw == "newest" and config.max_uses is None and num_groups <= groups:
        # One slice of one slot, where the general way gathers from all of them.
        slot = newest % slots
        rows = num_groups * (ring.rollouts.group_id.shape[1] // groups)
        generated, batch = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), (ring.iteration, ring.rollouts)
        )
        batch = jax.tree.map(lambda x: x[:rows], batch)
        chosen = slot * groups + jnp.arange(num_groups)
        enough = (generated == newest) & (newest >= 0)
    else:
        key = replay_rules.draw_key(key, iteration, number)
        chosen, enough = _choose(ring, config, newest, num_groups, version, key)
        batch = jax.tree.map(lambda x: _groups_of(x, chosen, groups), ring.rollouts)
    uses = ring.uses.reshape(-1).at[chosen].add(enough.astype(jnp.int32)).reshape(slots, groups)
    return ring.replace(uses=uses), batch, enough


def _choose(ring, config, newest, num_groups, version, key):
    """(int32 [num_groups] slot * groups + group, whether there are as many within the limits)."""
    slots, groups = ring.uses.shape
    generated = newest + config.lag - slots + 1 + jnp.arange(slots)  # by each batch, oldest first
    slot = generated % slots
    exposed = (ring.iteration[slot] == generated) & (generated >= 0) & (generated <= newest)
    chosen, found = replay_rules.choose(
        config,
        key,
        exposed=_for_each_group(exposed, groups),
        is_fresh=_for_each_group(generated == newest, groups),
        age=_for_each_group(version - ring.rollouts.version[slot, 0], groups),
        uses=ring.uses[slot],
        priority=None if ring.priority is None else ring.priority[slot],
        num_groups=num_groups,
    )
    return slot[chosen // groups] * groups + chosen % groups, found == num_groups


def _for_each_group(x, groups):
    return jnp.broadcast_to(x[:, None], (len(x), groups))


def _groups_of(x, chosen, groups):
    """[slots, B, ...] to the rows of the chosen groups."""
    by_group = x.reshape(-1, x.shape[1] // groups, *x.shape[2:])
    return by_group[chosen].reshape(-1, *x.shape[2:])


def statistics(ring: Ring, batch: Rollout | None, version: jax.Array) -> dict[str, jax.Array]:
    """What `ReplayBuffer.statistics` says, as scalars, but for the bytes.

    Args:
      ring: after the draws of an iteration.
      batch: the last that was drawn, or None.
      version: the learner's then.
    """
    there = ring.iteration >= 0
    return replay_rules.statistics(
        age=jnp.zeros(1, jnp.int32) if batch is None else version - batch.version,
        uses=ring.uses,
        there=_for_each_group(there, ring.uses.shape[1]),
        num_batches=jnp.sum(there, dtype=jnp.int32),
        evicted=jnp.maximum(jnp.max(ring.iteration) + 1 - len(there), 0),
    )
