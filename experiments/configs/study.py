"""Ratio-variance control against clipping, one axis at a time (docs/results/protocol.md says what is asked and how).

    python -m experiments.sweep --config=experiments/configs/study.py:tune,eureka
    python -m experiments.sweep --config=experiments/configs/study.py:headline,eureka
    python -m experiments.sweep --config=experiments/configs/study.py:lag          # or another of AXES
    python -m experiments.sweep --config=experiments/configs/study.py:lag,smoke    # the same in minutes

Each run is small: 40 iterations of 8 problems x 8 responses, 16 updates an iteration unless the axis says otherwise.
"""

import json
import pathlib

from ml_collections import config_dict

from r2vpo_jax import config
from r2vpo_jax.config import grid

TASKS = {
    "eureka": {"task": {"name": "eureka"}, "model": {"path": "eureka_base"}},
    "countdown": {"task": {"name": "countdown"}, "model": {"path": "countdown_base"}},
    "arithmetic": {"task": {"arithmetic": {"max_operands": 2}}, "model": {"path": "arithmetic_base"}},
    "long": {
        "task": {"arithmetic": {"min_operands": 8, "max_operands": 8, "num_digits": 3}},
        "model": {"path": "long_arithmetic_base"},
    },
}
AXES = (
    "tune", "headline", "tune_again", "again", "tune_stale", "stale", "tune_decoupled", "decoupled", "penalties", "lag",
    "updates", "rate", "rarity", "precision", "length",
)  # fmt: skip
RATES = (3e-4, 1e-3)  # every method is tuned with both
TUNED = pathlib.Path(__file__).with_name("study_tuned.json")

_CLIP = ("objective.loss.options.clip_low", "objective.loss.options.clip_high")
_TV = ("objective.loss.options.divergence_low", "objective.loss.options.divergence_high")
_BUDGETS = ("objective.dual.budget", (0.003, 0.01, 0.03, 0.1, 0.3))
# All methods have one reduction and one scale of the advantages, whatever their presets have.
_TOKEN_MEAN = {"objective.loss.reduction": "token_mean", "objective.advantage.scale": "std"}


def _penalty(weight="none", factor=1.0):
    return {
        "objective.name": "r2vpo",
        "objective.loss.options.penalty_weight": weight,
        "objective.loss.options.negative_factor": factor,
    }


