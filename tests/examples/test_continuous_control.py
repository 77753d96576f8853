"""The example of continuous control: its pure parts by hand, its training on a toy, and gymnax where it is installed."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from examples import continuous_control as example
from examples import continuous_control_study as study
from tests.helpers.paths import ROOT

TINY = {"iterations": 3, "num_envs": 4, "rollout_length": 8, "epochs": 2, "minibatches": 2, "hidden": 4}
ADAPTIVE = ("kl_adaptive", "r2vpo_adaptive")
HORIZON = 5
every_method = pytest.mark.parametrize("method", example.KNOBS)


def toy():
    """A point on a line that the action pushes; the reward is how near 1 it is. Cut off after HORIZON steps."""

    def reset(key):
        place = jax.random.normal(key)
        return (place, jnp.float32(0)), place[None]

    def step(key, state, action):
        place, time = state[0] + action[0], state[1] + 1
        done = time >= HORIZON
        fresh, observation = reset(key)
        state = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, (place, time))
        last = place[None]
        reward = -((place - 1) ** 2)
        return state, jnp.where(done, observation, last), last, reward, jnp.array(False), done

    return example.Environment(reset, step, 1, 1)


@functools.cache
def program(method, environment=None, **changes):
    train = example.make_train(example.Config(method=method, **(TINY | changes)), environment or toy())
    return jax.jit(jax.vmap(train, (0, None)))


def trained(method, keys, environment=None, **changes):
    return program(method, environment, **changes)(keys, example.KNOBS[method])


def test_gae_by_hand():
    # Columns: nothing ends; step 1 terminates; step 1 is cut off by the time limit.
    reward, value, following = (jnp.tile(jnp.array([x]).T, 3) for x in ([1.0, 2, 3], [1.0, 2, 4], [2.0, 4, 8]))
    terminated, done = jnp.zeros((3, 3)).at[1, 1].set(1), jnp.zeros((3, 3)).at[1, 1:].set(1)
    got = example.gae(reward, value, following, terminated, done, discount=0.5, decay=0.5)
    # delta = r + V' / 2 - V = 1, 2, 3, but 2 - 2 = 0 where it terminates; A = delta + A' / 4 unless done.
    np.testing.assert_allclose(got, [[1.6875, 1, 1.5], [2.75, 0, 2], [3, 3, 3]], rtol=1e-6)


def test_moments_are_those_of_all_that_came():
    first, second = np.random.default_rng(0).normal(3, 2, (2, 5, 4, 2)).astype(np.float32)
    moments = example.Moments(jnp.zeros(2), jnp.ones(2), jnp.float32(1e-4))
    for batch in (first, second):
        moments = example.update_moments(moments, batch)
    seen = np.concatenate([first, second]).reshape(-1, 2)
    np.testing.assert_allclose(moments.mean, seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(moments.variance, seen.var(0), rtol=1e-3)
    normal = example.normalize(moments, seen)
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(normal.std(0), 1, atol=1e-3)


def test_log_prob_is_a_gaussians():
    params = {"policy": [(jnp.ones((1, 2)), jnp.array([0.0, 1.0]))], "log_std": jnp.log(jnp.array([0.5, 2.0]))}
    got = example.log_prob(params, jnp.array([[3.0]]), jnp.array([[2.5, 5.0]]))  # means 3 and 4
    assert float(got[0]) == pytest.approx(stats.norm.logpdf([2.5, 5], [3, 4], [0.5, 2]).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("ppo_clip", -1.25),  # 2 is clipped to 1.25
        ("kl_fixed", -2 + 0.25 * (1 - math.log(2))),  # KL(behavior || policy) by k3: r - 1 - log r
        ("kl_adaptive", -2 + 0.25 * (1 - math.log(2))),
        ("r2vpo_fixed", -2 + 0.25),
        ("r2vpo_adaptive", -2 + 0.25),
    ],
)
def test_loss_by_hand(method, expected):
    logp, behavior_logp = jnp.log(jnp.full((2, 3), 0.4)), jnp.log(jnp.full((2, 3), 0.2))
    got = example.policy_loss(method, logp, behavior_logp, jnp.ones((2, 3)), jnp.float32(0.25))
    assert float(got) == pytest.approx(expected, rel=1e-5)


@every_method
def test_all_objectives_start_with_the_policy_gradient(method):
    logp, advantages = jnp.log(jnp.array([[0.4, 0.2]])), jnp.array([[3.0, -1.0]])
    got = jax.grad(lambda x: example.policy_loss(method, x, logp, advantages, 0.25))(logp)
    np.testing.assert_allclose(got, -advantages / 2, atol=1e-6)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_coefficient_doubles_far_above_the_bound(method):
    multiplier = example.initial_multiplier(example.Config(method=method), 0.01)
    moved = example.adapt(method, multiplier, 0.01, jnp.float32(1), jnp.float32(1))
    assert float(getattr(moved, "variance_coef", moved)) == pytest.approx(2.0)


@every_method
def test_training(method):
    keys = jax.random.split(jax.random.key(0), 3)
    metrics = trained(method, keys)
    assert {x.shape for x in metrics.values()} == {(3, TINY["iterations"])}
    assert all(np.isfinite(x).all() for x in metrics.values())
    np.testing.assert_array_equal(metrics["episodes"].sum(-1), 4 * (3 * 8 // HORIZON))
    assert len(np.unique(metrics["return_sum"][:, -1])) == 3, "seeds differ"
    assert (metrics["ratio_variance"] > 0).all()
    moves = np.ptp(metrics["coef"], axis=1) > 0
    assert moves.all() if method in ADAPTIVE else not moves.any()


def test_a_seed_alone_is_as_among_others():
    keys = jax.random.split(jax.random.key(0), 3)
    among = trained("r2vpo_adaptive", keys)
    alone = jax.jit(example.make_train(example.Config(method="r2vpo_adaptive", **TINY), toy()))(keys[1], 0.02)
    for name, values in alone.items():
        np.testing.assert_allclose(values, among[name][1], rtol=1e-4, atol=1e-4, err_msg=name)


def test_knobs_may_be_mapped_over_too():
    train = example.make_train(example.Config(method="r2vpo_fixed", **TINY), toy())
    metrics = jax.jit(jax.vmap(train, (None, 0)))(jax.random.key(0), jnp.array([0.0, 100.0]))
    loose, tight = metrics["ratio_variance"][:, -1]
    assert tight < loose
    np.testing.assert_array_equal(metrics["coef"][:, 0], [0, 100])


def test_it_learns_the_toy():
    longer = {"iterations": 30, "num_envs": 8, "rollout_length": 20, "epochs": 4, "learning_rate": 1e-2}
    metrics = trained("r2vpo_adaptive", jax.random.split(jax.random.key(0), 3), **longer)
    first = metrics["return_sum"][:, 0] / metrics["episodes"][:, 0]
    assert (example.final_return(metrics) > first / 2).all(), "returns are below 0: half as bad is better"


def test_final_return_is_that_of_the_last_tenth():
    metrics = {"return_sum": jnp.arange(20.0), "episodes": jnp.full(20, 2.0)}
    assert float(example.final_return(metrics)) == (18 + 19) / 4


def test_refusals():
    with pytest.raises(ValueError, match="unknown method 'trpo'"):
        example.make_train(example.Config(method="trpo"), toy())
    with pytest.raises(ValueError, match="3 minibatches do not divide 8 steps"):
        example.make_train(example.Config(rollout_length=8, minibatches=3), toy())


# With gymnax ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pendulum():
    pytest.importorskip("gymnax", reason="the environments of the example: pip install 'r2vpo_jax[control]'")
    return example.gymnax_environment("Pendulum-v1")


def test_gymnax_actions_are_scaled_and_observations_of_the_end_kept(pendulum):
    assert (pendulum.observation_size, pendulum.action_size) == (3, 1)
    state, observation = pendulum.reset(jax.random.key(0))
    free, pushed = (pendulum.step(jax.random.key(1), state, jnp.array([a])) for a in (0.0, 5.0))
    assert float(free[3] - pushed[3]) == pytest.approx(0.001 * 2**2, abs=1e-5)  # torque 2 is the largest
    np.testing.assert_array_equal(free[1], free[2])
    last = state.replace(time=199)
    _, following, end, _, terminated, done = pendulum.step(jax.random.key(1), last, jnp.array([0.0]))
    assert not terminated
    assert done
    np.testing.assert_allclose(end, free[2], rtol=1e-6)
    assert not np.allclose(following, end)


def test_training_on_gymnax(pendulum):
    metrics = trained("r2vpo_adaptive", jax.random.split(jax.random.key(0), 2), pendulum)
    assert all(np.isfinite(x).all() for x in metrics.values())
    assert metrics["kl"][0, -1] != metrics["kl"][1, -1]


@every_method
@pytest.mark.parametrize("env", study.ENVIRONMENTS)
def test_every_program_of_the_study_can_be_traced(pendulum, env, method):
    train = example.make_train(example.Config(env=env, method=method, **TINY))
    shapes = jax.eval_shape(train, jax.random.key(0), jnp.float32(1))
    assert {x.shape for x in shapes.values()} == {(TINY["iterations"],)}


# The study -------------------------------------------------------------------------------------------------------


def test_students_interval():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)  # t of 2 degrees of freedom, deviation 1


def test_verdicts_hold_for_all_comparisons_at_once():
    # At 2 degrees of freedom and 1 - 0.05 / 12 the quantile is 15.46, so the half width of these is 8.93.
    assert study.COMPARISONS == 12
    for shift, expected in ((9.2, "better"), (8.6, "cannot be told"), (-9.2, "worse")):
        assert study.verdict(np.array([-1.0, 0.0, 1.0]) + shift) == expected


def test_the_page_shows_the_saved_results():
    results = json.loads((ROOT / "docs" / "results" / "data" / "continuous_control.json").read_text())
    page = (ROOT / "docs" / "results" / "continuous_control.md").read_text()
    assert study.table(results) in page
    assert study.tuning_table(results) in page
    for runs in results["runs"].values():
        for method, grid in study.GRIDS.items():
            best = int(np.argmax(np.mean(runs[method]["tuning_scores"], axis=1)))
            assert (runs[method]["grid"], runs[method]["knob"]) == (list(grid), grid[best])
            assert len(runs[method]["scores"]) == len(study.TEST_SEEDS)
