"""R²VPO as a policy loss of tunix: registered under a name, and taken by tunix's trainer for its train step.

    python -m examples.tunix_grpo                # with google-tunix installed: tunix's registry, trainer and step
    python -m examples.tunix_grpo --stand_in     # without: a trainer of the same structure, and the same numbers

`policy_loss` has the signature of tunix's own `grpo_loss_fn`; with tunix,

    function_registry.register_policy_loss_fn("r2vpo")(policy_loss)

makes it known by its name. (tunix 0.1.7 checks `GRPOConfig.policy_loss_fn` against a list of its own, so that a GRPOLearner is
given the loss through its trainer, as below, or by registering it as "grpo".) Model, task and sampling are those of
examples/nnx_language_model.py. Each batch is split into MICRO_BATCHES of equal rows, whose gradients the trainer averages: with
reduction="sequence_mean" that is exactly the gradient of the batch.
"""

import argparse
import functools
import types

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from examples.nnx_language_model import LanguageModel, log_probs, rollout
from r2vpo_jax import losses

MICRO_BATCHES, UPDATES = 4, 4
ALGORITHM = types.SimpleNamespace(policy_loss="r2vpo", variance_coef=1.0, reduction="sequence_mean")
PAD = EOS = 0


def policy_loss(model, train_example, algo_config, pad_id, eos_id, **kwargs):
    """(loss, aux) of a TrainExample, as tunix wants it; any objective of this package with its hyper-parameters."""
    del pad_id, eos_id, kwargs  # the masks are in the example
    example = train_example
    loss, stats = losses.get(algo_config.policy_loss)(
        log_probs(model, example.prompt_ids, example.completion_ids),
        example.old_per_token_logps,
        example.advantages,
        example.completion_mask,
        variance_coef=algo_config.variance_coef,
        reduction=algo_config.reduction,
    )
    return loss, {name: total / count for name, (total, count) in stats.items()}


def tunix_parts():
    """(TrainExample, make_trainer) with the real tunix.

    Raises:
      ImportError: it is not installed (pip install google-tunix).
    """
    from tunix.rl import common, function_registry
    from tunix.rl.trainer import Trainer
    from tunix.sft.peft_trainer import TrainingConfig

    function_registry.register_policy_loss_fn("r2vpo")(policy_loss)

    def make_trainer(model, optimizer):
        config = TrainingConfig(eval_every_n_steps=10**9, gradient_accumulation_steps=MICRO_BATCHES)
        loss = function_registry.get_policy_loss_fn("r2vpo")
        return Trainer(model, optimizer, config, dict), loss

    return functools.partial(common.TrainExample, ref_per_token_logps=None), make_trainer


class StandIn:
    """What is used here of tunix's trainer, in a few lines."""

    def __init__(self, model, optimizer):
        self.model = model
        self.optimizer = nnx.Optimizer(model, optax.MultiSteps(optimizer, MICRO_BATCHES), wrt=nnx.Param)

    def with_loss_fn(self, loss_fn, has_aux):
        self.gradient = nnx.value_and_grad(loss_fn, has_aux=has_aux)
        return self

    def with_gen_model_input_fn(self, function):
        self.inputs = function
        return self

    def jit_train_and_eval_step(self):
        @nnx.jit
        def step(model, optimizer, example):
            (loss, aux), grads = self.gradient(model, **self.inputs(example))
            optimizer.update(model, grads)
            return loss, aux, optax.global_norm(grads)

        return functools.partial(step, self.model, self.optimizer), None


@struct.dataclass
class StandInExample:
    """The fields of tunix's TrainExample."""

    prompt_ids: jax.Array  # int[B, P]
    prompt_mask: jax.Array
    completion_ids: jax.Array  # int[B, T]
    completion_mask: jax.Array
    advantages: jax.Array  # f32[B]
    old_per_token_logps: jax.Array  # f32[B, T]


def train(iterations: int = 60, seed: int = 0, stand_in: bool = False) -> list[float]:
    """The mean reward of each iteration."""
    make_example, make_trainer = (StandInExample, lambda *x: (StandIn(*x), policy_loss)) if stand_in else tunix_parts()
    model = LanguageModel(nnx.Rngs(seed))
    trainer, loss_fn = make_trainer(model, optax.adam(2e-3))

    def loss(model, train_example):  # with these names: nnx resolves them to positions
        return loss_fn(model, train_example, algo_config=ALGORITHM, pad_id=PAD, eos_id=EOS)

    trainer.with_loss_fn(loss, has_aux=True)
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example})
    train_step, _ = trainer.jit_train_and_eval_step()
    rewards = []
    for number, key in enumerate(jax.random.split(jax.random.key(seed), iterations), start=1):
        (prompts, responses, behavior_logp, advantage, mask), mean = rollout(model, key)
        whole = {
            "prompt_ids": prompts,
            "prompt_mask": jnp.ones_like(prompts),
            "completion_ids": responses,
            "completion_mask": mask,
            "advantages": advantage,
            "old_per_token_logps": behavior_logp,
        }
        parts = [make_example(**{name: x[i::MICRO_BATCHES] for name, x in whole.items()}) for i in range(MICRO_BATCHES)]
        for _ in range(UPDATES):
            variance = sum(train_step(part)[1]["ratio_variance"] for part in parts) / MICRO_BATCHES
        rewards.append(mean)
        if number % 20 == 0:
            print(f"iteration {number:3}  reward {sum(rewards[-20:]) / 20:.3f}  V {variance:.4f}")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stand_in", action="store_true", help="without tunix")
    try:
        train(**vars(parser.parse_args()))
    except ModuleNotFoundError as error:
        parser.exit(2, f"error: {error}: pip install google-tunix==0.1.7, or try --stand_in, which does without\n")
