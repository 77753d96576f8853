"""Compare objectives and advantages with those of TRL and tunix: value and gradient, on the same random arrays.

    .venv/bin/python scripts/compare_references.py [--markdown] [--only trl|tunix]

Both packages get virtual environments of their own under .cache/references, made by the first run (3 GB, more
where pip finds PyTorch with CUDA only). The arrays have advantages of both signs, ragged masks with holes, a
response without tokens, and ratios spread so that every clip binds. Conventions that differ by a known factor
are met by our arguments (reduction, normalizer, epsilon), never by rescaling a result.

Exit code 0: all differences are at most 1e-5; 1: one is larger; 2: something cannot be installed or run.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not
os.environ["JAX_PLATFORMS"] = "cpu"  # here and in the workers: it is arithmetic that is compared, not devices
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import jax
import numpy as np
from references.environments import PINS, REFERENCES, EnvironmentFailedError, execute, interpreter

from r2vpo_jax import advantages, corrections, kl, losses
from r2vpo_jax.training import critic

TOLERANCE = 1e-5
HEADER = ["theirs", "ours", "value", "gradient", "advantages"]
BATCH, TIME, GROUP = 16, 24, 4
LEFT_OUT = {
    "trl": (
        "a response without tokens, for GMPOTrainer: it adds -A to its value, without a gradient; nothing here",
        "top_entropy_quantile, entropy bonus: masks and terms of the caller here",
        "use_bias_correction_kl with sequence-level ratios: kl.estimate corrects with the ratio of the token",
        "vespo with importance_sampling_ratio: a factor of its w there, a weight of the loss here",
        "the loss of RLOOTrainer: clips the product of the token ratios, which no objective here does",
        "experimental trainers other than GMPO: their objectives are not here",
    ),
    "tunix": (
        "entropy bonus of ppo: a term of the caller here",
        "kl_clamp_value: bounds the estimate; kl.estimate bounds the log-ratio, at 20",
        "sequence-mean-token-sum-norm: at its default, seq-mean-token-sum",
        "agentic learner: it calls the same losses",
    ),
}


class CannotCompareError(Exception):
    """The arrays would not show a difference; the message is one line."""


def listing(settings):
    return ", ".join(f"{k}={v}" for k, v in settings.items())


def objective(
    name, *, inputs="advantages", mask="mask", weights=None, beta=0.0, kind="k3", corrected=False, **settings
):
    """(label, function of the arrays to value and gradient) of an objective plus beta times a KL estimate.

    `normalizer` is a product of B, T and `rows`, the number of responses with an unmasked token; `weights` is the name of
    an array, or a pair of a label and a function of the arrays.
    """
    weights_label, weights_of = ("w", lambda x: x[weights]) if isinstance(weights, str) else (weights or (None, None))

    def evaluate(x):
        sizes = {"B": BATCH, "T": TIME, "rows": int(x[mask].any(axis=1).sum())}
        reduced = {k: settings[k] for k in ("reduction", "normalizer") if k in settings}
        if "normalizer" in reduced:
            reduced["normalizer"] = float(np.prod([sizes[factor] for factor in reduced["normalizer"].split(" * ")]))

        def loss(logp):
            arguments = settings | reduced | {"weights": weights_of(x) if weights else None}
            value, stats = losses.get(name)(logp, x["old_logp"], x[inputs], x[mask], **arguments)
            if beta:
                divergence = kl.estimate(logp, x["ref_logp"], kind, behavior_logp=x["old_logp"] if corrected else None)
                value += beta * losses.reduce(divergence, x[mask], **reduced)
            return value, stats

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(x["logp"])
        idle = {k for k, (total, _) in stats.items() if "clip_fraction" in k and total == 0}
        if idle - (set() if settings.get("dual_clip") else {"dual_clip_fraction"}):
            raise CannotCompareError(f"the arrays do not test {name}: {', '.join(idle)} is 0")
        return {"value": value, "gradient": gradient}

    per_token = {"advantages": "[B, T]"} if inputs == "token_advantages" else {}
    label = f"{name}({listing(per_token | settings | ({'weights': weights_label} if weights else {}))})"
    if beta:
        label += f" + {beta} kl.estimate({kind}{', behavior_logp' if corrected else ''})"
    return label, evaluate


def value_loss(**settings):
    """(label, function of the arrays to value and gradient) of the critic's loss."""

    def evaluate(x):
        def loss(values):
            return critic.value_loss(values, x["old_values"], x["returns"], x["mask"], **settings)[0]

        return dict(zip(("value", "gradient"), jax.value_and_grad(loss)(x["values"]), strict=True))

    return f"value_loss({listing(settings)})", evaluate


