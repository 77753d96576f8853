"""The two figures of a finished run, by Matplotlib."""

import io

import numpy as np

from r2vpo_jax import storage
from r2vpo_jax.run.summary import CLIP_EPSILON, held_variance

_SMOOTHED_OVER = 10  # iterations of the running mean of V in summary.png
_TINY = 1e-12  # stands for 0 on a logarithmic axis
_KINDS_OF_TOKENS = {  # how ratio_stats.SPLITS are named on an axis; mu is the probability under the behavior policy
    "positive": "A > 0", "negative": "A < 0",
    "rare": "μ < 0.05", "uncertain": "0.05 ≤ μ < 0.5", "likely": "μ ≥ 0.5",
    "start": "first third", "middle": "second third", "end": "last third",
    "age_0": "age 0", "age_1_to_7": "age 1 to 7", "age_8_to_63": "age 8 to 63", "age_64_up": "age 64 or more",
}  # fmt: skip

TEXTS = {
    "summary.png": "pass@1 against rollouts; the ratio variance against its budget, with the multiplier",
    "curves.png": "nine curves of the run",
}


def draw(directory, summary: dict, rows) -> None:
    """Write the files named in `TEXTS`.

    Args:
      directory: for them, on a disk or in a store.
      summary: of the run.
      rows: of metrics.jsonl.
    """
    _figure(directory / "summary.png", (8, 3.8), 200, lambda figure: _draw_summary(figure, summary, rows))
    _figure(directory / "curves.png", (12, 10.5), 110, lambda figure: _draw_curves(figure, summary, rows))


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
    ax.set(title=f"Tokens that PPO's clip at {CLIP_EPSILON} would cut", ylabel="percent", ylim=(0, None))
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
