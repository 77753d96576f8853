"""Draw the gradient coefficient of every objective against the ratio: docs/algorithms/coefficients.png.

    python scripts/plot_objectives.py [--output FILE]

g is computed by differentiating the losses themselves: -d loss / d logp of each token over that token's weight in
the reduction. Every token is a response of its own, so that a ratio of the whole response is that of its token.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import argparse
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from r2vpo_jax import losses

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "algorithms" / "coefficients.png"
# Colors that color-blind readers can tell apart (Okabe and Ito).
COLORS = {3.0: "#0072B2", -3.0: "#D55E00", 1.0: "#56B4E9", -1.0: "#E69F00"}
BEHAVIOR_PROBABILITY = 0.3  # mu; pi = r mu stays below 1 for the ratios drawn
RATIOS = np.linspace(0.01, 3.3, 1001)
LIMIT = 8.0
COLUMNS = 4

# What has no default.
REQUIRED = {"r2vpo": {"variance_coef": 2.5}, "m2po": {"threshold": 0.3}}
# What a panel says of its settings. The names are those of the hyper-parameters.
NOTES = {
    "r2vpo": "λ = {variance_coef:g}",
    "ppo_clip": "clip {clip_low:g}, {clip_high:g}",
    "cispo": "cap {max_ratio:g}, at r = {max_ratio:g}",
    "gspo": "clip {clip_low:g}, {clip_high:g}",
    "spo": "ε = {epsilon:g}",
    "m2po": "threshold {threshold:g}",
    "gmpo": "log-clip {log_clip:g}",
    "sapo": "τ = {tau_positive:g}, {tau_negative:g}",
    "vespo": "powers {power_positive:g}, {power_negative:g}; decays {decay_positive:g}, {decay_negative:g}",
    "topr": "cap {max_ratio:g}",
    "drpo": "ε = {epsilon:g}, μ = {mu:g}",
    "dro": "β = {beta:g}",
    "dppo_tv": "TV {divergence_low:g}, {divergence_high:g}; μ = {mu:g}",
    "dppo_kl": "KL {divergence_low:g}, {divergence_high:g}; μ = {mu:g}",
    "gppo": "clip {clip_low:g}, {clip_high:g}; dual {dual_clip:g}",
    "aspo": "clip {clip_low:g}, {clip_high:g}; dual {dual_clip:g}",
    "luspo": "clip {clip_low:g}, {clip_high:g}",
}


def coefficients(name: str, ratios, advantages) -> np.ndarray:
    """g [A, R] of single tokens at those ratios, a row for each advantage."""
    advantages, ratios = np.meshgrid(advantages, ratios, indexing="ij")
    behavior_logp = jnp.full((ratios.size, 1), np.log(BEHAVIOR_PROBABILITY), jnp.float32)
    logp = behavior_logp + jnp.log(jnp.asarray(ratios.reshape(-1, 1), jnp.float32))
    mask = jnp.ones_like(logp, bool)

    def loss_fn(logp):
        return losses.get(name)(
            logp, behavior_logp, advantages.reshape(-1), mask, reduction="token_mean", **REQUIRED.get(name, {})
        )

    grads, _ = jax.jit(jax.grad(loss_fn, has_aux=True))(logp)
    return np.asarray(-grads / losses.token_weights(mask, "token_mean")).reshape(ratios.shape)


def note(name: str) -> str:
    """The settings of a panel."""
    parameters = inspect.signature(losses.get(name)).parameters
    values = {k: p.default for k, p in parameters.items()} | REQUIRED.get(name, {})
    return NOTES.get(name, "").format(**values, mu=BEHAVIOR_PROBABILITY)


def _label(advantage):
    return f"A = {advantage:+g}".replace("-", "−")


def _legend(ax):
    """Lines and labels by falling advantage, the reference last."""
    order = [_label(a) for a in sorted(COLORS, reverse=True)]
    lines = {line.get_label(): line for line in ax.get_legend_handles_labels()[0]}
    labels = [*order, *(label for label in lines if label not in order)]
    return [lines[label] for label in labels], labels


def draw() -> Figure:
    """One panel an objective, and the legend in what the last row leaves free."""
    names = losses.names()
    rows = -(-(len(names) + 1) // COLUMNS)
    figure = Figure(figsize=(12, 2.35 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True).flatten()
    for ax, name in zip(axes, names, strict=False):
        ax.axhline(0, color="0.8", lw=0.8)
        ax.axvline(1, color="0.8", lw=0.8)
        for sign in (1, -1):
            label = "g = r A, A = ±1" if sign > 0 else None
            ax.plot(RATIOS, sign * RATIOS, color="0.45", lw=0.8, ls=(0, (4, 3)), zorder=3, label=label)
        for advantage, g in zip(COLORS, coefficients(name, RATIOS, list(COLORS)), strict=True):
            ax.plot(RATIOS, g, color=COLORS[advantage], lw=1.7, label=_label(advantage))
        ax.set_title(name, loc="left", fontsize=10, fontweight="bold")
        ax.set_title(note(name), loc="right", fontsize=8, color="0.3")
        ax.set(xlim=(0, RATIOS[-1]), ylim=(-LIMIT, LIMIT), xticks=(0, 1, 2, 3), yticks=(-6, -3, 0, 3, 6))
        ax.tick_params(labelsize=8, labelbottom=True)
    for ax in axes[len(names) :]:
        ax.axis("off")
    axes[len(names)].legend(
        *_legend(axes[0]),
        loc="upper left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0,
        fontsize=10,
        frameon=False,
        title="The gradient of what is maximized is E[ g ∇log π ], r = π / μ.\nDefault settings but for λ and the threshold of m2po;\none token a response. Lines leave the frame at |g| = 8.",
        title_fontsize=10,
        alignment="left",
        labelspacing=0.7,
    ).set_in_layout(False)
    figure.supxlabel("ratio r", fontsize=10)
    figure.supylabel("gradient coefficient g", fontsize=10)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw the gradient coefficient of every objective.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args(argv).output
    canvas = draw().canvas
    canvas.draw()
    # A palette: the file is a quarter of the size.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64).save(output, optimize=True)
    print(f"{output}: {', '.join(losses.names())}")


if __name__ == "__main__":
    main()
