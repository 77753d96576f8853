"""A small language model in Flax NNX, its own sampling loop, and R²VPO from this package: all in one file.

    python -m examples.nnx_language_model
    python -m examples.nnx_language_model --method=ppo_clip

The task: count on from the last digit of the prompt to 6, then say 0. To "5 3" the answer is "4 5 6 0". The reward is the
share of places that are right, so a model that knows nothing has something to learn from.

One iteration
  1. samples GROUP responses to each prompt, and remembers their log-probabilities,
  2. turns rewards into advantages within each group,
  3. makes UPDATES gradient steps on that batch,
  4. moves the multiplier by how far the last of them was from the policy that sampled.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from r2vpo_jax import advantages, dual, losses

DIGITS, PROMPT, RESPONSE = 6, 2, 6  # digits 1 to 6; token 0 ends a response
WIDTH = 32
PROMPTS, GROUP, UPDATES = 16, 16, 4
BUDGET = 0.01  # of E[(r - 1)^2]


class Block(nnx.Module):
    """Causal attention and an MLP."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x += self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class LanguageModel(nnx.Module):
    """tokens int[B, T] -> (logits f32[B, T, vocabulary], None); it is called as tunix calls its models."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(DIGITS + 1, WIDTH, rngs=rngs)
        self.places = nnx.Embed(PROMPT + RESPONSE, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, DIGITS + 1, rngs=rngs)

    def __call__(self, tokens, positions=None, cache=None, attention_mask=None):
        x = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x), cache


def log_probs(model, prompts, responses):
    """f32[B, RESPONSE]: of each token of the responses, given the prompt and those before it."""
    logits, _ = model(jnp.concatenate([prompts, responses], axis=1))
    return -optax.softmax_cross_entropy_with_integer_labels(logits[:, PROMPT - 1 : -1], responses)


score = nnx.jit(log_probs)  # outside of gradients


@nnx.jit
def sample(model, prompts, key):
    """int[B, RESPONSE]; without a cache, for such short ones."""
    tokens = jnp.pad(prompts, ((0, 0), (0, RESPONSE)))
    for t in range(PROMPT, PROMPT + RESPONSE):
        logits = model(tokens)[0][:, t - 1]
        tokens = tokens.at[:, t].set(jax.random.categorical(jax.random.fold_in(key, t), logits))
    return tokens[:, PROMPT:]


def response_mask(responses):
    """bool[B, RESPONSE]: up to the first 0, and that one too."""
    return jnp.cumsum(responses == 0, axis=1) - (responses == 0) == 0


def reward(prompts, responses):
    """f32[B]: right places / places of the answer, or of the response if it is longer."""
    counted = prompts[:, -1:] + jnp.arange(1, RESPONSE + 1)
    answer = jnp.select([counted <= DIGITS, counted == DIGITS + 1], [counted, 0], -1)  # nothing is right after its end
    mask = response_mask(responses)
    length = jnp.maximum(jnp.sum(mask, axis=1), 1 + DIGITS - prompts[:, -1])
    return jnp.sum(mask & (responses == answer), axis=1) / length


def rollout(model, key):
    """(prompts, responses, behavior log-probs, advantages, mask), and the mean reward."""
    prompts = jnp.repeat(jax.random.randint(key, (PROMPTS, PROMPT), 1, DIGITS + 1), GROUP, axis=0)
    responses = sample(model, prompts, jax.random.fold_in(key, 1))
    rewards = reward(prompts, responses)
    behavior_logp = score(model, prompts, responses)
    advantage = advantages.group_relative(rewards, GROUP)
    return (prompts, responses, behavior_logp, advantage, response_mask(responses)), float(jnp.mean(rewards))


def make_update(method: str):
    """A jitted gradient step on a batch; the multiplier is an argument, so that it may change."""

    @nnx.jit
    def update(model, optimizer, batch, variance_coef):
        prompts, responses, behavior_logp, advantage, mask = batch
        hyper = {"variance_coef": variance_coef} if method == "r2vpo" else {}

        def loss_fn(model):
            logp = log_probs(model, prompts, responses)
            return losses.get(method)(logp, behavior_logp, advantage, mask, reduction="token_mean", **hyper)

        (_, stats), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        total, count = stats["ratio_variance"]
        return total / count

    return update


def train(method: str = "r2vpo", iterations: int = 80, seed: int = 0) -> list[float]:
    """The mean reward of each iteration."""
    model, update, multiplier = LanguageModel(nnx.Rngs(seed)), make_update(method), dual.init(1.0)
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    rewards = []
    for number, key in enumerate(jax.random.split(jax.random.key(seed), iterations), start=1):
        batch, mean = rollout(model, key)
        for _ in range(UPDATES):
            variance = update(model, optimizer, batch, multiplier.variance_coef)
        multiplier = dual.update(multiplier, variance, budget=BUDGET, step=0.3, max_coef=50.0, max_step=0.3)
        rewards.append(mean)
        if number % 20 == 0:
            coef = f"  lambda {multiplier.variance_coef:.2f}" if method == "r2vpo" else ""
            print(f"iteration {number:3}  reward {sum(rewards[-20:]) / 20:.3f}  V {variance:.4f}{coef}")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="r2vpo", choices=losses.names())
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
