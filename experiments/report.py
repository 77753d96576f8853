"""Show the result of a finished run, and write its report again from its files.

    python -m experiments.report --workdir=runs/quickstart

It takes seconds and trains nothing.
"""

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.run import report

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a finished run.")


def main():
    cli.require_flag(_WORKDIR, "runs/quickstart")
    with cli.usage_errors():
        print(report.rewrite(_WORKDIR.value))


if __name__ == "__main__":
    cli.run(main)
