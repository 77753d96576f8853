"""A checkpoint of a run as a Hugging Face directory."""

import jax

from r2vpo_jax import sharding
from r2vpo_jax.errors import usage_errors
from r2vpo_jax.evaluation import model_source
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import directory, files


def export(run: str, checkpoint: str, output, *, dtype: str | None = None, say=print) -> None:
    """Write the weights of a checkpoint, with the tokenizer and generation settings of the run's base model.

    The last checkpoint of a finished run gives what is in its `hf/`. The run is only read: it may be going on.

    Args:
      run: its directory.
      checkpoint: an iteration, "last" or "best" (on the validation split).
      output: directory, made if needed.
      dtype: of the written weights, or "stored": that of the base model's; None: the run's model.export_dtype.
      say: where lines for people go.

    Raises:
      UsageError: there is no such checkpoint, or it is torn; the base model is gone or another one; `output` holds something already, or
        cannot be written; a weight is not finite in this dtype.
    """
    chief = jax.process_index() == 0
    output = directory.folder(output, "--output")
    with usage_errors(), directory.resolving(run):
        source = model_source.find(run, checkpoint)
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"--output={output} is not empty; choose another directory")
        base = open_base_model(source.run.model)
        params = source.load_params(base, sharding.make_mesh((1, -1, 1)))
        with files.disk_errors(f"--output={output}"):
            unchanged = base.export(output, params, dtype=dtype or source.run.model.export_dtype, write=chief)
    if chief:
        for notice in base.notices:
            say(notice)
        say(
            f"written: {output}, iteration {source.iteration} of {run}; {100 * unchanged:.2f} % of the weights are those of "
            "the base model, bit for bit"
        )