def estimate(function, names, template=None, **settings):
    """(label, function of the arrays to an array) of an estimator of advantages, or of weights."""
    return (template or f"{function.__name__}({{}})").format(listing(settings)), lambda x: {
        "array": function(*(x.get(n, n) for n in names), **settings)
    }


def off_policy_mask(**settings):
    """A pair (label, function of the arrays to weights), for `objective`."""
    names = ("logp", "sampler_logp", "advantages", "mask")

    def evaluate(x):
        mask = corrections.off_policy_mask(*(x[n] for n in names), **settings)
        if not 0 < (np.asarray(mask) < x["mask"]).sum() < x["mask"].sum():
            raise CannotCompareError("the arrays do not test off_policy_mask")
        return mask

    return f"off_policy_mask({listing(settings)})", evaluate


def whitened_gae(rewards, values, mask, **settings):
    return advantages.whiten(advantages.gae(rewards, values, mask, **settings), mask)


def gae_plus_values(rewards, values, mask, **settings):
    return advantages.gae(rewards, values, mask, **settings) + values


CLIP, NARROW = {"clip_low": 0.2, "clip_high": 0.28}, {"clip_low": 0.04, "clip_high": 0.06}
TOKEN, SEQUENCE = {"reduction": "token_mean"}, {"reduction": "sequence_mean"}
CONSTANT = {"reduction": "constant_length"}
PER_TOKEN = {"inputs": "token_advantages"}


