"""What the learner measures, in a form that merges exactly."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainStats:
    """Statistics that survive micro-batches and minibatches: sums add, maxima are maxed, histograms add."""

    sums: dict[str, tuple[Array, Array]]  # name -> (sum, count)
    maxima: dict[str, Array]
    histogram: Array  # f32 [len(ratio_stats.EDGES) + 1] counts of log r
    concentration: dict[str, Array]  # name -> f32 [2, len(ratio_stats.CONCENTRATION_EDGES) + 1]: tokens, their sum

    def reduce(self) -> "TrainStats":
        """Merge statistics that are stacked along axis 0."""
        return TrainStats(
            sums=jax.tree.map(lambda x: jnp.sum(x, axis=0), self.sums),
            maxima=jax.tree.map(lambda x: jnp.max(x, axis=0), self.maxima),
            histogram=jnp.sum(self.histogram, axis=0),
            concentration=jax.tree.map(lambda x: jnp.sum(x, axis=0), self.concentration),
        )

    def mean(self, name: str) -> Array:
        """The mean of one summed statistic; 0 where nothing was counted."""
        total, number = self.sums[name]
        return total / (number + (number == 0))  # operators alone: on the host it stays NumPy

    def replace(self, **changes) -> "TrainStats":
        """A copy with other values for the fields named."""
        return dataclasses.replace(self, **changes)
