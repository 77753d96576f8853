"""What samples the responses that a run learns from: this program, or whatever can stand in its place."""

from typing import Any, NamedTuple, Protocol

from r2vpo_jax.rollout import Rollout
from r2vpo_jax.rows import Rows
from r2vpo_jax.sampler.distribution import Sampling
from r2vpo_jax.sampler.generation import generate


class Sampler(Protocol):
    """Prompts to Rollout."""

    def sample(
        self, weights: Any, tokens, lengths, key, sampling: Sampling, *, problem_ids, version: int, rows: Rows
    ) -> Rollout:
        """G responses to each of N prompts, on the host: the rows of this process, in the order of the prompts.

        Args:
          weights: what the run's weights for rollouts are to this sampler.
          tokens, lengths: int32 [N, P] and [N] NumPy, prompts left-padded.
          key: a typed PRNG key, another one for each batch.
          sampling: temperature, G, T and where responses end.
          problem_ids: int32 [N], which the `group_id` is.
          version: optimizer updates so far. A sampler that has older weights stamps their version.
          rows: how the N groups are spread over processes.

        Returns:
          A Rollout of NumPy arrays. `behavior_logp` is of the distribution that was sampled from, at its temperature; `rollout_id`
          is the number of a row among all. Reward and advantage are NaN.
        """

    def statistics(self) -> dict[str, float]:
        """Numbers for a row of metrics.jsonl, of what was sampled since they were last asked for."""


class OwnSampler:
    """This program's: `generate` on the devices of a mesh; weights are parameters in the compute dtype.

    Args:
      model: the run's.
      mesh: that samples.
      batch_size: prompts at one time.
      buckets, segment_length: as for `generate`.
    """

    def __init__(self, model, mesh, *, batch_size: int, buckets, segment_length: int):
        self._model = model
        self._how = {"mesh": mesh, "batch_size": batch_size, "buckets": buckets, "segment_length": segment_length}

    def sample(self, weights, tokens, lengths, key, sampling: Sampling, *, problem_ids, version, rows) -> Rollout:
        of_batch = {"problem_ids": problem_ids, "version": version, "rows": rows}
        return generate(self._model, weights, tokens, lengths, key, sampling, **of_batch, **self._how)

    def statistics(self) -> dict[str, float]:
        return {}


class Published(NamedTuple):
    """The weights of a server: those that it was last given."""

    version: int  # optimizer updates done when they were
    name: str  # of these and no others: what the server was told that they are called
