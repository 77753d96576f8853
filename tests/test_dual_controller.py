"""Averaging, carrying over and the proportional part of the multiplier, against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_jax import dual
from r2vpo_jax.config import make_objective
from r2vpo_jax.train_stats import TrainStats
from r2vpo_jax.training import update

SETTINGS = {"budget": 0.04, "step": 0.5, "max_step": 1.0, "max_coef": 50.0}
OPTIONS = {"smoothing": 0.5, "carry": 3.0, "proportional": 0.3}
RULES = pytest.mark.parametrize("rule", dual.RULES)
INF = float("inf")


def trajectory(coef, variances, *, rule="projected", **numbers):
    """The states after each V, with the numbers traced."""

    @functools.partial(jax.jit, static_argnames="rule")
    def run(coef, variances, numbers, rule):
        def one(state, variance):
            state = dual.update(state, variance, **numbers, rule=rule)
            return state, state

        return jax.lax.scan(one, dual.init(coef), variances)[1]

    return run(jnp.float32(coef), jnp.asarray(variances, jnp.float32), SETTINGS | numbers, rule=rule)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("projected", [1.5, 1.666667, 1.595238]),
        ("multiplicative", [1.648721, 1.947734, 1.813463]),  # exp(.5), exp(.5 + .5/3), exp(.5 + .5/3 - .5/7)
    ],
)
def test_smoothing(rule, expected):
    # e = 1, 0, -.5; average .5, .25, -.125 over weights .5, .75, .875: a = 1, 1/3, -1/7.
    states = trajectory(1.0, [0.08, 0.04, 0.02], rule=rule, smoothing=0.5)
    np.testing.assert_allclose(states.average, [0.5, 0.25, -0.125], rtol=1e-6)
    np.testing.assert_allclose(states.weight, [0.5, 0.75, 0.875], rtol=1e-6)
    np.testing.assert_allclose(states.variance_coef, expected, rtol=1e-6)
    np.testing.assert_array_equal(states.integral, states.variance_coef)


@pytest.mark.parametrize(
    ("rule", "start", "variances", "changed", "coef", "carried"),
    [
        # e = 12.5 asks for 6.25: 1 is made, 5.25 carried. Then 0, and -1, which takes .5 off.
        ("projected", 2.0, [0.54, 0.04, 0.0], {"carry": INF}, [3, 4, 5], [5.25, 4.25, 2.75]),
        ("projected", 2.0, [0.54, 0.04, 0.0], {"carry": 2.0}, [3, 4, 4.5], [2, 1, 0]),
        ("projected", 2.0, [0.54, 0.04, 0.0], {"carry": 0.0}, [3, 3, 2.5], [0, 0, 0]),
        # In moves of max_step: 2 * .5.
        ("projected", 2.0, [0.54, 0.04, 0.04], {"carry": 2.0, "max_step": 0.5}, [2.5, 3, 3.5], [1, 0.5, 0]),
        # No more than there is room for below the cap, and above 0.
        ("projected", 2.0, [0.54, 0.54, 0.0], {"carry": INF, "max_coef": 4.0}, [3, 4, 3.5], [1, 0, 0]),
        ("projected", 1.5, [0.0, 0.04, 0.08], {"carry": INF, "step": 3.0}, [0.5, 0, 1], [-0.5, 0, 2]),
        # ln(50 / 2e) = 2.218876, less 1 a move; the last move is what is left.
        (
            "multiplicative",
            2.0,
            [0.54, 0.04, 0.04, 0.04, 0.0],
            {"carry": INF},
            [5.436564, 14.778112, 40.171074, 50, 30.326533],
            [2.218876, 1.218876, 0.218876, 0, 0],
        ),
        ("multiplicative", 2.0, [0.54, 0.04], {"carry": 0.5}, [5.436564, 8.963378], [0.5, 0]),  # 2e, 2e^1.5
        ("multiplicative", 2e-6, [0.0, 0.08], {"carry": INF, "step": 9.0}, [1e-6, 2.718282e-6], [0, 8]),
    ],
)
def test_carry(rule, start, variances, changed, coef, carried):
    states = trajectory(start, variances, rule=rule, **changed)
    np.testing.assert_allclose(states.variance_coef, coef, rtol=2e-6)
    np.testing.assert_allclose(states.carried, carried, atol=2e-6)


@pytest.mark.parametrize(
    ("rule", "integral", "coef"),
    [
        # e = .5, 0, -1: the proportional part is 1, 0 and -2, bounded at -1.
        ("projected", [1.25, 1.25, 0.75], [2.25, 1.25, 0.0]),
        ("multiplicative", [1.284025, 1.284025, 0.778801], [3.490343, 1.284025, 0.286505]),  # times e, 1, 1/e
    ],
)
def test_proportional(rule, integral, coef):
    states = trajectory(1.0, [0.06, 0.04, 0.0], rule=rule, proportional=2.0)
    np.testing.assert_allclose(states.integral, integral, rtol=1e-6)
    np.testing.assert_allclose(states.variance_coef, coef, rtol=2e-6)


def test_all_at_once():
    # a = 12.5, then (.5 * 6.25 + .5 * -1) / .75 = 3.5. Wanted 6.25: 1 is made, 3 carried; then 3 + 1.75: 1 and 3.
    states = trajectory(2.0, [0.54, 0.0], **OPTIONS)
    np.testing.assert_allclose(states.integral, [3, 4], rtol=1e-6)
    np.testing.assert_allclose(states.carried, [3, 3], rtol=1e-6)
    np.testing.assert_allclose(states.variance_coef, [4, 5], rtol=1e-6)  # the proportional 3.75 and 1.05 are bounded


@RULES
def test_a_steady_error_is_the_same_averaged_or_not(rule):
    """The average has no start to forget: with every e the same, it is e from the first update on."""
    plain, averaged = (trajectory(1.0, [0.05] * 20, rule=rule, smoothing=s).variance_coef for s in (0.0, 0.9))
    np.testing.assert_allclose(plain, averaged, rtol=1e-5)


def _before_the_options(coef, variance, *, budget, step, max_coef, max_step, rule):
    """The rules as they were when they were the whole controller."""
    move = jnp.clip(step * (variance / budget - 1), -max_step, max_step)
    if rule == "projected":
        return jnp.clip(coef + move, 0.0, max_coef)
    return jnp.clip(coef * jnp.exp(jnp.clip(move, -60.0, 60.0)), 1e-6, max_coef)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@RULES
def test_without_options_it_is_the_old_rule_bit_for_bit(rule, jit):
    rng = np.random.default_rng(0)
    fixed = {"budget": 0.0006, "step": 0.15, "max_coef": 7.0, "max_step": 0.5, "rule": rule}
    functions = [functools.partial(f, **fixed) for f in (dual.update, _before_the_options)]
    new, old = map(jax.jit, functions) if jit else functions
    state, coef = dual.init(2.0), jnp.float32(2.0)
    seen = []
    for variance in (0.0006 * rng.lognormal(0, 1.3, 200 if jit else 30)).astype(np.float32):
        state, coef = new(state, variance), old(coef, variance)
        assert state.variance_coef == coef
        assert state.integral == coef
        assert state.carried == 0
        seen.append(float(coef))
    assert np.std(seen) > 0.1


@RULES
def test_traced_numbers_are_static_numbers(rule):
    variances = np.random.default_rng(1).lognormal(np.log(0.04), 1.0, 20).astype(np.float32)
    numbers = SETTINGS | OPTIONS
    static = jax.jit(functools.partial(dual.update, **numbers, rule=rule))
    state = dual.init(2.0)
    for number, variance in enumerate(variances):
        state = static(state, variance)
        traced = jax.tree.map(lambda x: x[number], trajectory(2.0, variances, rule=rule, **OPTIONS))  # noqa: B023
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), state, traced)


@RULES
def test_vmap_over_every_number_is_one_by_one(rule):
    rng = np.random.default_rng(2)
    variances = rng.lognormal(np.log(0.04), 1.0, 20).astype(np.float32)
    numbers = {
        "budget": [0.04, 0.02, 0.06],
        "step": [0.5, 0.1, 1.0],
        "max_step": [1.0, 0.3, INF],
        "max_coef": [50.0, 5.0, 20.0],
        "smoothing": [0.0, 0.5, 0.9],
        "carry": [INF, 0.0, 2.0],
        "proportional": [0.0, 0.3, 1.0],
    }
    starts = np.asarray([1.0, 2.0, 3.0], np.float32)
    side_by_side = jax.vmap(lambda start, row: trajectory(start, variances, rule=rule, **row))(
        starts, {name: np.asarray(values, np.float32) for name, values in numbers.items()}
    )
    assert np.all(np.isfinite(side_by_side.carried))
    for i, start in enumerate(starts):
        one = trajectory(start, variances, rule=rule, **{name: values[i] for name, values in numbers.items()})
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),  # noqa: B023
            side_by_side,
            one,
        )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(0.0, 40.0, width=32), min_size=1, max_size=30).map(lambda x: (x * 30)[:30]),
    st.sampled_from(dual.RULES),
    st.sampled_from([0.0, 0.5]),
)
def test_with_everything_carried_the_moves_add_up_to_the_uncut_ones(ratios, rule, smoothing):
    """V up to 40 budgets, at the middle of a range that 30 moves do not leave."""
    cut = trajectory(
        1e3, 0.04 * np.asarray(ratios), rule=rule, smoothing=smoothing, carry=INF, step=0.1, max_step=0.3, max_coef=1e33
    )
    coef = np.asarray(cut.variance_coef, np.float64)
    position = coef if rule == "projected" else np.log(coef)
    start = 1e3 if rule == "projected" else np.log(1e3)
    errors = np.asarray(cut.average / cut.weight, np.float64)
    assert np.all(np.abs(np.diff(position, prepend=start)) <= 0.3 * (1 + 1e-3))
    below_the_log_room = rule == "projected" or np.max(np.cumsum(0.1 * errors)) < np.log(1e33 / 1e3)
    if below_the_log_room:
        np.testing.assert_allclose(position - start + cut.carried, np.cumsum(0.1 * errors), atol=5e-3)


@RULES
def test_carrying_holds_the_mean_of_a_heavy_tail(rule):
    """V falls as lambda rises, with noise of which the bound cuts off a half: only carrying brings the mean to delta."""
    rng = np.random.default_rng(0)
    noise = rng.lognormal(-0.5 * 1.3**2, 1.3, (64, 400)).astype(np.float32)
    noise /= noise.mean()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def mean_variance(noise, carry):
        def one(state, noise):
            variance = 0.12 / (1 + state.variance_coef) * noise  # delta = .04 at lambda = 2
            numbers = {"step": 0.1, "max_step": 0.15, "budget": 0.04, "max_coef": 50.0, "carry": carry}
            return dual.update(state, variance, **numbers, rule=rule), variance

        return jnp.mean(jax.lax.scan(one, dual.init(2.0), noise)[1][100:]) / 0.04

    lost, carried = (float(np.mean(mean_variance(noise, jnp.float32(c)))) for c in (0.0, INF))
    assert lost > 1.15
    assert abs(carried - 1) < 0.05


@RULES
@pytest.mark.parametrize("max_step", [None, 1.0])
def test_an_infinite_variance_does_not_leave_a_nan(max_step, rule):
    step = functools.partial(dual.update, **SETTINGS | OPTIONS | {"carry": INF, "max_step": max_step}, rule=rule)
    state = step(step(dual.init(1.0), jnp.float32(INF)), jnp.float32(0.04))
    assert np.all(np.isfinite(jax.tree.leaves(state)))
    assert 0 <= state.variance_coef <= 50


@RULES
def test_a_nan_is_not_hidden_by_the_options(rule):
    state = dual.update(dual.init(1.0), jnp.float32(jnp.nan), **SETTINGS | OPTIONS, rule=rule)
    assert np.isnan(state.variance_coef)


@pytest.mark.parametrize(("num_updates", "factor"), [(2, 4.0), (4, 16 / 9), (8, 64 / 49)])
def test_end_of_batch_variance(num_updates, factor):
    np.testing.assert_allclose(dual.end_of_batch_variance(jnp.float32(0.003), num_updates), 0.003 * factor, rtol=1e-6)


@pytest.mark.parametrize("num_updates", [0, 1])
def test_one_update_says_nothing_about_the_end(num_updates):
    with pytest.raises(ValueError, match="takes at least 2"):
        dual.end_of_batch_variance(jnp.float32(0.003), num_updates)
    with pytest.raises(ValueError, match="takes at least 2"):
        dual.pooled_variance(jnp.zeros(num_updates), jnp.ones(num_updates))


@pytest.mark.parametrize(
    ("added", "counts", "expected"),
    [
        ([0.0, 0.01], [7, 5], 0.04),
        ([0.0, 0.01, 0.04], [1, 1, 1], 0.09),  # as it should grow
        ([0.0, 0.01, 0.04], [5, 1, 3], 0.09),
        ([0.0, 0.02, 0.04], [1, 1, 1], 0.108),  # .06 / (5 / 9)
        ([0.0, 0.02, 0.04], [9, 2, 1], 0.12),  # .08 / (6 / 9)
        ([0.0, 0.02, 0.04], [9, 0, 1], 0.09),  # a minibatch in which nothing counts
        ([0.0, np.nan, 0.04], [1, 1, 1], np.nan),
    ],
)
def test_pooled_variance(added, counts, expected):
    actual = jax.jit(dual.pooled_variance)(jnp.asarray(added, jnp.float32), jnp.asarray(counts, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


# ---- as a rollout batch uses it ----


def stepped(dual_options, first, last, **given):
    """(state, signal) after a batch of two updates that measured V = first and last."""
    objective = make_objective("r2vpo_before", dual={"budget": 0.04, "coef": 1.0, "step": 0.5} | dual_options)
    run = update.UpdateSettings(objective, group_size=2, num_minibatches=2)
    one = jnp.float32(1)
    all_stats = [
        TrainStats({"ratio_variance": (jnp.float32(v), one), "nonfinite": (0 * one, one)}, {}, jnp.zeros(1), {})
        for v in (first, last)
    ]
    state, _, report = update.step_multipliers(dual.init(1.0), jnp.float32(0), all_stats, run, **given)
    return state, report.dual_signal


@pytest.mark.parametrize(
    ("options", "given", "signal", "coef"),
    [
        ({}, {}, 0.03, 0.875),
        ({"measure": "corrected"}, {}, 0.12, 2.0),  # (2 / 1)^2
        ({"measure": "corrected", "signal": "excess"}, {}, 0.08, 1.5),  # 4 * (.03 - .01)
        ({"measure": "pooled", "signal": "excess"}, {}, 0.08, 1.5),  # 4 * (.03 - .01)
        ({"measure": "pooled"}, {}, 0.09, 1.625),  # and the .01 that were there before
        ({"measure": "after"}, {"variance_after": 0.06}, 0.06, 1.25),
        ({"measure": "after", "signal": "excess"}, {"variance_after": 0.06, "variance_before": 0.015}, 0.045, 1.0625),
        ({"proportional": 1.0}, {}, 0.03, 0.625),
        ({"smoothing": 0.5}, {}, 0.03, 0.875),
        ({"carry": 1.0, "max_step": 0.1}, {}, 0.03, 0.9),
    ],
)
def test_a_rollout_batch_steps_with_the_options(options, given, signal, coef):
    given = {name: jnp.float32(value) for name, value in given.items()}
    state, seen = stepped(options, 0.01, 0.03, **given)
    np.testing.assert_allclose(seen, signal, rtol=1e-6)
    np.testing.assert_allclose(state.variance_coef, coef, rtol=1e-6)
    if "carry" in options:
        np.testing.assert_allclose(state.carried, -0.025, rtol=1e-4)


@pytest.mark.parametrize(("last", "given"), [(np.nan, {}), (0.03, {"variance_after": jnp.float32(np.nan)})])
def test_what_was_not_measured_leaves_all_of_the_controller_alone(last, given):
    options = OPTIONS | ({"measure": "after"} if given else {})
    state, _ = stepped(options, 0.01, last, **given)
    assert jax.tree.leaves(state) == jax.tree.leaves(dual.init(1.0))


def test_v_after_the_last_update_has_to_be_given():
    with pytest.raises(ValueError, match="objective.dual.measure=after needs variance_after"):
        stepped({"measure": "after"}, 0.01, 0.03)
    with pytest.raises(ValueError, match="and variance_before with stale data"):
        stepped({"measure": "after", "signal": "excess"}, 0.01, 0.03, variance_after=jnp.float32(0.06))
