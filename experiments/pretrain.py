"""Make what ships: the base model of a task, and the data set of word problems.

    python -m experiments.pretrain --output=runs/base                                    # arithmetic_base
    python -m experiments.pretrain --task=countdown --output=runs/countdown              # countdown_base; likewise eureka,
                                                                                         # long_arithmetic
    python -m experiments.pretrain --task=word_problems --output=runs/words              # word_problems_base
    python -m experiments.pretrain --task=word_problems --data_output=runs/word_problems # its train.jsonl and test.jsonl

A base model learns from an imperfect demonstrator, by supervised learning: a few minutes on two CPU cores. The data set is
written in a second.
"""

import dataclasses

from absl import flags

from r2vpo_jax import cli
from r2vpo_jax.run import directory

from .base_models import pretraining, word_problems

_TASK = flags.DEFINE_enum("task", "arithmetic", list(pretraining.CONFIGS), "What the model is to learn.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the model, in Hugging Face format.")
_DATA_OUTPUT = flags.DEFINE_string("data_output", None, "Word problems: directory for train.jsonl and test.jsonl.")
_STEPS = flags.DEFINE_integer("num_steps", None, "Optimizer steps (default: those of the shipped checkpoint).")
_BATCH = flags.DEFINE_integer("batch_size", None, "Demonstrations per step.")
_HIDDEN = flags.DEFINE_integer("hidden_size", None, "Width of the model.")
_LAYERS = flags.DEFINE_integer("num_layers", None, "Number of layers.")
_FORGET = flags.DEFINE_float("forget_carry", None, "Arithmetic: probability that the demonstrator forgets a carry.")
_MISREAD = flags.DEFINE_float("misread", None, "Word problems: probability that the demonstrator misreads a word.")
_GUESS = flags.DEFINE_float("guess", None, "Countdown: probability that the demonstrator does not look for an answer.")
_TURN = flags.DEFINE_float("turn", None, "Eureka: probability that the demonstrator turns a digit over.")
_SLIP = flags.DEFINE_float("slip", None, "Probability that the demonstrator gets a hard fact wrong.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial weights and the demonstrations.")


def main():
    for flag in (_OUTPUT, _DATA_OUTPUT):
        if flag.value:
            directory.folder(flag.value, f"--{flag.name}", store=False)
    if _DATA_OUTPUT.value:
        if _TASK.value != "word_problems":
            raise cli.UsageError("--data_output is for --task=word_problems: the others have no data set")
        word_problems.write_word_problems(_DATA_OUTPUT.value)
        print(f"wrote {_DATA_OUTPUT.value}")
        if not _OUTPUT.value:
            return
    cli.require_flag(_OUTPUT, "runs/base")
    cli.start_devices()
    chosen = {
        f.name: f.value for f in (_STEPS, _BATCH, _HIDDEN, _LAYERS, _FORGET, _MISREAD, _SLIP, _GUESS, _TURN, _SEED)
    }
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


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