def trl_cases():
    """(name of theirs, what the worker evaluates, ours)."""
    rows = {**SEQUENCE, "normalizer": "B"}  # TRL divides by all responses; the default here is those with a token
    taus = {"tau_positive": 1.0, "tau_negative": 1.05}
    gamma = {"power_positive": 2.0, "decay_positive": 3.0, "power_negative": 3.0, "decay_negative": 2.0}
    grpo = {"call": "loss", "trainer": "GRPOTrainer", "epsilon_low": 0.2, "epsilon_high": 0.28}
    sequence = grpo | {"importance_sampling_level": "sequence", "epsilon_low": 0.04, "epsilon_high": 0.06}
    free = grpo | {"epsilon_low": 1.0, "epsilon_high": 1e9}
    corrected = grpo | {"beta": 0.2, "args": {"use_bias_correction_kl": True}}
    cispo = grpo | {"loss_type": "cispo", "epsilon_high": 1.5}
    sapo = grpo | {"loss_type": "sapo", "args": {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}}
    vespo = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    gmpo = {"call": "loss", "trainer": "GMPOTrainer", "epsilon_low": 0.4, "epsilon_high": 0.4, "mask": "no_empty_mask"}
    yield "grpo", grpo, objective("ppo_clip", **CLIP, **rows)
    yield "grpo, epsilon too wide to bind", free, objective("policy_gradient", **rows)
    yield "grpo, delta", grpo | {"args": {"delta": 1.5}}, objective("ppo_clip", **CLIP, dual_clip=1.5, **rows)
    yield "grpo, beta", grpo | {"beta": 0.2}, objective("ppo_clip", beta=0.2, **CLIP, **rows)
    yield "grpo, use_bias_correction_kl", corrected, objective("ppo_clip", beta=0.2, corrected=True, **CLIP, **rows)
    ours = objective("ppo_clip", weights="weights", **CLIP, **rows)
    yield "grpo, vLLM weights", grpo | {"weights": "weights"}, ours
    ours = objective("ppo_clip", weights=off_policy_mask(threshold=0.05), **CLIP, **rows)
    yield "grpo, off_policy_mask_threshold", grpo | {"off_policy_mask_threshold": 0.05}, ours
    yield "grpo, sequence level (GSPO)", sequence, objective("gspo", **NARROW, **rows)
    ours = objective("ppo_clip", **CLIP, **CONSTANT, normalizer="B * T")
    yield "dr_grpo", grpo | {"loss_type": "dr_grpo"}, ours
    yield "dapo", grpo | {"loss_type": "dapo"}, objective("ppo_clip", **CLIP, **TOKEN)
    yield "bnpo", grpo | {"loss_type": "bnpo"}, objective("ppo_clip", **CLIP, **TOKEN)
    yield "cispo", cispo, objective("cispo", max_ratio=1.5, **TOKEN)
    yield "sapo", sapo, objective("sapo", **taus, **rows)
    yield "vespo", grpo | {"loss_type": "vespo", "args": vespo}, objective("vespo", **gamma, **TOKEN)
    yield "luspo, sequence level", sequence | {"loss_type": "luspo"}, objective("luspo", **NARROW, **rows)
    yield "GMPOTrainer", gmpo, objective("gmpo", mask="no_empty_mask", log_clip=0.4, **rows)

    grpo = {"call": "score", "trainer": "GRPOTrainer", "rewards": "abstaining", "num_generations": GROUP}
    advantage, abstaining = grpo | {"output": "advantages"}, ("abstaining", GROUP)
    for theirs, scale in (("group", "std"), ("batch", "batch"), ("none", "none")):
        ours = estimate(advantages.group_relative, abstaining, scale=scale, epsilon=1e-4)
        yield f"advantages, scale_rewards={theirs}, NaN rewards", advantage | {"scale_rewards": theirs}, ours
    by_function = advantage | {"rewards": "parts", "multi_objective_aggregation": "normalize_then_sum"}
    ours = estimate(advantages.gdpo, ("parts", GROUP, "part_weights"), epsilon=1e-4)
    yield "advantages, normalize_then_sum, NaN rewards", by_function | {"part_weights": "part_weights"}, ours
    ours = estimate(advantages.leave_one_out, abstaining)
    yield "RLOOTrainer: advantages, NaN rewards", advantage | {"trainer": "RLOOTrainer"}, ours
    names = ("old_logp", "sampler_logp", "mask")
    vllm = {"use_vllm": True, "vllm_importance_sampling_clip_max": 2.0, "output": "importance_sampling_ratio"}
    for mode, least in (("truncate", 0.0), ("mask", 0.5)):
        for scope in ("token", "sequence"):
            bounds = {"max_weight": 2.0, "min_weight": least}
            ours = estimate(corrections.importance_weights, names, mode=mode, scope=scope, **bounds)
            vllm |= {"vllm_importance_sampling_mode": f"{scope}_{mode}", "vllm_importance_sampling_clip_min": least}
            yield f"vLLM weights, {scope}_{mode}", grpo | vllm, ours


