"""Supervised learning of a base model on the demonstrations of a task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r2vpo_jax import models, scoring
from r2vpo_jax.tasks.arithmetic import ArithmeticTask
from r2vpo_jax.tasks.countdown import CountdownTask
from r2vpo_jax.tasks.embedded import make_tokenizer
from r2vpo_jax.tasks.eureka import EurekaTask
from r2vpo_jax.training import accumulation

from . import word_problems


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How a shipped base checkpoint is made; the defaults are those of the arithmetic task.

    Raises:
      ValueError: a number outside its range.
    """

    num_steps: int = 2000
    batch_size: int = 128
    micro_batch_size: int = 32  # rows whose activations exist at one time; 32 fits a CPU's cache
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    forget_carry: float = 0.7  # arithmetic: probability that the demonstrator forgets a carry
    misread: float = 0.7  # word problems: probability that the demonstrator falls for a word that can be misread
    slip: float = 0.6  # probability that the demonstrator gets a hard fact wrong
    guess: float = 0.8  # countdown: probability that the demonstrator writes any order and operations
    turn: float = 0.2  # eureka: probability that the demonstrator turns a digit over
    seed: int = 0
    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    vocab_size: int = 32

    def __post_init__(self):
        for field in ("num_steps", "batch_size", "micro_batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of {self.micro_batch_size=}")
        for field in ("forget_carry", "misread", "slip", "guess", "turn"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is a probability, got {getattr(self, field)}")


CONFIGS = {
    "arithmetic": PretrainConfig(),
    "countdown": PretrainConfig(num_steps=2000),
    "eureka": PretrainConfig(num_steps=1000, hidden_size=32, intermediate_size=96),
    "long_arithmetic": PretrainConfig(num_steps=2000, batch_size=64, forget_carry=0.1, slip=0.1),
    "word_problems": PretrainConfig(
        num_steps=1000,
        batch_size=64,
        misread=0.75,
        slip=0.7,
        hidden_size=128,
        intermediate_size=384,
        vocab_size=512,
    ),
}

# The mistakes that each task's demonstrator makes.
_MISTAKES = {
    "arithmetic": ("forget_carry", "slip"),
    "countdown": ("guess",),
    "eureka": ("turn",),
    "word_problems": ("misread", "slip"),
}
# The embedded tasks by the names of their base models: as in the configurations that use these.
_EMBEDDED = {
    "arithmetic": ArithmeticTask(),
    "countdown": CountdownTask(),
    "eureka": EurekaTask(),
    # Shorter chains too: in eight operands alone the digits of the answer are 3 of 130 tokens, and are not learned.
    "long_arithmetic": ArithmeticTask(min_operands=2, max_operands=8, num_digits=3),
}


def make_checkpoint(path, task: str, config: PretrainConfig, report=lambda step, loss: None) -> None:
    """Write the base model of a task as a Hugging Face directory.

    Args:
      path: directory.
      task: name, a key of `CONFIGS`.
      config, report: as for `pretrain`.
    """
    if task in _EMBEDDED:
        tokenizer = make_tokenizer(_EMBEDDED[task].symbols)
        model, params = pretrain(config, _EMBEDDED[task], len(tokenizer), report)
        models.save_pretrained(path, model, params, tokenizer)
    else:
        tokenizer = word_problems.make_tokenizer()
        model, params = pretrain(config, word_problems.WordProblems(tokenizer), len(tokenizer), report)
        # As in the published checkpoints of this kind: 16 bits, and a text may end in two ways.
        eos_ids = tokenizer.convert_tokens_to_ids([word_problems.END_OF_TURN, word_problems.END_OF_TEXT])
        models.save_pretrained(path, model, params, tokenizer, dtype=jnp.bfloat16, eos_ids=eos_ids)


def pretrain(config: PretrainConfig, task, num_tokens: int, report=lambda step, loss: None):
    """Train a decoder from random weights.

    Args:
      config: sizes and schedule.
      task: a task with `demonstrations`, one of `CONFIGS`.
      num_tokens: tokens that the tokenizer knows.
      report: called with (step, loss) now and then.

    Returns:
      (model, params).
    """
    model = models.Decoder(
        models.DecoderConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.hidden_size // config.num_heads,
            num_tokens=num_tokens,
            max_position_embeddings=512,
        )
    )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup_steps, config.num_steps // 2), config.num_steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay)
    )
    init_key, demonstration_key = jax.random.split(jax.random.key(config.seed))
    params = models.init_params(model, init_key)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        num_tokens = jnp.sum(batch["response_length"])

        def loss_fn(params, batch):
            logps = scoring.score(
                model,
                params,
                jnp.concatenate([batch["prompt"], batch["response"]], axis=1),
                batch["prompt_length"],
                batch["response_length"],
                jnp.ones(batch["prompt"].shape[0]),
                prompt_size=batch["prompt"].shape[1],
            ).logp
            mask = jnp.arange(logps.shape[1]) < batch["response_length"][:, None]
            return -jnp.sum(jnp.where(mask, logps, 0.0)) / num_tokens, None

        loss, _, grads = accumulation.value_and_grad(
            loss_fn, params, batch, config.batch_size // config.micro_batch_size
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    mistakes = {name: getattr(config, name) for name in _MISTAKES[task.name]}
    for i in range(config.num_steps):
        index = i * config.batch_size + np.arange(config.batch_size)
        problems = task.problems("train", index)
        responses, lengths = task.demonstrations("train", index, demonstration_key, **mistakes)
        batch = {
            "prompt": problems.tokens,
            "prompt_length": problems.length,
            "response": responses,
            "response_length": lengths,
        }
        params, opt_state, loss = step(params, opt_state, batch)
        if (i + 1) % 100 == 0 or i + 1 == config.num_steps:
            report(i + 1, float(loss))
    return model, params
