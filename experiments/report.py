"""Show what a finished run or sweep found, and write its report again from its files.

    python -m experiments.report --workdir=runs/quickstart
    python -m experiments.report --workdir=runs/my_sweep --reference=ppo_clip

Of a sweep it writes WORKDIR/report.html, one page that needs no network, and its pictures in WORKDIR/report/
(docs/statistics.md). It takes seconds and trains nothing.
"""

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.run import report
from r2vpo_jax.sweeps import results, study, study_report

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a finished run (also gs://BUCKET/NAME) or sweep.")
_REFERENCE = flags.DEFINE_string(
    "reference", None, f"Of a sweep: objective to compare with (default: {study_report.REFERENCE} where it has it)."
)
_TARGET = flags.DEFINE_float("target", results.TARGET, "Of a sweep: validation pass@1 whose rollouts are counted.")


def main():
    cli.require_flag(_WORKDIR, "runs/quickstart")
    with cli.usage_errors():
        if study.is_sweep(_WORKDIR.value):
            print(study_report.write(_WORKDIR.value, reference=_REFERENCE.value, target=_TARGET.value))
        else:
            print(report.rewrite(_WORKDIR.value))


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
