"""Sweep the variance coefficient, the variance budget and the clip, at paired seeds.

    python -m experiments.sweep --config=experiments/configs/sweep_variance.py:smoke --workdir=runs/sweep

The same command continues a sweep that was stopped. Fields: --config.sweep.seeds="(0, 1)", --config.base....
"""

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.training import sweeps

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the sweep: its runs, table.md, sweep.png. Default: runs/ and the name of the config file.",
)


def main():
    base, sweep = cli.resolve_sweep(_CONFIG)
    workdir = _WORKDIR.value or cli.directory_of(_CONFIG)
    cli.start_devices()
    print(sweeps.table(sweeps.run_sweep(base, sweep, workdir)))


if __name__ == "__main__":
    cli.run(main)
