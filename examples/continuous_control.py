"""PPO for continuous control with this package's objectives, in one file and in the style of purejaxrl.

    pip install -c constraints.txt -e '.[control]'
    python -m examples.continuous_control --env=Pendulum-v1 --method=r2vpo_adaptive --seeds=4

`make_train(config)` returns the pure function `train(key, knob)`: vmap it over seeds and knobs. One iteration
  1. plays `rollout_length` steps in `num_envs` environments,
  2. estimates advantages (GAE; a time limit is bootstrapped, an end is not),
  3. makes `epochs` passes of minibatch updates on the objective of `method` and the squared error of the values,
  4. measures how far the policy has moved from the one that played, and moves the adaptive coefficient.

To our objectives log-probabilities, advantages and mask are [T, B]: a row is a batch of transitions. The knob is
the one number that a method has:
  ppo_clip        distance of both bounds from 1
  kl_fixed        weight of KL(behavior || policy)
  kl_adaptive     target of that KL; its weight doubles and halves (PPO's rule)
  r2vpo_fixed     weight of (r - 1)^2
  r2vpo_adaptive  bound of E[(r - 1)^2]; its multiplier ascends the dual
Only `gymnax_environment` needs gymnax; `make_train` takes any other `Environment`.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from r2vpo_jax import dual, kl, losses

KNOBS = {"ppo_clip": 0.2, "kl_fixed": 1.0, "kl_adaptive": 0.01, "r2vpo_fixed": 0.5, "r2vpo_adaptive": 0.02}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is the same for every method, but for its name. One iteration plays num_envs * rollout_length steps."""

    env: str = "Pendulum-v1"
    method: str = "r2vpo_adaptive"
    iterations: int = 75
    num_envs: int = 16
    rollout_length: int = 128
    epochs: int = 10
    minibatches: int = 8
    learning_rate: float = 1e-3  # falls to 0 linearly
    max_grad_norm: float = 0.5
    discount: float = 0.99
    decay: float = 0.95  # lambda of GAE
    value_coef: float = 0.5
    hidden: int = 32
    initial_coef: float = 1.0  # of the adaptive methods


class Environment(NamedTuple):
    """An environment that starts its next episode by itself; actions are in [-1, 1] in each dimension."""

    reset: Callable  # key -> (state, observation)
    step: Callable  # key, state, action -> (state, observation, its last observation, reward, terminated, done)
    observation_size: int
    action_size: int


