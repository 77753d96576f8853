"""One iteration: its order, its data positions and its random keys, for every way to compute it.

`trainer` goes through it step by step, with files, verifiers of any kind and a mesh; `fused` traces it into one program
for many runs. Both call `iterate`, and take positions and keys from here, so that they come to the same numbers.
"""

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from r2vpo_jax.data.positions import STRETCH_BITS
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.training.update import LearnerState, RolloutReport


class Steps(Protocol):
    """What an iteration consists of. The state is the implementation's own; the steps are called in this order."""

    def collect(self) -> Any:
        """Sample responses to the next problems, with the current parameters, and verify them."""

    def prepare(self, collected: Any) -> Rollout:
        """Turn rewards into advantages."""

    def draw(self, batch: Rollout) -> list[Rollout]:
        """The batches to train on now: this one, or what the replay buffer gives. None while its queue fills."""

    def learn(self, rollout: Rollout, number: int) -> RolloutReport:
        """N minibatch updates on the drawn batch of that number, then one step of the multipliers."""


class Made(NamedTuple):
    """What one iteration has made."""

    collected: Any
    batch: Rollout  # with advantages
    drawn: list[Rollout]  # what was trained on
    reports: list[RolloutReport]  # on each


def iterate(steps: Steps) -> Made:
    """One iteration."""
    collected = steps.collect()
    batch = steps.prepare(collected)
    drawn = steps.draw(batch)
    return Made(collected, batch, drawn, [steps.learn(rollout, number) for number, rollout in enumerate(drawn)])


def problem_positions(seed, taken, number: int):
    """Positions in the train split of the next problems, int [number]. Can be traced.

    Args:
      seed: of the run; seeds walk disjoint stretches of the split.
      taken: problems that the run has taken so far.
      number: of problems.
    """
    return ((seed % 1024) << STRETCH_BITS) + (taken + np.arange(number)) % (1 << STRETCH_BITS)


def rollout_key(key, iteration):
    """The key of an iteration's responses.

    Args:
      key: of the run.
      iteration: from 0.
    """
    return jax.random.fold_in(key, iteration)


def learning_key(key, iteration, number):
    """The key of the shuffles of one drawn batch.

    Args:
      key: of the run.
      iteration: from 0.
      number: of the batch among those drawn in this iteration.
    """
    return jax.random.fold_in(rollout_key(key, iteration), 1 + number)


def with_estimates(rollout: Rollout, state: LearnerState, reference, functions) -> Rollout:
    """The rollout with what advantages and losses need of it: log-probabilities under the reference, values.

    Args:
      rollout: verified.
      state: the learner's.
      reference: parameters of the frozen reference, or None.
      functions: `update.UpdateFunctions`, or a `Learner`.
    """
    if reference is not None:
        rollout = rollout.replace(reference_logp=functions.score(reference, rollout))
    if functions.settings.objective.critic:
        rollout = rollout.replace(value=functions.values(state.params, state.critic, rollout))
    return rollout