# name -> (what makes it, the path or paths of its own coefficient, five values of it)
METHODS = {
    "r2vpo": (_penalty(), *_BUDGETS),
    "r2vpo_A": (_penalty("advantage"), *_BUDGETS),
    "r2vpo_mu": (_penalty("probability"), *_BUDGETS),
    "r2vpo_A_mu": (_penalty("both"), *_BUDGETS),
    "r2vpo_asymmetric": (_penalty(factor=4.0), *_BUDGETS),
    "r2vpo_fixed": ({"objective.name": "r2vpo_fixed"}, "objective.dual.coef", (0.02, 0.1, 0.5, 2.5, 12.5)),
    "ppo_clip": ({"objective.name": "ppo_clip"}, _CLIP, (0.05, 0.1, 0.2, 0.4, 0.8)),
    "dapo": (
        {"objective.name": "ppo_clip", "objective.loss.options.clip_low": 0.2},
        "objective.loss.options.clip_high",
        (0.28, 0.5, 1.0, 2.0, 4.0),
    ),
    "cispo": ({"objective.name": "cispo"}, "objective.loss.options.max_ratio", (1.05, 1.2, 1.5, 2.0, 5.0)),
    "gppo": (
        {
            "objective.name": "gppo",
            "objective.loss.imitation_coef": 0.0,
            "objective.loss.options.dual_clip": 3.0,
        },
        _CLIP,
        (0.05, 0.1, 0.2, 0.4, 0.8),
    ),
    "spo": ({"objective.name": "spo"}, "objective.loss.options.epsilon", (0.1, 0.2, 0.4, 0.8, 1.6)),
    "drpo": (
        {"objective.name": "drpo"} | _TOKEN_MEAN,
        "objective.loss.options.epsilon",
        (0.1, 0.5, 2.5, 12.5, 50.0),
    ),
    "dppo_tv": (
        {"objective.name": "dppo_tv", "objective.loss.options.max_ratio": 20.0} | _TOKEN_MEAN,
        _TV,
        (0.05, 0.15, 0.4, 0.6, 0.8),
    ),
    "sapo": (
        {"objective.name": "sapo", "objective.loss.reduction": "token_mean"},
        ("objective.loss.options.tau_positive", "objective.loss.options.tau_negative"),
        (0.25, 0.5, 1.0, 2.0, 4.0),
    ),
    "m2po": ({"objective.name": "m2po"}, "objective.loss.options.budget", (0.001, 0.003, 0.01, 0.04, 0.16)),
    "grpo": ({"objective.name": "grpo"}, _CLIP, (0.05, 0.1, 0.2, 0.4, 0.8)),
    # Without a trust region the step is all there is: ten learning rates, of which the smaller ones stand for "just a smaller step".
    "none": (
        {"objective.name": "policy_gradient"},
        "optimizer.learning_rate",
        (3e-5, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 8e-4, 1e-3, 1.5e-3),
    ),
}
MAIN = ("r2vpo", "r2vpo_fixed", "r2vpo_A_mu", "ppo_clip", "cispo", "spo", "none")
_FEW = {"arithmetic": ("r2vpo", "r2vpo_fixed", "ppo_clip", "none")}  # its runs take three times as long
AGAIN = (*MAIN, "dapo", "grpo", "dppo_tv")
STALE = {
    "stale": grid.values("replay.lag", 8),
    "decoupled": ({"replay.lag": 8, "objective.correction.mode": "truncate"},),
}


def main_methods(task: str) -> tuple[str, ...]:
    """The methods that are compared on a task; also by its name in study_tuned.json, such as eureka_again."""
    return _FEW.get(task.partition("_")[0], MAIN)


def _chosen(task: str) -> dict:
    """What was chosen in a tuning sweep."""
    there = json.loads(TUNED.read_text())
    if task not in there:
        raise ValueError(f"study.py: {TUNED.name} has no {task}: make its tuning sweep and call scripts.choose_trials")
    return there[task]


def _method(name: str, value, rate: float) -> grid.Grid:
    made, path, _ = METHODS[name]
    cell = dict(made) | {"optimizer.learning_rate": rate}
    return ({**cell, **dict.fromkeys(path if isinstance(path, tuple) else (path,), value)},)


def trials(task: str) -> list[tuple]:
    """(method, value of its coefficient, learning rate) of each cell of the tuning sweep of a task; ten of each method."""
    if task.endswith("_again"):
        return [trial for name in AGAIN for trial in best_trials(task.removesuffix("_again"), name)]
    found = []
    for name in METHODS if task == "eureka" else main_methods(task):
        _, path, values = METHODS[name]
        rates_too = path != "optimizer.learning_rate"
        found += [(name, value, rate) for value in values for rate in (RATES if rates_too else (value,))]
    return found


def best_trials(task: str, name: str, number: int = 3) -> list[tuple]:
    """(method, value of its coefficient, learning rate) of its first trials by validation."""
    trials = sorted(_chosen(task)[name]["trials"], key=lambda trial: -trial["score"])
    return [(name, trial["value"], trial["rate"]) for trial in trials[:number]]


def _tuned(task: str, names=None, rate: float = 1.0) -> grid.Grid:
    """The best trial of each method on the task, at a multiple of its learning rate."""
    best = _chosen(task)
    cells = []
    for name in names or main_methods(task):
        (cell,) = _method(name, best[name]["value"], best[name]["rate"])
        cells.append((cell | {"optimizer.learning_rate": cell["optimizer.learning_rate"] * rate},))
    return grid.chain(*cells)


