"""Show what a finished run or sweep found, and write its report again from its files; or show runs in a browser.

    python -m experiments.report --workdir=runs/quickstart
    python -m experiments.report --workdir=runs --serve
    python -m experiments.report --workdir=runs/my_sweep --reference=ppo_clip

Of a sweep it writes WORKDIR/report.html, one page that needs no network, and its pictures in WORKDIR/report/
(docs/statistics.md). It takes seconds and trains nothing.

With --serve it writes nothing. It prints an address for browsers on this machine, where it makes the page of a run, finished or going
on, anew from its files whenever it is loaded; of a folder of runs there is a list first. Ctrl-C ends it.
"""

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.run import console, report
from r2vpo_jax.run.pages import server
from r2vpo_jax.sweeps import results, study, study_report

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of a run (also gs://BUCKET/NAME) or a sweep that has ended; with --serve also a folder of runs.",
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, f"Of a sweep: objective to compare with (default: {study_report.REFERENCE} where it has it)."
)
_TARGET = flags.DEFINE_float("target", results.TARGET, "Of a sweep: validation pass@1 whose rollouts are counted.")
_SERVE = flags.DEFINE_bool("serve", False, "Serve the pages of a run, or of all runs in a folder, to a browser here.")
_PORT = flags.DEFINE_integer("port", 8042, "For --serve: port of 127.0.0.1; 0: a free one.", 0, 65535)


def main():
    cli.require_flag(_WORKDIR, "runs/quickstart")
    with cli.usage_errors():
        if _SERVE.value:
            server.serve(_WORKDIR.value, _PORT.value, console.say)
        elif study.is_sweep(_WORKDIR.value):
            print(study_report.write(_WORKDIR.value, reference=_REFERENCE.value, target=_TARGET.value))
        else:
            print(report.rewrite(_WORKDIR.value))


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
