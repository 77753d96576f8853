"""Write a checkpoint of a run as a Hugging Face directory, for Transformers, vLLM and others.

    python -m experiments.export --model=runs/arithmetic --checkpoint=best --output=exports/arithmetic_best

Adapters (model.lora.rank) are merged into the weights; with --adapters they are written alone, as a directory for PEFT.

The run may have finished, have been stopped, or be going on. What a finished run has in hf/ is its last iteration.
"""

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.errors import UsageError
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
_ADAPTERS = flags.DEFINE_bool("adapters", False, "write the adapters alone, in their own dtype, as a PEFT directory")


def main():
    cli.require_flag(_MODEL, "runs/arithmetic")
    cli.require_flag(_OUTPUT, "exports/arithmetic")
    if _ADAPTERS.value and _DTYPE.value:
        raise UsageError("--dtype is of whole weights; with --adapters these have the dtype that they were trained in")
    cli.start_devices({"checkpoint": _CHECKPOINT.value, "dtype": _DTYPE.value, "adapters": _ADAPTERS.value})
    exports.export(_MODEL.value, _CHECKPOINT.value, _OUTPUT.value, dtype=_DTYPE.value, adapters=_ADAPTERS.value)


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