def tunix_cases():
    """(name of theirs, what the worker evaluates, ours)."""
    grpo = {"call": "loss", "kind": "grpo", "epsilon": 0.2, "epsilon_high": 0.28}
    grpo |= {"loss_agg_mode": "sequence-mean-token-mean"}
    gspo = grpo | {"loss_algo": "gspo-token", "epsilon": 0.04, "epsilon_high": 0.06}
    ppo = {"call": "loss", "kind": "ppo", "epsilon_low": 0.2, "epsilon_high": 0.28, **PER_TOKEN}
    dual = {"epsilon_c": 1.5}
    yield "grpo", grpo, objective("ppo_clip", **CLIP, **SEQUENCE)
    yield "grpo, epsilon_c", grpo | dual, objective("ppo_clip", **CLIP, dual_clip=1.5, **SEQUENCE)
    for theirs, kind in (("kl", "k1"), ("mse_kl", "k2"), ("low_var_kl", "k3")):
        ours = objective("ppo_clip", beta=0.2, kind=kind, **CLIP, **SEQUENCE)
        yield f"grpo, beta, {theirs}", grpo | {"beta": 0.2, "kl_loss_mode": theirs}, ours
    ours = objective("ppo_clip", weights="weights", **CLIP, **SEQUENCE)
    yield "grpo, sampler_is_weights", grpo | {"weights": "weights"}, ours
    scaled, summed = CONSTANT | {"normalizer": "rows * T"}, CONSTANT | {"normalizer": "rows"}
    sums = {"loss_agg_mode": "seq-mean-token-sum"}
    yield "grpo, token-mean", grpo | {"loss_agg_mode": "token-mean"}, objective("ppo_clip", **CLIP, **TOKEN)
    scale = grpo | {"loss_agg_mode": "sequence-mean-token-scale"}
    yield "grpo, sequence-mean-token-scale", scale, objective("ppo_clip", **CLIP, **scaled)
    yield "grpo, seq-mean-token-sum", grpo | sums, objective("ppo_clip", **CLIP, **summed)
    yield "gspo-token", gspo, objective("gspo", **NARROW, **SEQUENCE)
    ours = objective("gspo", **PER_TOKEN, **NARROW, **SEQUENCE)
    yield "gspo-token, advantage per token", gspo | PER_TOKEN, ours
    yield "gspo-token, seq-mean-token-sum", gspo | sums, objective("luspo", **NARROW, **SEQUENCE)
    yield "ppo", ppo, objective("ppo_clip", **PER_TOKEN, **CLIP, **TOKEN)
    yield "ppo, epsilon_c", ppo | dual, objective("ppo_clip", **PER_TOKEN, **CLIP, dual_clip=1.5, **TOKEN)
    yield "ppo, value loss", {"call": "value_loss", "clip_range_value": 0.2}, value_loss(clip=0.2, **TOKEN)

    group, rewards = {"call": "advantage", "rewards": "rewards", "num_generations": GROUP}, ("rewards", GROUP)
    yield "advantages, grpo", group | {"kind": "grpo"}, estimate(advantages.group_relative, rewards)
    ours = estimate(advantages.group_relative, rewards, scale="none")
    yield "advantages, drgrpo", group | {"kind": "drgrpo"}, ours
    yield "advantages, rloo", group | {"kind": "rloo"}, estimate(advantages.leave_one_out, rewards)
    gae = {"call": "advantage", "kind": "gae", "rewards": "token_rewards", "values": "values", "gamma": 0.99}
    gae |= {"completion_mask": "mask", "gae_lambda": 0.95}
    names, settings = ("token_rewards", "values", "mask"), {"discount": 0.99, "trace_decay": 0.95}
    yield "advantages, gae", gae | {"output": 0}, estimate(whitened_gae, names, "whiten(gae({}))", **settings)
    yield "returns, gae", gae | {"output": 1}, estimate(gae_plus_values, names, "gae({}) + values", **settings)
    ours = estimate(advantages.reinforce_pp, ("token_rewards", "mask"), discount=0.99)
    yield "advantages, gae without values", gae | {"output": 0, "values": "zeros", "gae_lambda": 1.0}, ours


