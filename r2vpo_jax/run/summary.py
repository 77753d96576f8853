"""What a finished run came to: summary.json, and a closing table of it."""

import numpy as np

from r2vpo_jax.config import Config

CLIP_EPSILON = 0.2  # ratio_stats.compute's default: the clip whose victims are counted


def summarize(
    config: Config, rows, *, base, final, progress, train_seconds, phases, peak_memory_bytes, unchanged_weights=None
) -> dict:
    """Everything about a finished run that fits into one flat-ish dictionary.

    Args:
      config: the run's.
      rows: of metrics.jsonl.
      base, final: test scores before and after (trainer).
      progress: the trainer's counters.
      train_seconds: from process start to the last evaluation, compilation included.
      phases: seconds by phase of the last process.
      peak_memory_bytes: of the process.
      unchanged_weights: share of the exported weights that are the base model's, bit for bit; None without an export.
    """
    train = [r for r in rows if r["kind"] == "train"]
    second_half = train[len(train) // 2 :]
    iterations = [r for r in rows if r["kind"] != "evaluation"]  # those that only filled a queue too
    seconds = {name: sum(r.get(f"time/{name}", 0.0) for r in iterations) for name in ("rollout", "verify", "update")}
    k = final["k"]

    def mean(name, rows):
        return float(np.mean([float(r[name]) for r in rows]))  # a row may hold "nan", see files.JsonlWriter

    def mean_where_any(name):
        values = [float(r[name]) for r in train if r[name] != "nan"]
        return float(np.mean(values)) if values else None

    return {
        "objective": config.objective.name,
        "seed": config.seed,
        "test_k": k,
        "base_pass_at_1": base["pass_at_1"],
        "base_pass_at_1_interval": [base["pass_at_1_low"], base["pass_at_1_high"]],
        "final_pass_at_1": final["pass_at_1"],
        "final_pass_at_1_interval": [final["pass_at_1_low"], final["pass_at_1_high"]],
        "best_pass_at_1": progress["best_validation"],
        "final_validation_pass_at_1": progress["last_validation"],
        f"base_pass_at_{k}": base["pass_at_k"],
        f"final_pass_at_{k}": final["pass_at_k"],
        "base_by_level": base["by_level"],
        "final_by_level": final["by_level"],
        "num_eval_problems": final["problems"],
        "average_at": final["average_at"],
        "num_iterations": config.trainer.num_iterations,
        "num_rollouts": progress["rollouts"],
        "num_rollout_tokens": progress["rollout_tokens"],
        "num_trained_tokens": progress["trained_tokens"],
        "num_updates": train[-1]["version"],
        "train_seconds": train_seconds,
        "phase_seconds": dict(phases),
        # None of a fused run, whose time is not its own.
        "rollout_tokens_per_second": progress["rollout_tokens"] / seconds["rollout"] if seconds["rollout"] else None,
        "update_tokens_per_second": progress["trained_tokens"] / seconds["update"] if seconds["update"] else None,
        "peak_memory_bytes": peak_memory_bytes,
        "unchanged_weights": unchanged_weights,
        "adaptive": config.objective.dual.adaptive,
        "variance_budget": config.objective.variance_budget,
        "final_variance_coef": float(train[-1].get("dual/variance_coef", 0.0)),
        "max_variance_coef": config.objective.dual.max_coef,
        "final_ratio_second_moment": float(train[-1]["ratio/variance"]),
        "ratio_variance_second_half": float(np.mean([held_variance(r) for r in second_half])),
        "second_half_variance_coef": mean("dual/variance_coef", second_half)
        if config.objective.has_multiplier
        else 0.0,
        "noise_floor_ratio_second_moment": progress["noise_floor"],
        "final_entropy": float(train[-1]["policy/entropy"]),
        "max_ratio": max(float(r["ratio/max"]) for r in train),
        "clip_fraction": mean("clip/fraction", train),
        "clip_gradient_share": mean("clip/gradient_share", train),
        "at_stake": mean("keeps/at_stake", train),
        "retained": mean_where_any("keeps/retained"),
        "restoring": mean_where_any("keeps/restoring"),
        "samples_before": base["samples"],
        "samples_after": final["samples"],
    }


def held_variance(row: dict) -> float:
    """V of a training row of metrics.jsonl as the budget bounds it: what lambda is given, if there is a lambda."""
    return float(row.get("dual/signal", row["ratio/variance"]))


def table(summary: dict) -> str:
    """The closing table."""
    k, average_at = summary["test_k"], summary["average_at"]
    phases = summary["phase_seconds"]

    def score(which):
        low, high = summary[f"{which}_pass_at_1_interval"]
        return f"{summary[f'{which}_pass_at_1']:.3f} [{low:.3f}, {high:.3f}]"

    kind = "adaptive" if summary["adaptive"] else "fixed"
    budget = f"budget {summary['variance_budget']:g}, " if summary["adaptive"] else ""
    lines = [
        f"{summary['objective']}, seed {summary['seed']}: {summary['num_iterations']} iterations, "
        f"{summary['num_updates']} updates",
        "",
        f"{'test, ' + str(summary['num_eval_problems']) + ' problems':28s}{'base':>26s}{'fine-tuned':>26s}",
        f"{f'  pass@1 ({average_at} samples, 95 %)':28s}{score('base'):>26s}{score('final'):>26s}",
        f"{f'  pass@{k}':28s}{summary[f'base_pass_at_{k}']:>26.3f}{summary[f'final_pass_at_{k}']:>26.3f}",
        *(
            f"{f'  pass@1, level {level}':28s}{summary['base_by_level'][level]:>26.3f}{value:>26.3f}"
            for level, value in summary["final_by_level"].items()
        ),
        "",
        f"validation pass@1           best {_score(summary['best_pass_at_1'])}, last "
        f"{summary['final_validation_pass_at_1']:.3f}",
        f"rollouts                    {summary['num_rollouts']} ({summary['num_rollout_tokens']} tokens sampled, "
        f"{summary['num_trained_tokens']} trained on)",
        f"time                        {summary['train_seconds']:.0f} s; in the last process: "
        + ", ".join(
            f"{name} {phases.get(name, 0.0):.0f}" for name in ("rollout", "verify", "update", "evaluation", "compile")
        ),
        f"speed                       rollout {summary['rollout_tokens_per_second']:.0f} tokens/s, "
        f"update {summary['update_tokens_per_second']:.0f} tokens/s",
        f"peak memory                 {summary['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"E[(r-1)^2], second half     {summary['ratio_variance_second_half']:.5f} ({budget}noise floor "
        f"{summary['noise_floor_ratio_second_moment']:.1e})",
        f"variance coefficient        {summary['final_variance_coef']:.3f} at the end ({kind}), "
        f"{summary['second_half_variance_coef']:.3f} on average in the second half",
        f"entropy at the end          {summary['final_entropy']:.4f} nats per token",
        *_exported(summary),
        f"a clip at {CLIP_EPSILON} would zero      {100 * summary['clip_fraction']:.3f} % of the tokens, which carry "
        f"{100 * summary['clip_gradient_share']:.2f} % of this objective's gradient",
        *_kept(summary),
        "",
        "samples (problem | before | after)",
        *(
            f"  {_one_line(before[0])} | {_one_line(before[1])} | {_one_line(after[1])}"
            for before, after in zip(summary["samples_before"], summary["samples_after"], strict=True)
        ),
    ]
    return "\n".join(lines)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _one_line(text: str) -> str:
    return text.replace("\n", "↵")


def _exported(summary: dict) -> list[str]:
    """How much of the exported model is the base model's, where there is an export."""
    share = summary.get("unchanged_weights")  # absent in runs of earlier versions
    return (
        []
        if share is None
        else [f"weights in hf/              {100 * share:.2f} % of them as in the base model, bit for bit"]
    )


def _kept(summary: dict) -> list[str]:
    """What was done with the tokens that a clip would zero, if there were any."""
    if summary["retained"] is None:
        return []
    return [
        f"of those tokens' gradient   {100 * summary['retained']:.0f} % retained, restoring "
        f"{100 * summary['restoring']:.0f} % (PPO's clip: 0 and 0; no trust region: 100 and 0)"
    ]
