"""Whole updates of runs whose numbers are traced values, with parameters that are the log-probabilities themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import advantages, config, scoring
from r2vpo_jax.config import numbers, with_numbers
from r2vpo_jax.training import critic, update
from r2vpo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from r2vpo_jax.training.update import Optimizers, UpdateSettings
from tests.helpers.rollouts import GROUP, RESPONSE, ROWS, make

# Everything that a number weighs or bounds, in two objectives.
MUCH = {
    "critic": {
        "name": "ppo",
        "loss": {"entropy_coef": 0.5, "options": {"clip_low": 0.01, "clip_high": 0.01, "dual_clip": 1.02}},
        "kl": {"coef": 0.5, "target": 0.01},
        "correction": {"mode": "mask", "max_weight": 1.5, "min_weight": 0.8},
    },
    "multiplier": {
        "name": "r2vpo_before",
        "loss": {"entropy_coef": 0.5},
        "kl": {"coef": 0.5, "to": "behavior"},
        "correction": {"mode": "truncate", "max_weight": 1.2},
    },
}
OBJECTIVES = MUCH | {name: {"name": name} for name in config.PRESETS}
# The temperature is the sampler's, and the first multiplier in the state that training starts from. Bounds and targets
# have an effect where they are crossed.
WITHOUT_EFFECT = {
    "critic": {"sampler.temperature", "objective.kl.target"},
    "multiplier": {
        "sampler.temperature",
        "objective.dual.coef",
        "objective.dual.max_step",
        "objective.dual.max_coef",
        "optimizer.value_learning_rate",
    },
}
OPTIMIZER = {
    "learning_rate": 0.1,
    "warmup_updates": 0,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 0.01,
    "epsilon": 1e-3,
}


@pytest.fixture(autouse=True)
def _scores(monkeypatch):
    """A row's log-probabilities are that row of the parameters, and all of its values those of the head."""

    def score_rows(params, head, batch, *_):
        logp = params["kernel"][batch.rollout_id]
        value = None if head is None else jnp.broadcast_to(head[0] + head[1], logp.shape)
        return scoring.Scores(logp, logp**2, value)

    monkeypatch.setattr(update, "score_rows", score_rows)


def configuration(objective):
    return config.from_dict(
        {
            "objective": objective,
            "optimizer": OPTIMIZER,
            "trainer": {"num_iterations": 10, "num_minibatches": 1, "num_epochs": 2, "prompts_per_rollout": 4}
            | {"micro_batch_size": 4},
            "sampler": {"group_size": GROUP},
        }
    )


def settings_of(made):
    return UpdateSettings(made.objective, GROUP, num_minibatches=1, num_epochs=2, micro_batch_size=4)


def optimizers_of(made):
    optimizer = made.optimizer
    return Optimizers(
        make_optimizer(optimizer, made.num_updates),
        critic.make_optimizer(optimizer.value_learning_rate, optimizer.max_grad_norm),
    )


def start(made):
    """(state, rollout): ratios, divergences and errors of values that all are off their neutral points."""
    generator = np.random.default_rng(0)

    def near(x, spread):
        return (x + spread * generator.standard_normal(np.shape(x))).astype(np.float32)

    logp = near(np.full((ROWS, RESPONSE), -1.0), 0.1)
    rollout = make(0, behavior_logp=near(logp, 0.3), reference_logp=near(logp, 0.3), value=near(0 * logp, 0.3))
    rollout = rollout.replace(value_target=near(rollout.value, 0.5))
    # Only shapes depend on the numbers here.
    model = type("Model", (), {"config": type("Shape", (), {"hidden_size": RESPONSE})})
    state = update.init_state({"kernel": logp}, model, optimizers_of(made), settings_of(made))
    return jax.tree.map(jnp.asarray, (state, rollout))