class Moments(NamedTuple):
    """Running mean and variance, to scale observations and rewards."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array


class Transition(NamedTuple):
    """f32[T, B, ...]: what the behavior policy saw, did and got in T steps of B environments."""

    observation: jax.Array
    action: jax.Array
    logp: jax.Array
    following: jax.Array  # observation after the step, of the same episode
    reward: jax.Array
    discounted: jax.Array  # return so far, to scale rewards by
    terminated: jax.Array
    done: jax.Array  # terminated, or cut off by the time limit
    episode_return: jax.Array  # undiscounted, up to this step


def gymnax_environment(name: str) -> Environment:
    """One with a continuous action space, its actions scaled to [-1, 1]. ImportError without the extra `control`."""
    import gymnax  # here, so that all else works without it

    env, params = gymnax.make(name)
    space = env.action_space(params)
    low, high = jnp.broadcast_to(space.low, space.shape), jnp.broadcast_to(space.high, space.shape)

    def step(key, state, action):
        action = low + (jnp.clip(action, -1, 1) + 1) / 2 * (high - low)
        observation, state, reward, terminated, truncated, info = env.step(key, state, action, params)
        return state, observation, info["final_observation"], reward, terminated, terminated | truncated

    return Environment(
        lambda key: env.reset(key, params)[::-1], step, env.observation_space(params).shape[0], space.shape[0]
    )


def gae(reward, value, next_value, terminated, done, *, discount, decay):
    """Generalized advantage estimates, f32[T, B], from f32[T, B] (arXiv 1506.02438).

    delta_t = r_t + discount (1 - terminated_t) V(s_{t+1}) - V(s_t)
    A_t     = delta_t + discount decay (1 - done_t) A_{t+1},    s_{t+1} of the same episode
    """
    delta = reward + discount * (1 - terminated) * next_value - value

    def step(following, x):
        delta, done = x
        advantage = delta + discount * decay * (1 - done) * following
        return advantage, advantage

    return jax.lax.scan(step, jnp.zeros_like(delta[0]), (delta, done), reverse=True)[1]


def update_moments(moments: Moments, batch: jax.Array) -> Moments:
    """Takes in a batch of values with any leading axes (Chan's parallel formula)."""
    batch = batch.reshape(-1, *moments.mean.shape)
    count = moments.count + len(batch)
    shift = batch.mean(0) - moments.mean
    spread = shift**2 * moments.count * len(batch) / count
    squares = moments.variance * moments.count + batch.var(0) * len(batch) + spread
    return Moments(moments.mean + shift * len(batch) / count, squares / count, count)


def normalize(moments: Moments, observation):
    return jnp.clip((observation - moments.mean) * jax.lax.rsqrt(moments.variance + 1e-8), -10, 10)


def init_network(key, sizes, last_scale):
    """Layers of a tanh network with orthogonal weights: a list of (f32[in, out], f32[out])."""
    scales = [2**0.5] * (len(sizes) - 2) + [last_scale]
    layers = zip(jax.random.split(key, len(scales)), scales, sizes[:-1], sizes[1:], strict=True)
    return [(jax.nn.initializers.orthogonal(scale)(k, (n, m)), jnp.zeros(m)) for k, scale, n, m in layers]


def network(layers, x):
    for weight, bias in layers[:-1]:
        x = jnp.tanh(x @ weight + bias)
    return x @ layers[-1][0] + layers[-1][1]


def log_prob(params, observation, action):
    """log pi(a | s), f32[...], of a Gaussian whose deviation does not depend on the state. Not squashed."""
    scaled = (action - network(params["policy"], observation)) / jnp.exp(params["log_std"])
    return jnp.sum(-0.5 * scaled**2 - params["log_std"] - 0.5 * jnp.log(2 * jnp.pi), axis=-1)


def policy_loss(method: str, logp, behavior_logp, advantages, coef):
    """The objective of a method, to be minimized, from f32[T, B] and its coefficient: the clip, or a weight."""
    mask = jnp.ones(logp.shape, bool)
    if method == "ppo_clip":
        return losses.ppo_clip_loss(logp, behavior_logp, advantages, mask, clip_low=coef, clip_high=coef)[0]
    if method.startswith("r2vpo"):
        return losses.r2vpo_loss(logp, behavior_logp, advantages, mask, variance_coef=coef)[0]
    loss, _ = losses.policy_gradient_loss(logp, behavior_logp, advantages, mask)
    return loss + coef * jnp.mean(kl.estimate(behavior_logp, logp, "k3"))


def initial_multiplier(config: Config, knob):
    """What a method carries from batch to batch: its coefficient, or the state of the dual."""
    if config.method == "r2vpo_adaptive":
        return dual.init(config.initial_coef)
    return jnp.float32(config.initial_coef) if config.method == "kl_adaptive" else jnp.asarray(knob, jnp.float32)


def adapt(method: str, multiplier, knob, ratio_variance, divergence):
    """The multiplier after a batch. Both adaptive methods move by a factor of 2 at most, so they are equally fast."""
    if method == "r2vpo_adaptive":
        rule = {"rule": "multiplicative", "step": 0.5, "max_step": jnp.log(2.0), "max_coef": 1e4}
        return dual.update(multiplier, ratio_variance, budget=knob, **rule)
    return kl.adapt_coef(multiplier, divergence, target=knob) if method == "kl_adaptive" else multiplier


def make_train(config: Config, environment: Environment | None = None) -> Callable:
    """train(key, knob) -> dict of f32[iterations], pure; `environment` replaces gymnax's `config.env`.

    The dict: sum `return_sum` and number `episodes` of those that ended in the iteration, `coef` in force, and
    after the updates `ratio_variance` E[(r - 1)^2], `kl` (k3, behavior || policy) and `std` of the policy.

    Raises:
      ValueError: unknown method, or minibatches that do not divide the rollout's length.
    """
    if config.method not in KNOBS:
        raise ValueError(f"unknown method {config.method!r}; one of {tuple(KNOBS)}")
    if config.rollout_length % config.minibatches:
        raise ValueError(f"{config.minibatches} minibatches do not divide {config.rollout_length} steps")
    env = gymnax_environment(config.env) if environment is None else environment
    updates = config.iterations * config.epochs * config.minibatches
    adam = optax.adam(optax.linear_schedule(config.learning_rate, 0.0, updates), eps=1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)

    def play(params, moments, carry, key):
        def step(carry, key):
            state, observation, discounted, episode_return = carry
            act_key, env_key = jax.random.split(key)
            x = normalize(moments, observation)
            noise = jax.random.normal(act_key, (config.num_envs, env.action_size))
            action = network(params["policy"], x) + jnp.exp(params["log_std"]) * noise
            keys = jax.random.split(env_key, config.num_envs)
            state, following, last, reward, terminated, done = jax.vmap(env.step)(keys, state, action)
            discounted, episode_return = config.discount * discounted + reward, episode_return + reward
            logp = log_prob(params, x, action)
            seen = (observation, action, logp, last, reward, discounted, terminated * 1.0, done * 1.0, episode_return)
            return (state, following, discounted * (1 - done), episode_return * (1 - done)), Transition(*seen)

        return jax.lax.scan(step, carry, jax.random.split(key, config.rollout_length))

    def learn(params, opt_state, coef, batch, key):
        """`epochs` passes over (observation, action, logp, advantage, target), each f32[T, B, ...]."""

        def loss(params, minibatch):
            observation, action, behavior_logp, advantage, target = minibatch
            logp, error = log_prob(params, observation, action), network(params["value"], observation)[..., 0] - target
            policy_term = policy_loss(config.method, logp, behavior_logp, advantage, coef)
            return policy_term + config.value_coef * jnp.mean(error**2)

        def update(carry, minibatch):
            params, opt_state = carry
            change, opt_state = optimizer.update(jax.grad(loss)(params, minibatch), opt_state)
            return (optax.apply_updates(params, change), opt_state), None

        def epoch(carry, key):
            order = jax.random.permutation(key, config.rollout_length * config.num_envs)
            shape = (config.minibatches, config.rollout_length // config.minibatches, config.num_envs)
            shuffled = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[order].reshape(*shape, *x.shape[2:]), batch)
            return jax.lax.scan(update, carry, shuffled)

        return jax.lax.scan(epoch, (params, opt_state), jax.random.split(key, config.epochs))[0]

    def train(key, knob):
        policy_key, value_key, reset_key, loop_key = jax.random.split(key, 4)
        hidden = (env.observation_size, config.hidden, config.hidden)
        policy, value = (
            init_network(policy_key, (*hidden, env.action_size), 0.01),
            init_network(value_key, (*hidden, 1), 1),
        )
        params = {"policy": policy, "value": value, "log_std": jnp.zeros(env.action_size)}
        zeros = jnp.zeros(config.num_envs)
        moments, returns = (
            Moments(jnp.zeros(n), jnp.ones(n), jnp.float32(1e-4)) for n in ((env.observation_size,), ())
        )
        playing = (*jax.vmap(env.reset)(jax.random.split(reset_key, config.num_envs)), zeros, zeros)

        def iteration(carry, key):
            params, opt_state, multiplier, moments, returns, playing = carry
            play_key, learn_key = jax.random.split(key)
            playing, batch = play(params, moments, playing, play_key)
            returns = update_moments(returns, batch.discounted)
            x, following = normalize(moments, batch.observation), normalize(moments, batch.following)
            value, next_value = (network(params["value"], y)[..., 0] for y in (x, following))
            reward = batch.reward * jax.lax.rsqrt(returns.variance + 1e-8)
            seen = (reward, value, next_value, batch.terminated, batch.done)
            advantage = gae(*seen, discount=config.discount, decay=config.decay)
            target, advantage = advantage + value, (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            coef = multiplier.variance_coef if isinstance(multiplier, dual.DualState) else multiplier
            played = (x, batch.action, batch.logp, advantage, target)
            params, opt_state = learn(params, opt_state, coef, played, learn_key)
            logp = log_prob(params, x, batch.action)
            ratio_variance = jnp.mean(jnp.expm1(logp - batch.logp) ** 2)
            divergence = jnp.mean(kl.estimate(batch.logp, logp, "k3"))
            multiplier = adapt(config.method, multiplier, knob, ratio_variance, divergence)
            moments = update_moments(moments, batch.observation)  # last: one iteration, one scale
            metrics = {"return_sum": jnp.sum(batch.episode_return * batch.done), "episodes": jnp.sum(batch.done)}
            measured = {"ratio_variance": ratio_variance, "kl": divergence, "std": jnp.exp(params["log_std"]).mean()}
            return (params, opt_state, multiplier, moments, returns, playing), metrics | measured | {"coef": coef}

        start = (params, optimizer.init(params), initial_multiplier(config, knob), moments, returns, playing)
        return jax.lax.scan(iteration, start, jax.random.split(loop_key, config.iterations))[1]

    return train


def final_return(metrics, share: float = 0.1):
    """Mean undiscounted return of the episodes that end in the last `share` of the iterations (the last axis)."""
    first = metrics["episodes"].shape[-1] - max(1, round(share * metrics["episodes"].shape[-1]))
    return metrics["return_sum"][..., first:].sum(-1) / metrics["episodes"][..., first:].sum(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default=Config.env, help="a gymnax environment with continuous actions")
    parser.add_argument("--method", default=Config.method, choices=list(KNOBS))
    parser.add_argument("--knob", type=float, help=f"the method's one number, else {KNOBS}")
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    knob = KNOBS[args.method] if args.knob is None else args.knob
    train = make_train(Config(env=args.env, method=args.method))
    metrics = jax.jit(jax.vmap(train, (0, None)))(jax.vmap(jax.random.key)(jnp.arange(args.seeds)), knob)
    for seed, score in enumerate(final_return(metrics)):
        print(f"{args.env} {args.method} {knob} seed {seed}: mean return at the end {score:.1f}")


if __name__ == "__main__":
    main()
