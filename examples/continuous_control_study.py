"""The study of docs/results/continuous_control.md: tuning, paired test seeds, tables and figure.

    taskset -c 1 python -m examples.continuous_control_study             # everything, a quarter of an hour on one core
    python -m examples.continuous_control_study --only_report            # from the saved results

Results are saved after each method of each environment, and what is saved is not run again.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from examples import continuous_control

ENVIRONMENTS = ("Pendulum-v1", "MountainCarContinuous-v0", "Reacher-misc")
GRIDS = {
    "ppo_clip": (0.1, 0.2, 0.3),
    "kl_fixed": (0.3, 1.0, 3.0),
    "kl_adaptive": (0.003, 0.01, 0.03),
    "r2vpo_fixed": (0.15, 0.5, 1.5),
    "r2vpo_adaptive": (0.006, 0.02, 0.06),
}
ITERATIONS = 80
TUNING_SEEDS = range(100, 104)  # times the three knobs, as many runs as the test has: one program serves both
TEST_SEEDS = range(1000, 1012)
BLOCKS = 10  # points of a learning curve; the last one is the score
COMPARISONS = (len(GRIDS) - 1) * len(ENVIRONMENTS)
UNPENALIZED = "no_trust_region"
LABELS = {
    "ppo_clip": ("PPO clip", "#000000", "s"),
    "kl_fixed": ("KL fixed", "#E69F00", "v"),
    "kl_adaptive": ("KL adaptive", "#D55E00", "^"),
    "r2vpo_fixed": ("R²VPO fixed", "#56B4E9", "D"),
    "r2vpo_adaptive": ("R²VPO adaptive", "#0072B2", "o"),
    UNPENALIZED: ("no trust region", "#888888", "x"),
}


def trainer(env, method):
    """(keys, knobs) -> metrics of those runs, side by side in one program."""
    config = continuous_control.Config(env=env, method=method, iterations=ITERATIONS)
    train = jax.jit(jax.vmap(continuous_control.make_train(config)))

    def run(seeds, knobs):
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        return jax.tree.map(np.asarray, train(keys, jnp.asarray(knobs, jnp.float32)))

    return run


def summary(metrics):
    """What is kept of test runs: scores [seeds], and curves [seeds, BLOCKS]."""
    blocks = {name: x.reshape(len(x), BLOCKS, -1) for name, x in metrics.items()}
    returns = blocks["return_sum"].sum(-1) / np.maximum(blocks["episodes"].sum(-1), 1)
    curves = {"return": np.where(blocks["episodes"].sum(-1) > 0, returns, np.nan)}
    curves |= {name: blocks[name].mean(-1) for name in ("ratio_variance", "kl", "coef", "std")}
    scores = np.asarray(continuous_control.final_return(metrics))
    return {"scores": rounded(scores), "curves": {name: rounded(x) for name, x in curves.items()}}


def rounded(x):
    """Nested lists of four significant digits; None for what is no number."""
    if np.ndim(x):
        return [rounded(y) for y in x]
    return float(f"{x:.4g}") if np.isfinite(x) else None


def run_all(path):
    results = json.loads(path.read_text()) if path.exists() else {"device": device(), "runs": {}}
    for env in ENVIRONMENTS:
        here = results["runs"].setdefault(env, {})
        for method, grid in GRIDS.items():
            if method in here:
                continue
            start = time.monotonic()
            run = trainer(env, method)
            tuning = run(np.tile(TUNING_SEEDS, len(grid)), np.repeat(grid, len(TUNING_SEEDS)))
            tuning = np.asarray(continuous_control.final_return(tuning)).reshape(len(grid), -1)
            knob = grid[int(np.argmax(np.nan_to_num(tuning, nan=-np.inf).mean(1)))]
            row = {"grid": grid, "tuning_scores": rounded(tuning), "knob": knob}
            row |= summary(run(TEST_SEEDS, np.full(len(TEST_SEEDS), knob)))
            here[method] = row | {"seconds": round(time.monotonic() - start, 1)}
            if method == "r2vpo_fixed":
                here[UNPENALIZED] = {"knob": 0.0} | summary(run(TEST_SEEDS, np.zeros(len(TEST_SEEDS))))
            print(env, method, "knob", knob, "mean", np.mean(row["scores"]), here[method]["seconds"], "s", flush=True)
            path.write_text(json.dumps(results) + "\n")
    return results


def device():
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def interval(values, confidence=0.95):
    """(mean, half width of Student's interval)."""
    values = np.asarray(values, float)
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    return values.mean(), quantile * values.std(ddof=1) / np.sqrt(len(values))


def verdict(difference):
    """Whether the interval that holds for all comparisons at once excludes 0."""
    mean, half = interval(difference, 1 - 0.05 / COMPARISONS)
    return "cannot be told" if abs(mean) <= half else "better" if mean > 0 else "worse"


def middle(row, name):
    """Mean over seeds and the middle six tenths of the run."""
    return np.mean(np.asarray(row["curves"][name])[:, 2:8])


def markdown(head, rows):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def table(results):
    rows = []
    for env, runs in results["runs"].items():
        for method, (label, *_) in LABELS.items():
            row = runs[method]
            cells = [env, label, f"{row['knob']:g}", "{:.1f} ± {:.1f}".format(*interval(row["scores"])), "", ""]
            if method != "ppo_clip":
                difference = np.subtract(row["scores"], runs["ppo_clip"]["scores"])
                cells[4:] = ["{:+.1f} ± {:.1f}".format(*interval(difference)), verdict(difference)]
            rows.append([*cells, f"{middle(row, 'ratio_variance'):.3g}", f"{middle(row, 'kl'):.3g}"])
    head = ["environment", "method", "number", "return", "less PPO clip's", "verdict", "V", "KL"]
    return markdown(head, rows)


def tuning_table(results):
    rows = []
    for env, runs in results["runs"].items():
        for method, grid in GRIDS.items():
            means = np.mean(runs[method]["tuning_scores"], axis=1)
            cells = [f"{knob:g}: {mean:.1f}" for knob, mean in zip(grid, means, strict=True)]
            rows.append([env, LABELS[method][0], *cells])
    return markdown(["environment", "method", "low", "middle", "high"], rows)


def figure(results, path):
    """Learning curves, and below them the paired differences of what has a trust region."""
    runs = results["runs"]
    fig, axes = plt.subplots(2, len(runs), figsize=(12, 6.6), layout="constrained", height_ratios=(3, 2))
    steps = ITERATIONS * continuous_control.Config.num_envs * continuous_control.Config.rollout_length
    at = (np.arange(BLOCKS) + 0.5) * steps / BLOCKS / 1000
    compared = [method for method in LABELS if method not in ("ppo_clip", UNPENALIZED)]
    for column, (env, methods) in enumerate(runs.items()):
        curve, forest = axes[:, column]
        for method, (label, color, marker) in LABELS.items():
            returns = np.nanmean(np.array(methods[method]["curves"]["return"], float), axis=0)
            style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.6}
            curve.plot(at, returns, linestyle="--" if method == UNPENALIZED else "-", label=label, **style)
        for place, method in enumerate(compared):
            _, color, marker = LABELS[method]
            difference = np.subtract(methods[method]["scores"], methods["ppo_clip"]["scores"])
            mean, half = interval(difference)
            forest.plot(difference, np.full(len(difference), place + 0.25), ".", color=color, alpha=0.6, markersize=4)
            forest.errorbar(mean, place, xerr=half, color=color, fmt=marker, capsize=4, linewidth=1.8)
        curve.set(title=env, xlabel="environment steps, thousands")
        forest.axvline(0, color="black", linewidth=0.8)
        forest.set_yticks(range(len(compared)), [LABELS[method][0] if not column else "" for method in compared])
        forest.set_ylim(len(compared) - 0.5, -0.5)
        forest.set_xlabel("final return less PPO clip's, same seed\n(mean, 95 % interval; dots: seeds)")
        for axis in (curve, forest):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"return, mean of {len(TEST_SEEDS)} seeds")
    axes[0, 0].legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument("--only_report", action="store_true")
    args = parser.parse_args()
    path = args.output / "data" / "continuous_control.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if args.only_report else run_all(path)
    print(table(results), tuning_table(results), sep="\n\n")
    figure(results, args.output / "continuous_control.png")


if __name__ == "__main__":
    main()
