"""Make the base model of the arithmetic task: supervised learning on an imperfect demonstrator.

    python -m experiments.pretrain --output=runs/base

The shipped checkpoint was made by the code behind this command, with its defaults.
"""

from r2vpo_jax import cli

# isort: split
from absl import flags

_OUTPUT = flags.DEFINE_string("output", None, "Directory to write, in Hugging Face format.")
_STEPS = flags.DEFINE_integer("num_steps", None, "Optimizer steps (default: those of the shipped checkpoint).")
_BATCH = flags.DEFINE_integer("batch_size", None, "Demonstrations a step.")
_HIDDEN = flags.DEFINE_integer("hidden_size", None, "Width.")
_LAYERS = flags.DEFINE_integer("num_layers", None, "Depth.")
_FORGET = flags.DEFINE_float("forget_carry", None, "Probability that the demonstrator forgets a carry.")
_SLIP = flags.DEFINE_float("slip", None, "Probability that the demonstrator gets a hard fact wrong.")
_SEED = flags.DEFINE_integer("seed", 0, "Initial weights and demonstrations.")


def main():
    cli.require(_OUTPUT, "runs/base")
    cli.start_devices()
    from r2vpo_jax import models, pretraining
    from r2vpo_jax.tasks import arithmetic

    chosen = {f.name: f.value for f in (_STEPS, _BATCH, _HIDDEN, _LAYERS, _FORGET, _SLIP, _SEED)}
    with cli.usage_errors():
        config = pretraining.PretrainConfig(**{k: v for k, v in chosen.items() if v is not None})
    tokenizer = arithmetic.make_tokenizer()
    model, params = pretraining.pretrain(
        config,
        arithmetic.ArithmeticTask(),
        len(tokenizer),
        report=lambda step, loss: print(f"step {step}/{config.num_steps}  loss {loss:.4f}", flush=True),
    )
    models.save_pretrained(_OUTPUT.value, model, params, tokenizer)
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