def make_arrays(seed=0):
    """The inputs of both sides: float32, and 0/1 masks in int32."""
    rng, shape = np.random.default_rng(seed), (BATCH, TIME)
    x = {"logp": -rng.gamma(2.0, 0.5, shape)}
    # A shift common to each response spreads the sequence-level ratios too.
    shift = rng.normal(0, 0.05, (BATCH, 1))
    x["old_logp"] = np.minimum(x["logp"] + rng.normal(0, 0.4, shape) + shift, 0.0)
    x["ref_logp"] = x["logp"] + rng.normal(0, 0.5, shape)
    x["sampler_logp"] = x["old_logp"] + rng.normal(0, 0.3, shape)
    # More negative than positive: else losses cancel to near 0, where a relative difference says nothing.
    x["advantages"], x["token_advantages"] = rng.normal(-0.4, 1, BATCH), rng.normal(-0.4, 1, shape)
    x["weights"] = rng.uniform(0, 2, shape)
    x["rewards"] = rng.normal(size=BATCH)
    x["rewards"][GROUP : 2 * GROUP] = 0.5  # a group of equal rewards
    x["abstaining"] = x["rewards"].copy()
    x["abstaining"][[0, *range(2 * GROUP + 1, 3 * GROUP)]] = np.nan  # one of a group, and all but one of another
    x |= {name: rng.normal(size=shape) for name in ("token_rewards", "values", "returns")}
    x["old_values"], x["zeros"] = x["values"] + rng.normal(0, 0.3, shape), np.zeros(shape)
    x = {k: v.astype(np.float32) for k, v in x.items()}
    lengths = rng.integers(2, TIME + 1, BATCH)
    lengths[:3] = TIME, 1, 0
    first = np.arange(TIME) == 0
    x["mask"] = ((np.arange(TIME) < lengths[:, None]) & ((rng.random(shape) > 0.15) | first)).astype(np.int32)
    x["no_empty_mask"] = x["mask"] | first
    parts = rng.normal(size=(BATCH, 3)).astype(np.float32)
    parts[0], parts[5, 1], parts[8 : 8 + GROUP, 2] = (
        np.nan,
        np.nan,
        0.5,
    )  # no vote, two of three, a function that is flat
    return x | {"parts": parts, "part_weights": np.float32([1.0, 0.5, 2.0])}


def compare(package, python, x):
    """(versions, rows of the table) of one package: both names and the differences, None where one does not apply."""
    cases, rows = list({"trl": trl_cases, "tunix": tunix_cases}[package]()), []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("arrays.npz", "cases.json", "results.npz")]
        np.savez(paths[0], **x)
        paths[1].write_text(json.dumps([theirs for _, theirs, _ in cases]), encoding="utf-8")
        execute([python, REFERENCES / f"{package}_worker.py", *paths], f"evaluating {package}")
        with np.load(paths[2]) as stored:
            results = dict(stored)
    for i, (name, _, (label, evaluate)) in enumerate(cases):
        differences = dict.fromkeys(("value", "gradient", "array"))
        for part, ours in evaluate(x).items():
            ours, theirs = np.asarray(ours), results[f"{i}_{part}"]
            if part == "array" and ours.ndim == 2:  # what stands at masked positions has no meaning
                ours, theirs = (np.where(x["mask"], a, 0.0) for a in (ours, theirs))
            differences[part] = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
        rows.append([name, label, *differences.values()])
    return str(results["versions"]), rows


def table(rows, markdown):
    """The rows below their header, as aligned text or in Markdown."""
    lines = [["" if c is None else c if isinstance(c, str) else f"{c:.1e}" for c in row] for row in rows]
    if markdown:
        lines = [HEADER, ["---"] * len(HEADER), *([f"`{c}`" for c in line[:2]] + line[2:] for line in lines)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(HEADER, *lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in [HEADER, *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--only", choices=PINS, help="compare with this package only")
    for package in PINS:
        parser.add_argument(f"--{package}_python", help=f"an interpreter that has {package}; nothing is installed")
    flags = parser.parse_args()
    bullet, x, used, failed = "- " if flags.markdown else "  ", make_arrays(), set(), 0
    for package in [flags.only] if flags.only else PINS:
        try:
            versions, rows = compare(package, getattr(flags, f"{package}_python") or interpreter(package), x)
        except (CannotCompareError, EnvironmentFailedError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        used |= {label.partition("(")[0] for _, label, *_ in rows}
        failed += sum(not d <= TOLERANCE for row in rows for d in row[2:] if d is not None)  # a NaN fails too
        print(f"{versions}\n\n{table(rows, flags.markdown)}\n\nLeft out:\n")
        print("\n".join(bullet + line for line in LEFT_OUT[package]), end="\n\n")
    print(f"Objectives not compared: {', '.join(name for name in losses.names() if name not in used)}.")
    print(f"{failed or 'No'} relative differences (max |a - b| / max |b|) above {TOLERANCE:.0e}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
