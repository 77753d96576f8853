"""Write tests/tiny_base, the base model that the tests start from:

    python -m tests.make_tiny_base

It is kept as a file because a model that is trained anew is another one on every processor: 300 steps turn a last
bit into other weights, other samples and other gradients, and a test could then pass or fail by chance.
"""

import pathlib

from experiments.base_models import pretraining
from r2vpo_jax import models, tasks
from r2vpo_jax.tasks.arithmetic import SYMBOLS
from r2vpo_jax.tasks.embedded import make_tokenizer
from tests.helpers.paths import TASK, TINY_BASE

CONFIG = pretraining.PretrainConfig(
    num_steps=300,
    batch_size=64,
    micro_batch_size=64,
    learning_rate=2e-2,
    warmup_steps=10,
    forget_carry=0.0,
    slip=0.2,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
)


def make(path: pathlib.Path) -> None:
    model, params = pretraining.pretrain(CONFIG, tasks.ArithmeticTask(**TASK), len(SYMBOLS))
    models.save_pretrained(path, model, params, make_tokenizer(SYMBOLS))


if __name__ == "__main__":
    make(TINY_BASE)
