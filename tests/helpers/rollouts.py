"""Rollouts made by hand, and replay buffers of them."""

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.training.replay import ReplayBuffer

GROUPS, GROUP, PROMPT, RESPONSE = 4, 2, 3, 5
ROWS = GROUPS * GROUP
KEY = jax.random.key(0)


def make(iteration, *, version=None, magnitude=None, **fields):
    """The batch of an iteration: 4 groups of 2; rollout ids go on from one to the next, version is the iteration's.

    Args:
      magnitude: |A| of each group; the two rows of a group have +|A| and -|A|.
    """
    generator = np.random.default_rng(iteration)
    magnitude = np.ones(GROUPS) if magnitude is None else np.asarray(magnitude)
    row = np.arange(ROWS, dtype=np.int32)
    values = {
        "tokens": generator.integers(0, 17, (ROWS, PROMPT + RESPONSE)).astype(np.int32),
        "prompt_length": np.full(ROWS, PROMPT, np.int32),
        "response_length": generator.integers(1, RESPONSE + 1, ROWS).astype(np.int32),
        "truncated": generator.random(ROWS) < 0.5,
        "behavior_logp": generator.standard_normal((ROWS, RESPONSE)).astype(np.float32),
        "temperature": np.ones(ROWS, np.float32),
        "reward": generator.random(ROWS).astype(np.float32),
        "outcome": np.zeros(ROWS, np.int32),
        "advantage": (np.repeat(magnitude, GROUP) * (-1) ** row).astype(np.float32),
        "keep": np.ones(ROWS, bool),
        "group_id": np.repeat(np.arange(GROUPS, dtype=np.int32) + 100 * iteration, GROUP),
        "rollout_id": row + ROWS * iteration,
        "version": np.full(ROWS, iteration if version is None else version, np.int32),
    }
    return Rollout(**values | fields)


def empty(rows, prompt, size, **fields):
    """Zeros of these sizes, and all rows kept."""
    integer, number = jnp.zeros(rows, jnp.int32), jnp.zeros(rows)
    values = {
        "tokens": jnp.zeros((rows, prompt + size), jnp.int32),
        "prompt_length": integer,
        "response_length": integer,
        "truncated": jnp.zeros(rows, bool),
        "behavior_logp": jnp.zeros((rows, size)),
        "temperature": number,
        "reward": number,
        "outcome": integer,
        "advantage": number,
        "keep": jnp.ones(rows, bool),
        "group_id": integer,
        "rollout_id": integer,
        "version": integer,
    }
    return Rollout(**values | fields)


def buffer(directory, *batches, **config):
    """A buffer to which these batches were added, each in the iteration that its ids tell."""
    result = ReplayBuffer(directory, ReplayConfig(**config), GROUP)
    for batch in batches:
        iteration = int(batch.rollout_id[0]) // ROWS
        result.add(iteration, batch, version=int(batch.version[0]))
    return result


def iterations(replay):
    return [batch["iteration"] for batch in replay.listing()["batches"]]


def groups_of(batch):
    """The drawn groups, counted through all iterations: group g of iteration i is 4 i + g. They must be whole."""
    ids = batch.rollout_id.reshape(-1, GROUP)
    np.testing.assert_array_equal(ids, ids[:, :1] + np.arange(GROUP))
    assert not (ids[:, 0] % GROUP).any()
    return (ids[:, 0] // GROUP).tolist()


def assert_equal(actual, expected):
    """Every field, and its type."""
    for name, value in vars(expected).items():
        found = getattr(actual, name)
        assert (found is None) == (value is None), name
        if value is not None:
            assert found.dtype == value.dtype, name
            np.testing.assert_array_equal(found, value, err_msg=name)
