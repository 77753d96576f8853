"""The multiplier against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import dual, losses

SETTINGS = {"budget": 0.04, "step_size": 0.1, "max_coef": 50.0}


@functools.cache
def _update(jit, **kwargs):
    function = functools.partial(dual.update, **kwargs)
    return jax.jit(function) if jit else function


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("coef", "variance", "changed", "expected"),
    [
        (1.0, 0.06, {}, 1.002),  # 1 + .1 * .02
        (1.0, 0.02, {}, 0.998),  # 1 - .1 * .02
        (1.0, 0.04, {}, 1.0),  # on budget
        (0.0, 0.02, {}, 0.0),  # never below 0
        (0.001, 0.0, {}, 0.0),  # .001 - .004
        (49.9, 2.04, {}, 50.0),  # 49.9 + .2, never above max_coef
        (2.0, 0.54, {"step_size": 12.5, "max_step": 1.0}, 3.0),  # 12.5 * .5 = 6.25, bounded
        (2.0, 0.0, {"step_size": 50.0, "max_step": 1.0}, 1.0),  # -2, bounded
        (0.5, 0.0, {"step_size": 50.0, "max_step": 1.0}, 0.0),  # the bound comes before the projection
        (2.0, 0.06, {"step_size": 12.5, "max_step": 1.0}, 2.25),  # inside the bound
        (2.0, np.inf, {"max_step": 1.0}, 3.0),
        (2.0, np.inf, {}, 50.0),
    ],
)
def test_update(coef, variance, changed, expected, jit):
    state = _update(jit, **SETTINGS | changed)(dual.init(coef), jnp.float32(variance))
    np.testing.assert_allclose(state.variance_coef, expected, rtol=1e-6)
    assert state.variance_coef.dtype == jnp.float32


def test_one_outlier_token_moves_a_bounded_multiplier_by_one_step():
    # r = 100 in ten thousand tokens: V = 99^2 / 1e4 = .98. With c = .5, so 12.5 a unit, the move is 11.8.
    settings = SETTINGS | {"step_size": 0.5 / 0.04}
    variance = jnp.float32(99**2 / 1e4)
    free = dual.update(dual.init(2.5), variance, **settings)
    bounded = dual.update(dual.init(2.5), variance, **settings, max_step=1.0)
    np.testing.assert_allclose(free.variance_coef, 2.5 + 12.5 * (0.9801 - 0.04), rtol=1e-5)
    np.testing.assert_allclose(bounded.variance_coef, 3.5, rtol=1e-6)


@pytest.mark.parametrize("max_step", [None, 1.0])
def test_nan_propagates(max_step):
    state = dual.update(dual.init(1.0), jnp.float32(jnp.nan), **SETTINGS, max_step=max_step)
    assert np.isnan(state.variance_coef)
    assert np.isnan(dual.update(state, jnp.float32(0.04), **SETTINGS, max_step=max_step).variance_coef)


def test_no_gradient():
    def coef(start, variance):
        return dual.update(dual.DualState(start), variance, **SETTINGS).variance_coef

    assert jax.grad(coef, argnums=(0, 1))(1.0, 0.06) == (0.0, 0.0)


def test_vmap_over_multipliers():
    states = jax.vmap(lambda c: dual.update(dual.DualState(c), c / 100, **SETTINGS))(jnp.asarray([1.0, 6.0]))
    np.testing.assert_allclose(states.variance_coef, [0.997, 6.002], rtol=1e-6)  # 1 - .1 * .03, 6 + .1 * .02


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
    assert jax.tree.leaves(state) == [state.variance_coef]


@pytest.mark.parametrize("coef", [-0.1, float("nan"), float("inf")])
def test_init_refuses(coef):
    with pytest.raises(ValueError, match="finite number >= 0"):
        dual.init(coef)
