"""Sweep a grid of settings at paired seeds: a table, pictures, and results.parquet to ask more of.

    python -m experiments.sweep --config=experiments/configs/sweep_variance.py:smoke --workdir=runs/sweep

Runs that differ in numbers and seeds alone are trained side by side in one compiled program (mode fused), where the task
allows it; otherwise each is a run of the ordinary trainer (mode processes). Both leave the same results. The same command
continues a sweep that was stopped: fused after the last chunk of at most ten iterations, processes where each run was.

A run whose updates became non-finite has collapsed. It is a result, is counted apart from runs that failed otherwise, and
does not touch the others. With --retry_failed the same command tries those again that failed otherwise.

The grid is in the config file (docs/extending.md, "A grid of your own"); flags set its seeds,
--config.sweep.seeds="(0, 1)", and what all runs share, --config.base.trainer.num_iterations=20.
"""

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.sweeps.sweep import MODES, run_sweep

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the sweep: its runs, results.parquet, table.md, pictures. Default: runs/ and the name of the config file.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "auto",
    MODES,
    "fused: many runs at once in one program; processes: each by the ordinary trainer; auto: fused where all runs can be "
    "and --processes is not given.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Mode processes: runs at a time, which share the cores evenly (default 1, in this process)."
)
_RUNS_AT_ONCE = flags.DEFINE_integer(
    "runs_at_once", None, "Mode fused: runs in one program (default: as many as the device's memory holds)."
)

_RETRY_FAILED = flags.DEFINE_bool(
    "retry_failed", False, "Try the runs again that have failed (not those that collapsed), each from where it was."
)


def main():
    base, sweep = cli.resolve_sweep(_CONFIG)
    workdir = _WORKDIR.value or cli.directory_of(_CONFIG)
    cli.start_devices()
    table = run_sweep(
        base,
        sweep,
        workdir,
        mode=_MODE.value,
        processes=_PROCESSES.value,
        runs_at_once=_RUNS_AT_ONCE.value,
        all_cores=True,
        retry_failed=_RETRY_FAILED.value,
    )
    print(table)


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
