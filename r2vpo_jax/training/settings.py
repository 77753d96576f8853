"""What the functions of an update have to know besides arrays."""

import dataclasses

from r2vpo_jax.config.objective import ObjectiveConfig


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """What the functions of `update` have to know besides arrays. Hashable: it can be a static argument."""

    objective: ObjectiveConfig
    group_size: int
    num_minibatches: int
    num_epochs: int = 1
    # Responses, or packs of them, whose activations exist at one time; None: as many as a minibatch has responses.
    micro_batch_size: int | None = None
    scoring_chunk_size: int = 128  # response columns whose logits exist at one time
    packing: bool = False  # whether rows are cut to their tokens, several to a pack (training/packing.py)
    stale: bool = (
        False  # whether batches may be of older weights (replay, an engine): the dual signal `auto` then is `excess`
    )

    @property
    def num_updates(self) -> int:
        """Updates per rollout batch."""
        return self.num_minibatches * self.num_epochs

    @property
    def excess(self) -> bool:
        """Whether lambda sees what the updates added to V rather than V itself (objective.dual.signal).

        Stale data starts at V > 0 whatever this batch's updates do: that must not wind the multiplier up (ours).
        """
        return {"auto": self.stale, "excess": True, "absolute": False}[self.objective.dual.signal]

    def num_micro_batches(self, rows: int) -> int:
        """Micro-batches of a batch of so many responses, packed or not at most.

        Raises:
          ValueError: rows is not a multiple of the micro-batch size.
        """
        size = self.micro_batch_size or rows
        if rows % size:
            raise ValueError(f"a batch of {rows} responses is not a multiple of micro_batch_size={size}")
        return rows // size