def loss(values, made, state, rollout):
    """(loss, gradients) of the rows, whose advantages are those of the configured estimator."""
    made = with_numbers(made, values)
    settings, rollout = settings_of(made), with_advantages(made, rollout)
    fixed = {"state": multipliers(made, state), "model": None, "settings": settings}
    fixed |= {"normalizer": update.normalizer(rollout, made.objective)}
    fixed |= {"computed": update.computed_arguments(fixed["state"], rollout, None, settings)}

    def of(trained):
        return update.micro_batch_loss(trained, rollout, **fixed)[0]

    return jax.value_and_grad(of)((state.params, state.critic and (state.critic.kernel, state.critic.bias)))


def train(values, made, state, rollout):
    """(parameters, value head, multipliers, losses) after two updates and a step of the multipliers."""
    made = with_numbers(made, values)
    state, settings, optimizers = multipliers(made, state), settings_of(made), optimizers_of(made)
    rollout = update.correct(state.params, with_advantages(made, rollout), None, settings)
    all_stats = []
    for number in range(settings.num_updates):
        minibatch = update.take_minibatch(rollout, jax.random.key(0), number, settings)
        state, stats = update.update(state, minibatch, None, optimizers, settings)
        all_stats.append(stats)
    dual, kl_coef, _ = update.step_multipliers(state.dual, state.kl_coef, all_stats, settings)
    head = state.critic and (state.critic.kernel, state.critic.bias)
    return state.params, head, dual.variance_coef, kl_coef, [stats.mean("loss") for stats in all_stats]


def with_advantages(made, rollout):
    advantage = made.objective.advantage
    estimator = advantages.estimator(advantage.estimator)
    rewards = jnp.where(jnp.arange(RESPONSE) == 0, rollout.reward[:, None], 0.0)
    rewards = advantages.Rewards(rewards, rollout.response_mask, GROUP, rollout.value)
    estimate = estimator.function(rewards, **{name: getattr(advantage, name) for name in estimator.options})
    if estimator.critic:
        return rollout.replace(advantage=estimate[0], value_target=estimate[1])
    return rollout.replace(advantage=estimate)


def multipliers(made, state):
    """The state with the configured weight of the divergence."""
    return state.replace(kl_coef=jnp.float32(made.objective.kl.coef))


def prepared(name, function):
    """(numbers, `function` of numbers) of an objective."""
    made = configuration(OBJECTIVES[name])
    state, rollout = start(made)
    return numbers(made), functools.partial(function, made=made, state=state, rollout=rollout)


def assert_same(actual, expected):
    """To 1e-6 of the largest."""
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6 * np.max(np.abs(e)), err_msg=where)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_traced_numbers_give_the_loss_of_plain_ones(name):
    values, run = prepared(name, loss)
    actual, expected = jax.jit(lambda values: (run(values), run({})))(values)
    assert_same(actual, expected)
    assert np.isfinite(expected[0])
    assert np.any(expected[1][0]["kernel"] != 0)


@pytest.mark.parametrize("name", MUCH)
def test_runs_side_by_side_are_those_runs_alone(name):
    one, run = prepared(name, train)
    alone = jax.jit(run)
    assert_same(alone(one), jax.jit(lambda: run({}))())
    others = [one | {path: 0.8 * one[path]} for path in one]
    both = jax.jit(jax.vmap(run))({path: jnp.array([v[path] for v in (one, *others)]) for path in one})
    for number, values in enumerate((one, *others)):
        assert_same(jax.tree.map(lambda x: x[number], both), alone(values))  # noqa: B023
    differs = [np.any(x[1:] != x[:1], axis=tuple(range(1, np.ndim(x)))) for x in jax.tree.leaves(both)]
    assert {path for path, *any_leaf in zip(one, *differs, strict=True) if not any(any_leaf)} == WITHOUT_EFFECT[name]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_schedule_of_traced_numbers(schedule, warmup):
    made = config.Config(optimizer=config.OptimizerConfig(schedule=schedule, warmup_updates=warmup))

    def rates(values):
        function = learning_rate_schedule(with_numbers(made, values).optimizer, 12)
        return jax.vmap(function)(jnp.arange(15))

    assert_same(jax.jit(rates)(numbers(made)), rates({}))
