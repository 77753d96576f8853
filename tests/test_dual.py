"""The multiplier against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from r2vpo_jax import dual, losses

SETTINGS = {"budget": 0.04, "step": 0.004, "max_coef": 50.0}
MULTIPLICATIVE = SETTINGS | {"rule": "multiplicative"}
RULES = pytest.mark.parametrize("rule", dual.RULES)


@functools.cache
def _update(jit, **kwargs):
    function = functools.partial(dual.update, **kwargs)
    return jax.jit(function) if jit else function


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("coef", "variance", "changed", "expected"),
    [
        (1.0, 0.06, {}, 1.002),  # 1 + .004 * .5
        (1.0, 0.02, {}, 0.998),  # 1 - .004 * .5
        (1.0, 0.04, {}, 1.0),  # on budget
        (0.0, 0.02, {}, 0.0),  # never below 0
        (0.001, 0.0, {}, 0.0),  # .001 - .004
        (49.9, 2.04, {}, 50.0),  # 49.9 + .2, never above max_coef
        (2.0, 0.54, {"step": 0.5, "max_step": 1.0}, 3.0),  # .5 * 12.5 = 6.25, bounded
        (2.0, 0.0, {"step": 2.0, "max_step": 1.0}, 1.0),  # -2, bounded
        (0.5, 0.0, {"step": 2.0, "max_step": 1.0}, 0.0),  # the bound comes before the projection
        (2.0, 0.06, {"step": 0.5, "max_step": 1.0}, 2.25),  # inside the bound
        (2.0, np.inf, {"max_step": 1.0}, 3.0),
        (2.0, np.inf, {}, 50.0),
    ],
)
def test_update(coef, variance, changed, expected, jit):
    state = _update(jit, **SETTINGS | changed)(dual.init(coef), jnp.float32(variance))
    np.testing.assert_allclose(state.variance_coef, expected, rtol=1e-6)
    assert state.variance_coef.dtype == jnp.float32


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("coef", "variance", "changed", "expected"),
    [
        (1.0, 0.06, {}, 1.002002),  # exp(.004 * .5)
        (1.0, 0.02, {}, 0.998002),  # exp(-.004 * .5)
        (1.0, 0.04, {}, 1.0),  # on budget
        # A step of c moves by exp(c) at twice the budget, by exp(-c) at V = 0; here c = .5.
        (2.0, 0.08, {"step": 0.5}, 3.297443),  # 2 * 1.648721
        (2.0, 0.0, {"step": 0.5}, 1.213061),  # 2 / 1.648721
        (2.0, 0.54, {"step": 0.5, "max_step": 1.0}, 5.436564),  # 6.25, bounded: 2 e
        (2.0, 0.0, {"step": 2.0, "max_step": 1.0}, 0.735759),  # -2, bounded: 2 / e
        (2.0, 0.06, {"step": 0.5, "max_step": 1.0}, 2.568051),  # inside the bound: 2 * 1.284025
        (49.9, 2.04, {}, 50.0),  # 49.9 * 1.2214, never above max_coef
        (2e-6, 0.0, {"step": 1.0}, 1e-6),  # 2e-6 / e, never below 1e-6
        (0.0, 0.02, {}, 1e-6),  # from 0 it could not rise
        (0.0, 0.06, {}, 1e-6),
        (2.0, np.inf, {"max_step": 1.0}, 5.436564),
        (2.0, np.inf, {}, 50.0),
        (0.0, np.inf, {"max_step": 1.0}, 1e-6),
    ],
)
def test_multiplicative_update(coef, variance, changed, expected, jit):
    state = _update(jit, **MULTIPLICATIVE | changed)(dual.init(coef), jnp.float32(variance))
    np.testing.assert_allclose(state.variance_coef, expected, rtol=1e-6)
    assert state.variance_coef.dtype == jnp.float32


def test_from_zero_an_unbounded_multiplicative_step_is_a_number():
    # V = 250 budgets with a step of .5: exp(124.5) is infinite in float32, and 0 times that must not be NaN.
    state = dual.update(dual.init(0.0), jnp.float32(10.0), **MULTIPLICATIVE | {"step": 0.5})
    assert 1e-6 <= state.variance_coef <= 50


def _repeat(state, variance, times, **settings):
    return jax.lax.fori_loop(0, times, lambda _, s: dual.update(s, jnp.float32(variance), **settings), state)


def test_multiplicative_rule_never_reaches_zero():
    settings = MULTIPLICATIVE | {"step": 0.5}
    low = _repeat(dual.init(2.5), 0.0, 200, **settings)
    np.testing.assert_allclose(low.variance_coef, 1e-6, rtol=1e-6)
    # From there V = 2 budget raises it by exp(.5) a step: 20 steps are a factor of e^10.
    np.testing.assert_allclose(_repeat(low, 0.08, 20, **settings).variance_coef, 1e-6 * np.exp(10), rtol=1e-4)
    # The projected rule does reach 0.
    assert _repeat(dual.init(2.5), 0.0, 200, **SETTINGS | {"step": 0.5}).variance_coef == 0


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_multiplicative_rule_knows_no_scale(factor):
    variances = np.random.default_rng(0).uniform(0.0, 0.1, 5).astype(np.float32)
    settings = MULTIPLICATIVE | {"step": 0.5}
    one, other = dual.init(1.0), dual.init(factor)
    for variance in variances:
        one, other = (_update(True, **settings)(state, variance) for state in (one, other))
        np.testing.assert_allclose(other.variance_coef, factor * one.variance_coef, rtol=1e-5)
    assert abs(one.variance_coef - 1) > 0.01


@RULES
def test_opposite_moves_cancel(rule):
    state = dual.init(2.5)
    for variance in (0.06, 0.02):
        state = dual.update(state, jnp.float32(variance), **SETTINGS | {"step": 0.5}, rule=rule)
        assert variance != 0.06 or state.variance_coef > 2.7
    np.testing.assert_allclose(state.variance_coef, 2.5, rtol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.floats(2.0**-19, 50.0, width=32),
    st.floats(0.0, 2.0**100, width=32),
    st.sampled_from(dual.RULES),
    st.sampled_from([None, 1.0]),
)
def test_extremes_stay_within_bounds(coef, variance, rule, max_step):
    update = _update(True, **SETTINGS | {"step": 0.5, "rule": rule, "max_step": max_step})
    coef, variance = np.float32(coef), np.float32(variance)
    after = update(dual.init(coef), variance).variance_coef
    assert 0 <= after <= 50
    # It rises above the budget and falls below.
    assert (after >= coef * (1 - 1e-6)) if variance >= 0.04 else (after <= coef * (1 + 1e-6))


def test_unknown_rule():
    with pytest.raises(ValueError, match="unknown dual rule 'additive'; one of"):
        dual.update(dual.init(1.0), jnp.float32(0.04), **SETTINGS, rule="additive")


def test_one_outlier_token_moves_a_bounded_multiplier_by_one_step():
    # r = 100 in ten thousand tokens: V = 99^2 / 1e4 = .98. With c = .5, so 12.5 a unit, the move is 11.8.
    settings = SETTINGS | {"step": 0.5}
    variance = jnp.float32(99**2 / 1e4)
    free = dual.update(dual.init(2.5), variance, **settings)
    bounded = dual.update(dual.init(2.5), variance, **settings, max_step=1.0)
    np.testing.assert_allclose(free.variance_coef, 2.5 + 12.5 * (0.9801 - 0.04), rtol=1e-5)
    np.testing.assert_allclose(bounded.variance_coef, 3.5, rtol=1e-6)


@RULES
@pytest.mark.parametrize("max_step", [None, 1.0])
def test_nan_propagates(max_step, rule):
    update = functools.partial(dual.update, **SETTINGS, max_step=max_step, rule=rule)
    state = update(dual.init(1.0), jnp.float32(jnp.nan))
    assert np.isnan(state.variance_coef)
    assert np.isnan(update(state, jnp.float32(0.04)).variance_coef)


@RULES
def test_no_gradient(rule):
    def coef(start, variance):
        return dual.update(dual.init(start), variance, **SETTINGS, rule=rule).variance_coef

    assert jax.grad(coef, argnums=(0, 1))(1.0, 0.06) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("projected", [0.997, 6.002]),  # 1 - .1 * .03, 6 + .1 * .02
        ("multiplicative", [0.997004, 6.012012]),  # exp(-.003), 6 exp(.002)
    ],
)
def test_vmap_over_multipliers(rule, expected):
    update = functools.partial(dual.update, **SETTINGS, rule=rule)
    states = jax.vmap(lambda c: update(dual.init(c), c / 100))(jnp.asarray([1.0, 6.0]))
    np.testing.assert_allclose(states.variance_coef, expected, rtol=1e-6)


def test_masked_tokens_do_not_move_it():
    # r - 1 = .5 and 0 where it counts: V = .125. Under the mask r = e^5 or NaN.
    logp = np.asarray([[np.log(1.5), 5.0], [0.0, np.nan]], np.float32)
    mask = np.asarray([[True, False], [True, False]])
    loss = jax.jit(functools.partial(losses.r2vpo_loss, variance_coef=1.0))
    _, stats = loss(logp, np.zeros((2, 2)), np.ones(2), mask)
    total, number = stats["ratio_variance"]
    state = dual.update(dual.init(1.0), total / number, **SETTINGS)
    np.testing.assert_allclose(state.variance_coef, 1.0085, rtol=1e-6)  # 1 + .1 * (.125 - .04)


def test_ratio_variance_is_a_scalar():
    with pytest.raises(AssertionError, match="Chex"):
        dual.update(dual.init(1.0), jnp.ones(3), **SETTINGS)


@pytest.mark.parametrize("coef", [0, 2.5, 50.0])
def test_init(coef):
    state = dual.init(coef)
    assert state.variance_coef == coef
    assert state.variance_coef.dtype == jnp.float32
    # The rest has nothing to remember yet; each leaf is a buffer of its own, so that the state can be donated.
    assert jax.tree.leaves(state) == [coef, coef, 0, 0, 0]
    assert len({leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(dual.init(state.variance_coef))}) == 5


@pytest.mark.parametrize("coef", [-0.1, float("nan"), float("inf")])
def test_init_refuses(coef):
    with pytest.raises(ValueError, match="finite number >= 0"):
        dual.init(coef)


# The scale of the advantages --------------------------------------------------------------------------

scale_of = jax.jit(dual.advantage_scale)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("advantages", "lengths", "expected"),
    [
        ([[1, 1, 1], [-1, -1, -1]], [3, 3], 1.0),
        ([[3, 4, np.nan], [0, np.inf, np.nan]], [2, 1], 2.886751),  # sqrt((9 + 16 + 0) / 3)
        ([3, -1], [1, 3], 1.732051),  # one number a response: sqrt((9 + 3 * 1) / 4)
        ([3, np.nan], [2, 0], 3.0),
        ([[2, 2, 2], [5, 5, 5]], [0, 0], 0.0),
        ([0, 0], [3, 1], 0.0),
    ],
)
def test_advantage_scale(advantages, lengths, expected, jit):
    mask = np.arange(3) < np.asarray(lengths)[:, None]
    actual = (scale_of if jit else dual.advantage_scale)(jnp.asarray(advantages, jnp.float32), mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(dual.advantage_scale(np.float32(advantages), mask.astype(np.int32)), expected, rtol=1e-6)


def _arrays():
    rng = np.random.default_rng(0)
    behavior_logp = -rng.exponential(1.0, (4, 5)).astype(np.float32)
    mask = np.arange(5) < np.asarray([5, 2, 3, 1])[:, None]
    logp = behavior_logp + rng.normal(0.0, 0.3, (4, 5)).astype(np.float32)
    return logp, behavior_logp, rng.normal(0.0, 1.0, (4, 5)).astype(np.float32), mask


@pytest.mark.parametrize("factor", [-1.0, 1e-3, 10.0])
def test_the_scale_is_proportional_to_the_advantages(factor):
    *_, advantages, mask = _arrays()
    np.testing.assert_allclose(
        scale_of(np.float32(factor) * advantages, mask), abs(factor) * scale_of(advantages, mask), rtol=1e-5
    )


def test_the_scale_sees_tokens_not_places():
    *_, advantages, mask = _arrays()
    expected = scale_of(advantages, mask)
    order = np.random.default_rng(1).permutation(20)
    permuted = [x.reshape(-1)[order].reshape(4, 5) for x in (advantages, mask)]
    np.testing.assert_allclose(scale_of(*permuted), expected, rtol=1e-6)
    padded = [np.pad(advantages, ((0, 0), (0, 3)), constant_values=np.nan), np.pad(mask, ((0, 0), (0, 3)))]
    np.testing.assert_allclose(dual.advantage_scale(*padded), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(dual.advantage_scale)(advantages[None], mask[None]), [expected], rtol=1e-6)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_with_the_scale_the_loss_is_proportional_to_the_advantages(factor):
    logp, behavior_logp, advantages, mask = _arrays()

    @jax.jit
    def loss(logp, advantages):
        coef = dual.advantage_scale(advantages, mask) * 2.5
        return losses.r2vpo_loss(logp, behavior_logp, advantages, mask, variance_coef=coef)[0]

    value, grad = jax.value_and_grad(loss)(logp, advantages)
    scaled_value, scaled_grad = jax.value_and_grad(loss)(logp, np.float32(factor) * advantages)
    np.testing.assert_allclose(scaled_value, factor * value, rtol=1e-5)
    np.testing.assert_allclose(scaled_grad, factor * grad, rtol=1e-4, atol=1e-6)
    # Without it, it is not.
    fixed = losses.r2vpo_loss(logp, behavior_logp, np.float32(factor) * advantages, mask, variance_coef=2.5)[0]
    assert abs(fixed - scaled_value) > 1e-2 * abs(scaled_value)


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_with_the_scale_the_gradient_turns_back_in_units_of_the_deviation(factor):
    # A = (3, -1), sigma = sqrt(5), lambda = 2.5: r* = 1 + 3 / (5 sqrt(5)) = 1.268328 and 1 - 1 / (5 sqrt(5)) = .910557.
    ratio = np.asarray([[1.268328], [0.910557]], np.float32)
    advantages = np.float32(factor) * np.asarray([3.0, -1.0], np.float32)
    mask = np.ones((2, 1), bool)
    coef = dual.advantage_scale(advantages, mask) * 2.5

    def loss(logp):
        return losses.r2vpo_loss(logp, np.zeros((2, 1), np.float32), advantages, mask, variance_coef=coef)[0]

    grad = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(grad(np.log(ratio)), 0.0, atol=1e-5 * factor)
    assert np.all(np.abs(grad(np.log(ratio - 0.01))) > 0.01 * factor)


def test_the_scale_has_no_gradient():
    # Not even where the root has none: at 0.
    *_, advantages, mask = _arrays()
    for x in (advantages, np.zeros_like(advantages)):
        np.testing.assert_array_equal(jax.grad(dual.advantage_scale)(x, mask), 0.0)


def test_a_nan_that_counts_is_not_hidden():
    *_, advantages, mask = _arrays()
    advantages[0, 0] = np.nan
    assert np.isnan(scale_of(advantages, mask))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(np.float32, (4, 5), elements=st.floats(-(2.0**50), 2.0**50, width=32)),
    hnp.arrays(bool, (4, 5)),
)
def test_the_scale_of_extremes(advantages, mask):
    actual = scale_of(advantages, mask)
    largest = np.max(np.abs(advantages), where=mask, initial=0.0)
    assert largest / np.sqrt(20) * (1 - 1e-5) - 1e-18 <= actual <= largest * (1 + 1e-5)


@pytest.mark.parametrize("shapes", [((3,), (2, 3)), ((2, 3), (2, 4)), ((2, 1), (2, 3)), ((), (2, 3)), ((3,), (3,))])
def test_the_scale_refuses_wrong_shapes(shapes):
    with pytest.raises(AssertionError, match="Chex"):
        dual.advantage_scale(*map(np.ones, shapes))


def test_no_implicit_rank_promotion():
    *_, advantages, mask = _arrays()
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(dual.advantage_scale, advantages, mask)
        jax.eval_shape(dual.advantage_scale, advantages[:, 0], mask)
        for rule in dual.RULES:
            update = functools.partial(dual.update, **SETTINGS, max_step=1.0, rule=rule)
            jax.eval_shape(update, dual.init(1.0), jnp.float32(0.04))
