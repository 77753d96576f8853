"""Save and restore everything a run needs to continue, by Orbax.

The learner's state (parameters, optimizer, multiplier, version) is stored as arrays. Random keys and data
positions are functions of (seed, iteration), so the iteration stands for both. Positions in the metric files
say where to cut what was written after the checkpoint.
"""

import pathlib

import jax
import orbax.checkpoint as ocp


class Checkpointer:
    """Checkpoints of one run directory."""

    def __init__(self, directory, *, max_to_keep: int):
        self._manager = ocp.CheckpointManager(
            pathlib.Path(directory).resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False),
        )

    def latest(self) -> int | None:
        """The last iteration with a complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, iteration: int, state, progress: dict) -> None:
        """Write a checkpoint; it appears whole or not at all.

        Args:
          iteration: iterations done.
          state: a LearnerState of device arrays.
          progress: JSON-compatible positions and counters.
        """
        if iteration in self._manager.all_steps():
            return
        self._manager.save(
            iteration,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)),
            force=True,
        )
        self._manager.wait_until_finished()

    def restore(self, iteration: int, abstract_state, shardings) -> tuple:
        """(state placed by `shardings`, progress) of that iteration."""
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, shardings
        )
        restored = self._manager.restore(
            iteration,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()),
        )
        return restored.state, restored.progress

    def close(self) -> None:
        self._manager.close()
