"""What a finished run shows: summary.json, two figures, report.html, and a closing table."""

import base64
import html
import io
import json

import numpy as np

from r2vpo_jax import storage
from r2vpo_jax.config import Config
from r2vpo_jax.run import files

_CLIP_EPSILON = 0.2  # ratio_stats.compute's default: the clip whose victims are counted
_SMOOTHED_OVER = 10  # iterations of the running mean of V in summary.png
_TINY = 1e-12  # stands for 0 on a logarithmic axis
_KINDS_OF_TOKENS = {  # how ratio_stats.SPLITS are named on an axis; mu is the probability under the behavior policy
    "positive": "A > 0", "negative": "A < 0",
    "rare": "μ < 0.05", "uncertain": "0.05 ≤ μ < 0.5", "likely": "μ ≥ 0.5",
    "start": "first third", "middle": "second third", "end": "last third",
    "age_0": "age 0", "age_1_to_7": "age 1 to 7", "age_8_to_63": "age 8 to 63", "age_64_up": "age 64 or more",
}  # fmt: skip


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
        f"a clip at {_CLIP_EPSILON} would zero      {100 * summary['clip_fraction']:.3f} % of the tokens, which carry "
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


def is_finished(workdir) -> bool:
    """Whether a run ended here."""
    return _summary(workdir).exists()


def withdraw(workdir) -> None:
    """The run goes on: it has not finished until there is a summary again."""
    _summary(workdir).unlink(missing_ok=True)


def read_summary(workdir) -> dict:
    """summary.json of a finished run."""
    return json.loads(_summary(workdir).read_text())


def _summary(workdir):
    return storage.path(workdir, "--workdir") / "report" / "summary.json"


def rewrite(workdir) -> str:
    """Write the report of a finished run again from its files; returns the closing table.

    Raises:
      ValueError: the run has not finished.
    """
    workdir = storage.path(workdir, "--workdir")
    if not is_finished(workdir):
        raise ValueError(f"{workdir} does not hold a finished run (no report/summary.json)")
    summary = read_summary(workdir)
    write(workdir, summary, files.read_jsonl(workdir / "metrics.jsonl"))
    return table(summary)


def write(workdir, summary: dict, rows) -> None:
    """Write workdir/report: summary.png, curves.png, report.html (with both figures) and, last, summary.json."""
    workdir = storage.path(workdir)
    directory = workdir / "report"
    if not storage.is_store(directory):
        directory.mkdir(parents=True, exist_ok=True)
    _figure(directory / "summary.png", (8, 3.8), 200, lambda figure: _draw_summary(figure, summary, rows))
    _figure(directory / "curves.png", (12, 10.5), 110, lambda figure: _draw_curves(figure, summary, rows))
    images = "".join(html_picture((directory / name).read_bytes(), text) for name, text in _ALT_TEXTS.items())
    config = json.loads((workdir / "config.json").read_text())
    page = html_page(
        "r2vpo_jax run",
        f"<h1>{html.escape(summary['objective'])}, seed {summary['seed']}</h1>{images}"
        f"<h2>Result</h2><pre>{html.escape(table(summary))}</pre>"
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre>\n",
    )
    (directory / "report.html").write_text(page, encoding="utf-8")
    files.write_atomically(directory / "summary.json", json.dumps(summary, indent=2) + "\n")


def html_page(title: str, body: str) -> str:
    """A page that needs no other file and no network; `body` is HTML."""
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        "<style>body{font:15px/1.5 sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}"
        "pre,.wide{overflow-x:auto}pre{background:#f6f6f4;padding:1em}img{max-width:100%}"
        "table{border-collapse:collapse;font-size:13px}th,td{padding:.25em .7em;text-align:left;white-space:nowrap}"
        f"th{{border-bottom:1px solid #444}}td{{border-bottom:1px solid #ddd}}</style>{body}"
    )


def html_picture(png: bytes, text: str) -> str:
    """The picture itself, inlined; `text` says what it shows to those who do not see it."""
    return f"<img alt='{html.escape(text)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


# Figures ----------------------------------------------------------------------------------------------------

_ALT_TEXTS = {
    "summary.png": "pass@1 against rollouts; the ratio variance against its budget, with the multiplier",
    "curves.png": "nine curves of the run",
}


