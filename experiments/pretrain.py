"""Make the base model of a task: supervised learning on an imperfect demonstrator.

    python -m experiments.pretrain --output=runs/base
    python -m experiments.pretrain --task=word_problems --output=runs/words

The shipped checkpoints were made by the code behind these commands, with its defaults.
"""

import dataclasses

from r2vpo_jax import cli

# isort: split
from absl import flags

_TASK = flags.DEFINE_enum("task", "arithmetic", ["arithmetic", "word_problems"], "What the model is to learn.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write, in Hugging Face format.")
_STEPS = flags.DEFINE_integer("num_steps", None, "Optimizer steps (default: those of the shipped checkpoint).")
_BATCH = flags.DEFINE_integer("batch_size", None, "Demonstrations a step.")
_HIDDEN = flags.DEFINE_integer("hidden_size", None, "Width.")
_LAYERS = flags.DEFINE_integer("num_layers", None, "Depth.")
_FORGET = flags.DEFINE_float("forget_carry", None, "Arithmetic: probability that the demonstrator forgets a carry.")
_MISREAD = flags.DEFINE_float("misread", None, "Word problems: probability that it falls for a word.")
_SLIP = flags.DEFINE_float("slip", None, "Probability that the demonstrator gets a hard fact wrong.")
_SEED = flags.DEFINE_integer("seed", 0, "Initial weights and demonstrations.")


def main():
    cli.require_flag(_OUTPUT, "runs/base")
    cli.start_devices()
    from experiments.base_models import pretraining

    chosen = {f.name: f.value for f in (_STEPS, _BATCH, _HIDDEN, _LAYERS, _FORGET, _MISREAD, _SLIP, _SEED)}
    with cli.usage_errors():
        config = dataclasses.replace(
            pretraining.CONFIGS[_TASK.value], **{k: v for k, v in chosen.items() if v is not None}
        )
    pretraining.make_checkpoint(
        _OUTPUT.value,
        _TASK.value,
        config,
        report=lambda step, loss: print(f"step {step}/{config.num_steps}  loss {loss:.4f}", flush=True),
    )
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
