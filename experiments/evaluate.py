"""Score a model on benchmarks: avg@k, unbiased pass@k, maj@k and greedy, with intervals, by benchmark and level.

    python -m experiments.evaluate --tasks=arithmetic,chain_sum,word_problems --k=16 --output=runs/eval

The same command continues an evaluation that was stopped; a finished one shows its tables. See docs/evaluation.md.
"""

import dataclasses
import typing

from r2vpo_jax import cli

# isort: split
from absl import flags

from r2vpo_jax.config.evaluation import EvaluationConfig

_OUTPUT = flags.DEFINE_string(
    "output", "runs/evaluation", "Directory of this evaluation: outcomes, evaluation.json, evaluation.md."
)
_DEFINE = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}


def _define_flags(cls) -> dict[str, flags.FlagHolder]:
    """One flag a field of a dataclass."""
    hints = typing.get_type_hints(cls)
    kinds = {name: next(k for k in (*typing.get_args(hint), hint) if k in _DEFINE) for name, hint in hints.items()}
    return {f.name: _DEFINE[kinds[f.name]](f.name, f.default, f.metadata["help"]) for f in dataclasses.fields(cls)}


_CONFIG = _define_flags(EvaluationConfig)


def main():
    cli.require_flag(_CONFIG["tasks"], "arithmetic,word_problems")
    cli.require_flag(_OUTPUT, "runs/eval")
    with cli.usage_errors():
        config = EvaluationConfig(**{name: flag.value for name, flag in _CONFIG.items()})
    cli.start_devices()
    from r2vpo_jax.evaluation import benchmarks

    benchmarks.run(config, _OUTPUT.value)


if __name__ == "__main__":
    cli.run(main)
