"""Score a model on benchmarks: pass@1 over k samples, unbiased pass@k, maj@k and greedy, with intervals and by level.

    python -m experiments.evaluate --tasks=arithmetic,chain_sum,word_problems --k=16 --output=runs/eval
    python -m experiments.evaluate --model=runs/arithmetic --output=runs/eval_arithmetic      # as the run was trained

The same command continues an evaluation that was stopped; a finished one shows its tables. See docs/evaluation.md.
"""

from absl import flags

from r2vpo_jax import cli, config
from r2vpo_jax.config.evaluation import RENAMED_FLAGS, flag_sections
from r2vpo_jax.evaluation import benchmarks, settings

_OUTPUT = flags.DEFINE_string("output", "runs/evaluation", "Directory of this evaluation: outcomes and tables.")
_FLAGS = (
    flags.DEFINE_string("model", None, "Hugging Face or run directory, or shipped model. Default: arithmetic_base."),
    flags.DEFINE_string(
        "checkpoint", None, "Checkpoint of a run: an iteration, latest or best. Default: hf/, or latest."
    ),
    flags.DEFINE_string("tasks", None, "Benchmarks with commas between them. Default, for a run: its own test split."),
    flags.DEFINE_integer("num_problems", None, "Problems per benchmark. Default: all; 256 of an endless source."),
    flags.DEFINE_integer("k", 16, "Samples per problem."),
    flags.DEFINE_bool("greedy", True, "Also draw one sample per problem at temperature 0."),
    flags.DEFINE_integer("seed", 0, "Seed of the samples."),
    flags.DEFINE_integer("texts", 1, "Responses per problem whose text is kept in outcomes.jsonl."),
)
_SECTIONS = cli.define_sections(flag_sections(), RENAMED_FLAGS)


def main():
    cli.require_flag(_OUTPUT, "runs/eval")
    values = {flag.name: flag.value for flag in _FLAGS}
    chosen = settings.resolve(**values, sections=_SECTIONS.value.to_dict())
    cli.show_if_asked(
        lambda: config.describe(
            chosen, settings.resolve(**values), "differs from the run, or from the default without one"
        )
    )
    cli.start_devices()
    benchmarks.run(chosen, _OUTPUT.value)


if __name__ == "__main__":
    cli.run(main)
