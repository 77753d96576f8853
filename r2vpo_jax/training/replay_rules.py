"""Which groups of the kept batches are trained on: one pure function, for the buffer on the host and for the ring.

A draw ranks all candidates and takes the first ones. What is weighted is ranked by log(weight) plus Gumbel noise, which
draws without replacement (Gumbel top-k, arXiv 1903.06059); what is not, by random integers, the same on every device.
Shapes do not depend on how full the buffer is.
"""

import jax
import jax.numpy as jnp

from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.rollout import Rollout

_DRAWS = 0x7E91A7  # in the place of an iteration, whose keys sample and shuffle: no run is that long


def draw_key(key: jax.Array, iteration: jax.Array, number: jax.Array) -> jax.Array:
    """The key of a draw.

    Args:
      key: the run's.
      iteration: now.
      number: of the draw in this iteration.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, _DRAWS), iteration), number)


def choose(
    config: ReplayConfig,
    key: jax.Array,
    *,
    exposed: jax.Array,
    is_fresh: jax.Array,
    age: jax.Array,
    uses: jax.Array,
    priority: jax.Array | None,
    num_groups: int,
) -> tuple[jax.Array, jax.Array]:
    """The groups of a training batch, none of them twice.

    Args:
      config: how to draw, and the limits.
      key: of this draw.
      exposed: bool [slots, groups], the groups that there are and that the lag lets through; slots are batches, oldest
        first.
      is_fresh: bool [slots, groups], those of the newest batch that the lag lets through. Age is no reason to leave them
        out.
      age: int32 [slots, groups], in optimizer updates.
      uses: int32 [slots, groups], how often each group was drawn.
      priority: f32 [slots, groups], for `draw=priority`.
      num_groups: how many.

    Returns:
      int32 [num_groups]: slot * groups + group, oldest first, but for two draws. `mixed` gives the older groups, the
        fresh ones, then the older ones that fill up; `priority` gives groups of priority 0 last.
      int32: how many of them are within the limits. When that is less than num_groups, the rest are any numbers.
    """
    within, fresh, age, uses = (x.reshape(-1) for x in (exposed, is_fresh, age, uses))
    if config.draw == "newest":
        within &= fresh
    if config.max_age is not None:
        within &= fresh | (age <= config.max_age)
    if config.max_uses is not None:
        within &= uses < config.max_uses
    candidate = jnp.arange(within.size)
    noise = jax.random.bits(key, within.shape)

    # The turn comes first, then the rank in it: the last of its keys first.
    turn, rank = jnp.zeros_like(candidate), (noise,)
    match config.draw:
        case "newest":
            rank = (candidate,)
        case "mixed":
            stale = within & ~fresh
            place = jnp.argsort(jnp.lexsort((noise, ~stale)))
            wanted = round(config.stale_fraction * num_groups)
            turn = jnp.where(fresh, 1, jnp.where(place < wanted, 0, 2))
            # The least used first: two draws of an iteration share the fresh batch out between them.
            rank = (noise, jnp.where(fresh, uses, 0))
        case "priority":
            weight = priority.reshape(-1)
            # Groups without a gradient come last, when there are too few others.
            turn = jnp.where(weight > 0, 0, 1)
            score = jax.random.gumbel(key, weight.shape) + jnp.log(jnp.where(weight > 0, weight, 1.0))
            rank = (-score,)
    turn = jnp.where(within, turn, 3)
    first = jnp.lexsort((*rank, turn))[:num_groups]
    first = first[jnp.lexsort((first, turn[first]))]
    chosen = jnp.pad(first, (0, num_groups - first.size)).astype(jnp.int32)
    return chosen, jnp.minimum(jnp.sum(within, dtype=jnp.int32), num_groups)


def priorities(rollout: Rollout, num_groups: int) -> jax.Array:
    """f32 [num_groups]: mean |A| over the tokens of each group that take part."""
    mask = rollout.learning_mask
    advantage = rollout.advantage if rollout.advantage.ndim == 2 else rollout.advantage[:, None]
    total = jnp.where(mask, jnp.abs(advantage), 0.0).reshape(num_groups, -1).sum(axis=1)
    return total / jnp.maximum(mask.reshape(num_groups, -1).sum(axis=1), 1)


def statistics(*, age, uses, there, num_batches, evicted) -> dict:
    """Named numbers of what is kept, and of the ages in a drawn batch; docs/metrics.md explains each.

    Arrays are of NumPy or of JAX, and so are the numbers.

    Args:
      age: [B], of the rows of a drawn batch, in optimizer updates.
      uses: [slots, groups], how often each group was drawn; 0 where no group is.
      there: bool [slots, groups], where one is.
      num_batches: rollout batches kept.
      evicted: batches that have left.
    """
    return {
        "replay/age_mean": age.mean(),
        "replay/age_max": age.max(),
        "replay/batches": num_batches,
        "replay/evicted": evicted,
        "replay/uses_mean": uses.sum() / there.sum().clip(1),
        "replay/uses_max": uses.max(),
    }
