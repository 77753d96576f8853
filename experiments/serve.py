"""Serve a model by our own sampler: OpenAI-compatible completions with token ids, log-probabilities and seeds.

    python -m experiments.serve --model=arithmetic_base --port=8000
    python -m experiments.train --config=arithmetic --workdir=runs/served --config.sampler.engine=endpoint

It shows what an engine has to do, and lets the mismatch between an engine and the learner be tried: with --weights=int8
rollouts are sampled with weights of 8 bits. Its speed is that of our sampler. See docs/engines.md.
"""

import signal
import threading

from absl import flags

from r2vpo_jax import cli, config
from r2vpo_jax.config.sampling import SAMPLING_WEIGHTS
from r2vpo_jax.errors import usage_errors
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.sampler.server import Server
from r2vpo_jax.sampler.serving import Engine

_MODEL = flags.DEFINE_string("model", "arithmetic_base", "Hugging Face directory, or a shipped model.")
_NAME = flags.DEFINE_string("name", None, "What the model is called by requests (default: --model).")
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Where to listen. There is no authentication: this machine by default."
)
_PORT = flags.DEFINE_integer("port", 8000, "Where to listen; 0: any that is free.", 0, 65535)
_WEIGHTS = flags.DEFINE_enum("weights", "compute", SAMPLING_WEIGHTS, "Weights, as read or rounded.")
_COMPUTE_DTYPE = flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "dtype of activations.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Most responses that are sampled at one time.", 1)


def main():
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    cli.start_devices()
    base = open_base_model(config.ModelConfig(path=_MODEL.value, compute_dtype=_COMPUTE_DTYPE.value))
    with usage_errors():
        engine = Engine(base, weights=_WEIGHTS.value, batch_size=_BATCH_SIZE.value)
        server = Server(engine, _NAME.value or _MODEL.value, host=_HOST.value, port=_PORT.value)
    if _HOST.value not in ("127.0.0.1", "::1", "localhost"):
        print(
            f"warning: whoever reaches {server.url} can use this model, and have directories read as its weights",
            flush=True,
        )
    print(f"serving {_NAME.value or _MODEL.value} at {server.url}; Ctrl-C ends it", flush=True)
    ended.wait()
    server.close()


def command():
    cli.run(main)


if __name__ == "__main__":
    command()
