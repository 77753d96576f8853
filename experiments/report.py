"""Show the result of a finished run, and write its report again from its files.

python -m experiments.report --workdir=runs/quickstart
"""

from r2vpo_jax import cli

# isort: split
from absl import flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a finished run.")


def main():
    cli.require_flag(_WORKDIR, "runs/quickstart")
    from r2vpo_jax.run import report

    with cli.usage_errors():
        print(report.rewrite(_WORKDIR.value))


if __name__ == "__main__":
    cli.run(main)
