"""Write a checkpoint of a run as a Hugging Face directory, for Transformers, vLLM and others.

    python -m experiments.export --model=runs/arithmetic --checkpoint=best --output=exports/arithmetic_best

The run may have finished, have been stopped, or be going on. What a finished run has in hf/ is its last iteration.
"""

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.evaluation import exports

_MODEL = flags.DEFINE_string("model", None, "Run directory, or gs://BUCKET/NAME.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "An iteration, last, or best (by validation score).")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write, or gs://BUCKET/NAME: a new or an empty one.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["stored", "float32", "bfloat16", "float16"],
    "dtype of the weights; stored: the base model's (default: as the run has it in model.export_dtype)",
)


def main():
    cli.require_flag(_MODEL, "runs/arithmetic")
    cli.require_flag(_OUTPUT, "exports/arithmetic")
    cli.start_devices({"checkpoint": _CHECKPOINT.value, "dtype": _DTYPE.value})
    exports.export(_MODEL.value, _CHECKPOINT.value, _OUTPUT.value, dtype=_DTYPE.value)


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