def _figure(file, size, dpi, draw) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    if storage.is_store(file):
        picture = io.BytesIO()
        figure.savefig(picture, dpi=dpi)
        storage.put(file, picture.getvalue())
    else:
        figure.savefig(file, dpi=dpi)


def _train_rows(rows):
    return [r for r in rows if r["kind"] == "train"]


def _validation_rows(rows):
    return [r for r in rows if r["kind"] == "evaluation" and r["split"] == "validation"]


def _series(rows, name):
    return np.array([float(r[name]) for r in rows])  # a row may hold "nan"


def _draw_summary(figure, summary, rows) -> None:
    """Two panels: what was learned, and what the constraint did meanwhile. Legible at 800 pixels."""
    left, right = figure.subplots(1, 2)
    train, validation = _train_rows(rows), _validation_rows(rows)
    for rows_of, name, style in (
        (train, "reward/mean", {"color": "0.75", "lw": 1, "label": "training reward"}),
        (validation, "pass_at_1", {"color": "C0", "marker": "o", "ms": 3, "label": "validation pass@1"}),
    ):
        left.plot(_series(rows_of, "rollouts") / 1000, _series(rows_of, name), **style)
    left.axhline(summary["base_pass_at_1"], color="C3", ls=":", label="base model, test")
    left.axhline(summary["final_pass_at_1"], color="C2", ls="--", label="fine-tuned, test")
    left.set(
        title="Share of right answers",
        xlabel="thousands of rollouts (responses sampled)",
        ylabel="pass@1",
        ylim=(0, 1.02),
    )

    x, variance = _series(train, "iteration"), np.maximum([held_variance(r) for r in train], _TINY)
    right.semilogy(x, variance, color="C0", lw=0.8, alpha=0.45, label="V of each iteration")
    window = min(_SMOOTHED_OVER, len(x))
    smooth = np.convolve(variance, np.ones(window) / window, mode="valid")
    right.semilogy(x[window - 1 :], smooth, color="C0", lw=1.8, label=f"V, mean of {window} iterations")
    if summary["variance_budget"] is not None:
        right.axhline(summary["variance_budget"], color="C3", ls="--", label="budget δ")
    against = "" if summary["variance_budget"] is None else " against its budget"
    right.set(title=f"Ratio variance V{against}", xlabel="iteration (rollout batch)", ylabel="V = E[(r − 1)²]")
    lines = list(right.get_lines())
    if any("dual/variance_coef" in r for r in train):
        second = right.twinx()
        lines += second.plot(x, _series(train, "dual/variance_coef"), color="C4", lw=1.2, ls="-.", label="multiplier λ")
        second.set_ylabel("multiplier λ", color="C4")
        second.tick_params(axis="y", colors="C4")
        second.set_ylim(0, None)
    for ax, shown in ((left, left.get_lines()), (right, lines)):
        ax.grid(alpha=0.3)
        # Below the axes: beside noisy curves there is no free corner.
        ax.legend(handles=shown, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=8, frameon=False)


