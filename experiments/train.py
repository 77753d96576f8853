"""Fine-tune a language model by reinforcement learning with verifiable rewards.

    python -m experiments.train --config=experiments/configs/arithmetic.py --workdir=runs/arithmetic

The same command continues a run that was stopped; a finished run shows its result.
"""

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.training import trainer

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Run directory: metrics, checkpoints, report, exported model; on a disk, or gs://BUCKET/NAME (docs/stores.md). Default: runs/ and "
    "the name of the config file.",
)
_STOP_AFTER = flags.DEFINE_integer("stop_after_iteration", None, "Save and stop there; the same command goes on.")
_PROFILE = flags.DEFINE_string("profile_steps", None, "first:last iterations to profile, for example 5:7.")


def main():
    config = cli.resolve(_CONFIG)
    workdir = _WORKDIR.value or cli.directory_of(_CONFIG)
    profile = cli.parse_range("profile_steps", _PROFILE.value)
    cli.start_devices(
        cli.settings_to_compare(config, stop_after_iteration=_STOP_AFTER.value, profile_steps=_PROFILE.value)
    )
    trainer.train(config, workdir, stop_after_iteration=_STOP_AFTER.value, profile_steps=profile)


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
