"""A checkpoint of a run as a Hugging Face directory."""

import jax

from r2vpo_jax import sharding
from r2vpo_jax.errors import usage_errors
from r2vpo_jax.evaluation import model_source
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import directory, files


def export(run: str, checkpoint: str, output, *, dtype: str | None = None, adapters: bool = False, say=print) -> None:
    """Write the weights of a checkpoint, with the tokenizer and generation settings of the run's base model.

    Adapters are merged into the weights.

    The last checkpoint of a finished run gives what is in its `hf/`. The run is only read: it may be going on.

    Args:
      run: its directory.
      checkpoint: an iteration, "last" or "best" (on the validation split).
      output: directory, made if needed.
      dtype: of the written weights, or "stored": that of the base model's; None: the run's model.export_dtype.
      adapters: write these alone, as a PEFT directory.
      say: where lines for people go.

    Raises:
      UsageError: there is no such checkpoint, or it is torn; the base model is gone or another one; `output` holds something already, or
        cannot be written; a weight is not finite in this dtype; adapters are wanted, and the run has none.
    """
    chief = jax.process_index() == 0
    output = directory.folder(output, "--output")
    with usage_errors(), directory.resolving(run):
        source = model_source.find(run, checkpoint)
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"--output={output} is not empty; choose another directory")
        if adapters and not source.run.model.lora.rank:
            raise ValueError(f"{run} has no adapters: it was trained without model.lora.rank")
        base = open_base_model(source.run.model)
        params = source.load_params(base, sharding.make_mesh((1, -1, 1)))
        with files.disk_errors(f"--output={output}"):
            if adapters:
                base.export_adapters(output, params, write=chief)
                what = f"the adapters alone, for {base.path}"
            else:
                unchanged = base.export(output, params, dtype=dtype or source.run.model.export_dtype, write=chief)
                what = (
                    f"{100 * unchanged:.2f} % of the weights are those of the base model, bit for bit" if chief else ""
                )
    if chief:
        for notice in base.notices:
            say(notice)
        say(f"written: {output}, iteration {source.iteration} of {run}; {what}")
