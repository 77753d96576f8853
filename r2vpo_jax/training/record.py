"""What is written of each iteration: its line of metrics.jsonl, its samples, and why responses have no verdict."""

import re

import jax

from r2vpo_jax import sharding
from r2vpo_jax.config import Config
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.training import metrics, samples
from r2vpo_jax.training.collector import Collected
from r2vpo_jax.training.iteration import Made
from r2vpo_jax.training.lifecycle import Counters, Lifecycle
from r2vpo_jax.training.token_gradients import TokenGradients
from r2vpo_jax.training.update import LearnerState

_of_sampled = jax.jit(metrics.of_sampled, static_argnums=(0, 2))


class Record:
    """Writes to the files of a run. Every process calls it; process 0 writes.

    Args:
      config: of the run.
      life: its files, and its replay buffer.
      learner: for the learning rate.
      task: decodes tokens.
      rows: how batches are spread over processes.
      collector, weights: the sampler's; each row has their statistics.
      timers: of the run.
      say: where lines for people go.
    """

    def __init__(self, config: Config, life: Lifecycle, learner, task, rows, collector, weights, timers: Timers, say):
        self._config, self._life, self._learner, self._task = config, life, learner, task
        self._rows, self._collector, self._weights, self._timers, self._say = rows, collector, weights, timers, say
        self._said_reason: str | None = None  # why most responses have no verdict

    def write(
        self,
        made: Made,
        drawn,
        trained_tokens: int,
        *,
        state: LearnerState,
        counters: Counters,
        tokens: TokenGradients | None,
    ) -> dict:
        """Write what an iteration has made; returns its row of metrics.jsonl.

        Args:
          made: by the iteration.
          drawn: outlines of the batches that it learned from.
          trained_tokens: in them, each epoch counted.
          state, counters: after it.
          tokens: of some rows of the first batch, where they were asked for (`training/token_gradients.py`).
        """
        config, collected, sampled = self._config, made.collected, made.collected.outline
        version = int(sharding.to_host(state.version))
        counts = {"iteration": counters.iteration, "version": version}
        counts |= {"rollouts": counters.rollouts, "rollout_tokens": counters.rollout_tokens}
        if config.replay.enabled:
            before = version - len(drawn) * config.trainer.updates_per_rollout
            counts |= self._life.replay.statistics(drawn[-1] if drawn else None, before)
            counts["replay/ratio"] = counters.trained_tokens / max(counters.rollout_tokens, 1)
        row = metrics.row(
            config.objective,
            _of_sampled(config.objective, sampled, config.sampler.group_size),
            float(metrics.kept(drawn)) if drawn else 0.0,
            sharding.to_host(metrics.merged(made.reports)) if made.reports else None,
            counters=counts,
            variance_coef=float(sharding.to_host(state.dual.variance_coef)),
            kl_coef=float(sharding.to_host(state.kl_coef)),
            learning_rate=float(self._learner.schedule(max(version - 1, 0))),
        )
        lines = self._samples(made, version - len(made.drawn[1:]) * config.trainer.updates_per_rollout, tokens)
        row |= metrics.of_time(
            float(sampled.response_length.sum()),
            trained_tokens if drawn else None,
            self._timers.lap(),
            self._life.seconds(counters),
        )
        row |= self._collector.statistics() | self._weights.statistics()
        row |= {f"reward/{name}": value for name, value in collected.terms.items()}
        self._life.files.record(row, [{"iteration": counters.iteration, **sample} for sample in lines])
        if collected.num_reasons:
            details = {"responses": collected.num_reasons, "first": collected.first_reason}
            self._life.files.event("unjudged", counters.iteration, **details)
        self._say_unjudged(row["outcome/judged"], collected, counters.iteration)
        return row

    def _samples(self, made: Made, version: int, tokens: TokenGradients | None) -> list[dict]:
        """What was sampled; with a replay buffer also what was learned from, where its tokens were looked at.

        `version` is that of the updates on the first batch.
        """
        number, shared = self._config.trainer.samples_per_iteration, (self._task, self._rows)
        if not self._config.replay.enabled:
            return samples.of_batch(made.batch, number, *shared, version=version, tokens=tokens)
        sampled = samples.of_batch(made.batch, number, *shared)
        if tokens is None:
            return sampled
        return sampled + samples.of_batch(made.drawn[0], number, *shared, version=version, tokens=tokens)

    def _say_unjudged(self, judged: float, collected: Collected, iteration: int) -> None:
        """Says why most responses have no verdict: when that begins, and when the reason is of another kind."""
        if judged >= self._config.alarms.min_judged:
            self._said_reason = None
            return
        reason = collected.first_reason or "the task gives no reason"
        kind = re.sub(r"\d+", "", reason)
        if kind != self._said_reason:
            size = len(collected.outline.reward)
            self._say(
                f"iteration {iteration}: {size - round(judged * size)} of {size} responses have no verdict; the first "
                f"reason: {reason}"
            )
        self._said_reason = kind