def _draw_curves(figure, summary, rows) -> None:
    """Nine panels: everything that a first look at a run needs."""
    train, validation = _train_rows(rows), _validation_rows(rows)
    x = _series(train, "iteration")

    def series(name):
        return _series(train, name)

    axes = figure.subplots(3, 3)

    ax = axes[0, 0]
    ax.plot(x, series("reward/mean"), color="0.7", label="training reward")
    ax.plot(_series(validation, "iteration"), _series(validation, "pass_at_1"), "o-", ms=3, label="validation pass@1")
    ax.axhline(summary["base_pass_at_1"], color="C3", ls=":", label="base model, test")
    ax.axhline(summary["final_pass_at_1"], color="C2", ls="--", label="fine-tuned, test")
    ax.set(title="Share of right answers", ylabel="pass@1, mean reward", ylim=(0, 1.02))
    ax.legend(loc="lower right", fontsize=8)

    ax = axes[0, 1]
    ax.semilogy(x, np.maximum(series("ratio/variance"), _TINY), color="C0", lw=1, label="last minibatch")
    ax.semilogy(
        x, np.maximum(series("ratio/variance_mean"), _TINY), color="0.7", lw=1, label="mean over all minibatches"
    )
    if summary["variance_budget"] is not None:
        ax.axhline(summary["variance_budget"], color="C3", ls="--", label="budget δ")
    floor = summary["noise_floor_ratio_second_moment"]
    ax.set(title=f"Ratio variance (numerical noise {floor:.0e})", ylabel="V = E[(r − 1)²]")
    ax.legend(fontsize=8)

    ax = axes[0, 2]
    ax.plot(x, [r.get("dual/variance_coef", 0.0) for r in train], color="C4")
    ax.set(title="Multiplier of the ratio variance", ylabel="λ", ylim=(0, None))

    ax = axes[1, 0]
    ax.plot(x, series("policy/entropy"), color="C5")
    ax.set(title="Entropy of the policy", ylabel="nats per token", ylim=(0, None))

    ax = axes[1, 1]
    ax.semilogy(x, series("ratio/max"), color="C1", lw=1, label="largest ratio r of any token")
    ax.semilogy(x, series("optimizer/grad_norm"), color="C6", lw=1, label="gradient norm before its clip")
    ax.set(title="Outliers", ylabel="log scale")
    ax.legend(fontsize=8)

    ax = axes[1, 2]
    ax.plot(x, 100 * series("clip/fraction"), color="C7", label="share of all tokens")
    ax.plot(x, 100 * series("clip/gradient_share"), color="C8", lw=1, label="share of this objective's gradient")
    ax.plot(x, 100 * series("keeps/at_stake"), color="0.6", lw=1, ls=":", label="share of the unclipped gradient")
    ax.set(title=f"Tokens that PPO's clip at {_CLIP_EPSILON} would cut", ylabel="percent", ylim=(0, None))
    ax.legend(fontsize=8)
    _draw_kept(axes[2], x, series)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        if ax is not axes[2, 1]:
            ax.set_xlabel("iteration (rollout batch)")
    figure.suptitle(f"{summary['objective']}, seed {summary['seed']}")


def _draw_kept(axes, x, series) -> None:
    """What the objective does with the tokens that a clip would cut, as shares of their unclipped gradient."""
    names = {"retained": ("kept (retained)", "C2"), "restoring": ("reversed (restoring)", "C1")}
    for name, (label, color) in names.items():
        axes[0].plot(x, series(f"keeps/{name}"), ".-", color=color, lw=1, ms=4, label=label)
    axes[0].set(title="Cut tokens: gradient kept / reversed", ylabel="share of their unclipped gradient")
    _compress_above_one(axes[0])

    ax = axes[1]
    places = np.arange(len(_KINDS_OF_TOKENS))
    for offset, (name, (label, color)) in zip((-0.2, 0.2), names.items(), strict=True):
        columns = [series(f"keeps/{name}_{split}") for split in _KINDS_OF_TOKENS]
        means = [np.mean(c[~np.isnan(c)]) if np.any(~np.isnan(c)) else 0.0 for c in columns]
        ax.bar(places + offset, means, 0.4, color=color, label=label)
    _compress_above_one(ax)
    ax.set_xticks(places, list(_KINDS_OF_TOKENS.values()), rotation=60, ha="right", fontsize=8)
    ax.set(title="Cut tokens by kind (mean of the run)", ylabel="share of their unclipped gradient")

    axes[2].plot(x, 100 * series("ratio/top_permille_share"), color="C0", lw=1, label="share of V")
    axes[2].plot(x, 100 * series("keeps/top_permille_gradient"), color="C6", lw=1, label="share of the gradient")
    axes[2].set(title="Held by the largest 0.1 % of the tokens", ylabel="percent", ylim=(0, None))
    axes[2].legend(fontsize=8)


def _compress_above_one(ax) -> None:
    """Linear up to 1, logarithmic beyond, from 0; and a legend."""
    top = max(1.05, 1.1 * ax.get_ylim()[1])
    ax.set_yscale("symlog", linthresh=1.0, linscale=1.0)
    ticks = [t for t in (0, 0.25, 0.5, 0.75, 1, 2, 4, 10, 30, 100, 1e3, 1e4) if t <= top]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    ax.set_yticks([], minor=True)
    ax.set_ylim(0, top)
    ax.legend(fontsize=8)
