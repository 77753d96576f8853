"""Score a model on benchmarks: pass@1 over k samples, unbiased pass@k, maj@k and greedy, with intervals and by level.

    python -m experiments.evaluate --tasks=arithmetic,chain_sum,word_problems --k=16 --output=runs/eval
    python -m experiments.evaluate --model=runs/arithmetic --output=runs/eval_arithmetic      # as the run was trained

The same command continues an evaluation that was stopped; a finished one shows its tables. See docs/evaluation.md.
"""

from absl import flags

from r2vpo_jax import cli, config
from r2vpo_jax.config.evaluation import RENAMED_FLAGS, EvaluationConfig, flag_sections
from r2vpo_jax.evaluation import benchmarks, settings
from r2vpo_jax.run import directory


def _field(define, name: str) -> flags.FlagHolder:
    """The flag of a field of the configuration."""
    field = EvaluationConfig.__dataclass_fields__[name]
    return define(name, field.default, field.metadata["help"])


_OUTPUT = flags.DEFINE_string(
    "output", "runs/evaluation", "directory of this evaluation, or gs://BUCKET/NAME: outcomes and tables"
)
_WHAT = (
    flags.DEFINE_string(
        "model",
        None,
        "Hugging Face directory or hf://OWNER/NAME@REVISION, run directory, or shipped model (default: arithmetic_base)",
    ),
    flags.DEFINE_string(
        "tasks", None, "benchmarks, with commas between them (default, for a run directory: the run's own test split)"
    ),
    _field(flags.DEFINE_string, "checkpoint"),
)
_HOW = (
    _field(flags.DEFINE_integer, "num_problems"),
    _field(flags.DEFINE_integer, "k"),
    _field(flags.DEFINE_bool, "greedy"),
    _field(flags.DEFINE_integer, "seed"),
    _field(flags.DEFINE_integer, "texts"),
)
_SECTIONS = cli.define_sections(flag_sections(), RENAMED_FLAGS)


def main():
    cli.require_flag(_OUTPUT, "runs/eval")
    what, how = ({flag.name: flag.value for flag in group} for group in (_WHAT, _HOW))
    with directory.resolving(_OUTPUT.value, what["model"]):
        chosen = settings.resolve(**what, **how, sections=_SECTIONS.value.to_dict())
        mark = "differs from the run, or from the default where there is no run"
        cli.show_if_asked(lambda: config.describe(chosen, settings.resolve(**what), mark))
        cli.start_devices(cli.settings_to_compare(chosen))
        benchmarks.run(chosen, _OUTPUT.value)


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