def _updates(minibatches: int, epochs: int) -> dict:
    return {"trainer.num_minibatches": minibatches, "trainer.num_epochs": epochs}


def _axis(axis: str, task: str) -> tuple[grid.Grid, range]:
    """(cells, seeds)."""
    fresh = range(100, 108)
    match axis:
        case "tune":
            return grid.chain(*(_method(*trial) for trial in trials(task))), range(3)
        case "headline":
            return grid.product(_tuned(task), grid.values("replay.lag", 0, 8)), range(100, 120)
        case "tune_again":
            return grid.chain(*(_method(*trial) for trial in trials(f"{task}_again"))), range(10, 18)
        case "again":
            return _tuned(f"{task}_again", AGAIN), range(200, 220)
        case "tune_stale" | "tune_decoupled":
            form = axis.removeprefix("tune_")
            tried = grid.chain(*(_method(*trial) for trial in trials(f"{task}_{form}")))
            return grid.product(tried, STALE[form]), range(3)
        case "stale" | "decoupled":
            return grid.product(_tuned(f"{task}_{axis}"), STALE[axis]), range(100, 120)
        case "penalties":
            return _tuned(task, [name for name in METHODS if name not in MAIN]), fresh
        case "lag":
            return grid.product(_tuned(f"{task}_again"), grid.values("replay.lag", 0, 4, 16, 64)), fresh
        case "updates":
            levels = tuple(_updates(*split) for split in ((1, 1), (4, 1), (4, 4), (8, 8)))
            return grid.product(_tuned(f"{task}_again"), levels), fresh
        case "rate":
            return grid.chain(*(_tuned(f"{task}_again", rate=times) for times in (1, 3, 10))), fresh
        case "rarity":
            return grid.product(_tuned(f"{task}_again"), grid.values("task.options.needed", 2, 3, 4)), fresh
        case "precision":
            return grid.product(
                _tuned(f"{task}_again"), grid.values("sampler.weights", "compute", "bfloat16", "int8")
            ), fresh
        case "length":
            return _tuned("arithmetic"), fresh
    raise ValueError(f"study.py:{axis}: the axes are {', '.join(AXES)}")


def get_config(choice: str = "headline,eureka"):
    axis, *words = choice.split(",")
    smoke = "smoke" in words
    task = next((word for word in words if word in TASKS), "long" if axis == "length" else "eureka")
    if unknown := set(words) - {"smoke", task}:
        raise ValueError(f"study.py:{choice}: {unknown.pop()!r} is none of smoke, {', '.join(TASKS)}")
    cells, seeds = _axis(axis, task)
    base = config.make(
        **TASKS[task],
        objective={"groups": {"overlong_penalty": 0.0}, "dual": {"coef": 1.0}},
        sampler={"group_size": 8},
        optimizer={"max_grad_norm": 1.0},
        evaluation={"batch_size": 1024},
        trainer={
            "num_iterations": 40,
            "prompts_per_rollout": 8,
            "num_minibatches": 4,
            "num_epochs": 4,
            "micro_batch_size": 8 if axis == "updates" else 16,
            "eval_every": 5,
            "eval_problems": 128,
            "eval_samples": 2,
            "test_problems": 256,
            "test_samples": 4,
            # Rounded weights are one of the axes; what they add to V is measured there.
            "max_noise_floor": 1e9,
            "allow_single_update": axis == "updates",  # there all methods are one: a check
        },
    )
    if smoke:
        base.trainer.update(num_iterations=2, eval_every=2, eval_problems=32, test_problems=32)
        seeds = seeds[:1]
    # The queue fills for as many iterations as it is long: that many more are made.
    for cell in cells:
        if cell.get("replay.lag"):
            cell["trainer.num_iterations"] = base.trainer.num_iterations + cell["replay.lag"]
    return config_dict.ConfigDict(
        {"base": base, "sweep": config.to_config_dict(config.SweepConfig(cells=cells, seeds=seeds))}
    )
