"""How far scores are from what the sampler recorded, with unchanged weights, by dtype and by switch; and what each costs.

Random weights in the shape of `cpu-reference`, with other vocabularies and lengths. The floor is E[(r-1)^2] over all response
tokens, by the sampler and the learner's scores of a run. Costs are ratios to plain bfloat16, of calls in turn.
"""

import dataclasses
import statistics
import time

import jax
import numpy as np

from benchmarks import workloads
from benchmarks.programs import Programs
from r2vpo_jax import sharding
from r2vpo_jax.config.run import FLOAT32_SWITCHES
from r2vpo_jax.training import noise_floor
from r2vpo_jax.training.learner import Learner

_RESIDUAL, _SCORES, _LOGITS = FLOAT32_SWITCHES
WAYS = {
    "bfloat16": (),
    **{name: (name,) for name in FLOAT32_SWITCHES},
    "residual, scores": (_RESIDUAL, _SCORES),
    "all three": (_RESIDUAL, _SCORES, _LOGITS),
    "float32": None,
}


class _Way(Programs):
    """The programs of one dtype and its switches."""

    def __init__(self, workload: workloads.Workload, switches: tuple[str, ...] | None):
        workload = dataclasses.replace(workload, compute_dtype="float32" if switches is None else "bfloat16")
        super().__init__(workload, Learner, [(f"model.{name}", True) for name in switches or ()])
        self.steps = {"update": self._update()[0], "decode": self._rollout()[0]}

    def floor(self) -> tuple[float, float]:
        """As a run measures it: float32 masters score what their copy in the compute dtype has sampled."""
        learner, params = self._learner(), self._params()
        rollout = self._generate(self._params(self.model.config.compute_dtype))
        logp = sharding.to_host(learner.score(params, sharding.put_batch(rollout, self.mesh)))
        return noise_floor.measure(logp, rollout)


def add_arguments(parser) -> None:
    integers = {"type": lambda text: [int(part) for part in text.split(",")], "metavar": "N,N,…"}
    parser.add_argument("--vocab_sizes", **integers, default=[512, 8192], help="(default: 512,8192)")
    parser.add_argument("--lengths", **integers, default=[64, 256], help="tokens of a response (default: 64,256)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls, after a first one (default: 5)")


def run(arguments) -> None:
    """Prints the table, in Markdown, a line as soon as it is known."""
    print(
        f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; prompts of {workloads.CPU_REFERENCE.prompt_size} tokens"
    )
    print("\n| vocabulary | tokens | computed in | E[(r-1)^2] | largest abs(log r) | update | decoding |")
    print("|---|---|---|---|---|---|---|")
    for vocab_size in arguments.vocab_sizes:
        for length in arguments.lengths:
            _shape(vocab_size, length, arguments.rounds)


def _shape(vocab_size: int, length: int, rounds: int) -> None:
    workload = dataclasses.replace(
        workloads.CPU_REFERENCE,
        vocab_size=vocab_size,
        response_size=length,
        num_prompts=8,
        group_size=4,
        prompts_at_once=8,
        update_rows=32,
    )
    ways = {name: _Way(workload, switches) for name, switches in WAYS.items()}
    seconds: dict = {name: {program: [] for program in way.steps} for name, way in ways.items()}
    for number in range(rounds + 1):
        for name, way in ways.items():
            for program, step in way.steps.items():
                start = time.perf_counter()
                step()
                if number > 0:
                    seconds[name][program].append(time.perf_counter() - start)
    plain = seconds["bfloat16"]
    for name, way in ways.items():
        floor, largest = way.floor()
        costs = [
            statistics.median(np.divide(seconds[name][program], plain[program])) for program in ("update", "decode")
        ]
        texts = " | ".join(f"{cost:.2f}" for cost in costs)
        print(f"| {vocab_size} | {length} | {name} | {floor:.1e} | {largest:.1e} | {texts} |", flush=True)
