"""What is written of an iteration: its line of metrics.jsonl; docs/metrics.md explains every name."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r2vpo_jax import ratio_stats
from r2vpo_jax.config.objective import ObjectiveConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.run.summary import held_variance
from r2vpo_jax.tasks.base import Outcome
from r2vpo_jax.training import credit, critic
from r2vpo_jax.training.update import RolloutReport
from r2vpo_jax.verifiers.outcome import unjudged


def of_sampled(objective: ObjectiveConfig, sampled: Rollout, group_size: int) -> dict[str, jax.Array]:
    """What is reported of the responses of one iteration, as scalars. Can be traced.

    What is said of rewards is of the responses that have a verdict, and of groups with one at least: NaN if none has.

    Args:
      objective: decides what counts as reward.
      sampled: all responses sampled in this iteration, verified.
      group_size: G.
    """
    judged = ~unjudged(jnp.asarray(sampled.outcome))
    right = ((sampled.outcome == Outcome.RIGHT) | ~judged).reshape(-1, group_size)
    groups = jnp.any(judged.reshape(-1, group_size), axis=1)
    learned, length = credit.learning_reward(sampled, objective), jnp.asarray(sampled.response_length)
    return {
        "reward/mean": _mean(sampled.reward, judged),
        "reward/learned": jnp.nanmean(learned),
        "reward/zero_variance_groups": 1.0 - _mean(credit.groups_differ(sampled, objective, group_size), groups),
        "reward/all_right_groups": _mean(jnp.all(right, axis=1), groups),
        "outcome/judged": jnp.mean(judged),
        "outcome/errors": jnp.sum(sampled.outcome == Outcome.ERROR),
        "outcome/timeouts": jnp.sum(sampled.outcome == Outcome.TIMEOUT),
        "response/length": jnp.mean(length),
        "response/length_max": jnp.max(length),
        "response/truncated": jnp.mean(sampled.truncated),
    }


def _mean(values, there) -> jax.Array:
    """The mean over those that are there, f32 []: NaN where none is, and the plain mean, bit for bit, where all are."""
    some = jnp.sum(jnp.where(there, values, 0), dtype=jnp.float32) / jnp.sum(there)
    return jnp.where(jnp.all(there), jnp.mean(values), some)


def of_terms(terms: Sequence[Mapping[str, np.ndarray]], outcomes: Sequence[np.ndarray]) -> dict[str, float]:
    """The mean of each part of the reward over the responses that have a verdict and that the part applies to.

    Args:
      terms: of the verdicts on each of several batches, f32 [B] by name.
      outcomes: int32 [B] of each.
    """
    judged, means = ~unjudged(np.concatenate(outcomes)), {}
    for name in terms[0]:
        values = np.concatenate([part[name] for part in terms])[judged]
        values = values[~np.isnan(values)]
        means[name] = float(np.mean(values)) if values.size else float("nan")
    return means


def kept(drawn: list[Rollout]) -> jax.Array:
    """The share of responses in the drawn batches that takes part in learning, f32 []. Can be traced."""
    return jnp.mean(jnp.stack([jnp.mean(batch.keep) for batch in drawn]))


def num_kept_tokens(rollout: Rollout) -> int:
    """Response tokens of the rows that take part in learning, of NumPy arrays."""
    return int(np.sum(rollout.response_length, where=np.asarray(rollout.keep)))


def merged(reports: Sequence[RolloutReport]) -> RolloutReport:
    """What training on the drawn batches of one iteration measured, as one report. Can be traced.

    Statistics are of all batches, and so is `skipped`; everything else is that of the last.

    Args:
      reports: on each, in order; at least one.
    """
    if len(reports) == 1:
        return reports[0]
    stats = jax.tree.map(lambda *x: jnp.stack(x), *(report.stats for report in reports)).reduce()
    return reports[-1].replace(stats=stats, skipped=jnp.concatenate([report.skipped for report in reports]))


def row(
    objective: ObjectiveConfig,
    sampled: dict,
    kept: float,
    report: RolloutReport | None,
    *,
    counters: dict,
    variance_coef: float,
    kl_coef: float,
    learning_rate: float,
) -> dict:
    """Everything that is reported of an iteration but its time: of kind "train", or "fill" if it only filled the queue.

    Args:
      objective: the configuration; some names exist only for what it switches on.
      sampled: from `of_sampled`.
      kept: from the function `kept`.
      report: from `merged`, on the host; None while the queue fills.
      counters: totals of the run so far.
      variance_coef, kl_coef, learning_rate: after this iteration.
    """
    shared = {**counters, **sampled}
    if report is None:
        return _plain({"kind": "fill", **shared})
    stats = report.stats
    result = {
        "kind": "train",
        **shared,
        "reward/kept": kept,
        "policy/entropy": stats.mean("entropy") if kept else float("nan"),  # of no token, not 0
        "ratio/variance": float(report.variance_last),
        "ratio/variance_first": float(report.variance_first),
        **({} if report.variance_after is None else {"ratio/variance_after": float(report.variance_after)}),
        "ratio/variance_mean": stats.mean("ratio_variance"),
        **ratio_stats.summarize(stats),
        "ratio/clamped": stats.mean("clamped"),
        "loss/total": stats.mean("loss"),
        "loss/surrogate": stats.mean("surrogate"),
        "loss/penalty": stats.mean("penalty") if "penalty" in stats.sums else 0.0,
        "optimizer/grad_norm": stats.mean("grad_norm"),
        "optimizer/update_norm": stats.mean("update_norm"),
        "optimizer/learning_rate": learning_rate,
        "optimizer/nonfinite_updates": int(np.sum(report.skipped)),
        **_optional(objective, report, variance_coef, kl_coef),
    }
    return _plain(result)


_PHASES = ("rollout", "verify", "score", "update", "sync", "evaluation", "checkpoint", "report", "compile", "iteration")


def of_time(sampled_tokens: float, trained_tokens: float | None, spent: dict, seconds: float) -> dict:
    """What is reported of the time that an iteration took.

    Args:
      sampled_tokens: sampled in this iteration.
      trained_tokens: trained on in this iteration, each epoch counted; None while the queue fills.
      spent: seconds by phase since the line of the iteration before (`Timers.lap`).
      seconds: that the run has taken so far.
    """
    result = {
        "throughput/rollout_tokens_per_second": sampled_tokens / max(spent["rollout"], 1e-9),
        **{f"time/{phase}": spent.get(phase, 0.0) for phase in _PHASES},
        **{f"time/{phase}": spent[phase] for phase in ("weights", "wait") if phase in spent},
        **({"time/beside": spent["beside"]} if "wait" in spent else {}),
        "time/run": seconds,
    }
    if trained_tokens is not None:
        result["throughput/update_tokens_per_second"] = trained_tokens / max(spent["update"], 1e-9)
    return result


def _plain(result: dict) -> dict:
    return {k: v.item() if hasattr(v, "item") else v for k, v in result.items()}


def _optional(objective: ObjectiveConfig, report: RolloutReport, variance_coef: float, kl_coef: float) -> dict:
    """What exists only with a multiplier, a KL divergence, a critic, an imitation, or a correction."""
    result, stats = {}, report.stats
    if objective.has_multiplier:
        result |= {"dual/variance_coef": variance_coef, "dual/signal": float(report.dual_signal)}
    if objective.variance_budget is not None:
        result["dual/constraint_violation"] = float(report.dual_signal) - objective.variance_budget
    if objective.has_kl:
        result |= {"kl/mean": stats.mean("kl"), "kl/coef": kl_coef}
    if objective.critic:
        result |= {
            "critic/loss": stats.mean("value_loss"),
            "critic/explained_variance": critic.explained_variance(stats),
            "critic/clip_fraction": stats.mean("value_clip_fraction"),
            "critic/target_mean": stats.mean("value_target"),
        }
    if objective.imitates:
        result["loss/imitation"] = stats.mean("imitation")
    if objective.correction.weighs:
        mean, second = float(stats.mean("weight")), float(stats.mean("weight_squared"))
        result |= {
            "correction/weight_mean": mean,
            "correction/effective_sample_size": mean**2 / second if second > 0 else 0.0,
        }
    if objective.correction.leaves_out:
        result["correction/left_out"] = stats.mean("left_out")
    if objective.correction.step_scaling != "none":
        mean, second = float(stats.mean("sequence_weight")), float(stats.mean("sequence_weight_squared"))
        result |= {
            "correction/step_scale": stats.mean("step_scale"),
            "correction/response_effective_sample_size": mean**2 / second if second > 0 else 0.0,
        }
    return result


def progress_text(row: dict, *, validation: float, budget: float | None, seconds: float) -> str:
    """What a progress line says of a row.

    Args:
      row: of `row`.
      validation: the last validation score.
      budget: of the ratio variance, if there is one.
      seconds: spent so far.
    """
    text = f"rollouts {row['rollouts']}  reward {row['reward/mean']:.3f}  "
    if row["kind"] == "fill":
        return text + "filling the queue"
    bound = "" if budget is None else f"/{budget:g}"
    coef = f"lambda {row['dual/variance_coef']:.2f}  " if "dual/variance_coef" in row else ""
    return text + (
        f"val {validation:.3f}  V {held_variance(row):.4f}{bound}  {coef}"
        f"entropy {row['policy/entropy']:.3f}  {row['rollout_tokens'] / max(seconds, 1e-9):.0f} tok/s"
    )
