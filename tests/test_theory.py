"""What the theory says about the objective, computed with the library's own functions.

Expectations are exact, not sampled: each action is one token, its weight is K times its probability under
the behavior policy mu, and the mean over the K tokens is then E_mu.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import dual, kl, losses, ratio_stats


def lagrangian(logits, behavior_logp, advantages, variance_coef):
    """(loss, E_mu[(r - 1)^2]) of a softmax policy over K actions."""
    logp = jax.nn.log_softmax(logits)[None]
    behavior_logp = jnp.asarray(behavior_logp, jnp.float32)[None]
    loss, stats = losses.r2vpo_loss(
        logp,
        behavior_logp,
        jnp.asarray(advantages, jnp.float32)[None],
        jnp.ones_like(logp, bool),
        variance_coef=variance_coef,
        weights=logp.shape[1] * jnp.exp(behavior_logp),
    )
    total, number = stats["ratio_variance"]
    return loss, total / number


compute_stats = jax.jit(ratio_stats.compute)


@jax.jit
def ratio_variance(logits, behavior_logp):
    return lagrangian(logits, behavior_logp, jnp.zeros_like(behavior_logp), 1.0)[1]


@jax.jit
def divergence(p, q):
    """KL(p || q), as k1's expectation under p."""
    return jnp.sum(p * kl.estimate(jnp.log(p), jnp.log(q), "k1"))


def random_pair(rng, scale, size=6):
    """Two distributions, the second at a distance from the first that grows with `scale`."""
    behavior = np.exp(rng.normal(0, 1, size))
    policy = behavior * np.exp(rng.normal(0, scale, size))
    return policy / policy.sum(), behavior / behavior.sum()


def test_two_actions_by_hand():
    # mu = (.5, .5), pi = (.6, .4): r = (1.2, .8), Var = .04.
    policy, behavior = np.asarray([0.6, 0.4]), np.asarray([0.5, 0.5])
    np.testing.assert_allclose(ratio_variance(np.log(policy), np.log(behavior)), 0.04, rtol=1e-5)
    np.testing.assert_allclose(divergence(behavior, policy), 0.020411, atol=1e-6)  # -log(.96) / 2
    np.testing.assert_allclose(divergence(policy, behavior), 0.020136, atol=1e-6)  # .6 log 1.2 + .4 log .8


def test_gaussians():
    # N(m, 1) against N(0, 1): KL = m^2 / 2 and chi^2 = exp(m^2) - 1. At KL = .02: .040811.
    x = np.linspace(-10, 10, 2001)
    mean = 0.2
    policy, behavior = (np.exp(-0.5 * (x - m) ** 2) for m in (mean, 0.0))
    policy, behavior = policy / policy.sum(), behavior / behavior.sum()
    np.testing.assert_allclose(divergence(policy, behavior), 0.02, rtol=1e-3)
    np.testing.assert_allclose(ratio_variance(np.log(policy), np.log(behavior)), 0.040811, rtol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_kl_is_half_the_variance_to_second_order(seed):
    # KL(pi || mu) = Var / 2 - E(r-1)^3 / 6 + ... and KL(mu || pi) = Var / 2 - E(r-1)^3 / 3 + ...
    policy, behavior = random_pair(np.random.default_rng(seed), 0.1)
    half = ratio_variance(np.log(policy), np.log(behavior)) / 2
    third, fourth = (behavior @ (policy / behavior - 1) ** k for k in (3, 4))
    for actual, factor in ((divergence(policy, behavior), 1 / 6), (divergence(behavior, policy), 1 / 3)):
        np.testing.assert_allclose(actual, half, rtol=0.1)
        np.testing.assert_allclose(actual, half - factor * third, atol=fourth + 1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_variance_bounds_the_divergences(scale):
    rng = np.random.default_rng(0)
    for _ in range(10):
        policy, behavior = random_pair(rng, scale)
        variance = float(ratio_variance(np.log(policy), np.log(behavior)))
        total_variation = 0.5 * np.sum(np.abs(policy - behavior))
        assert divergence(policy, behavior) <= np.log1p(variance) + 1e-5
        assert total_variation <= 0.5 * np.sqrt(variance) + 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_the_variance_is_the_chi_square_divergence(seed):
    # E_mu[r] = 1 for any policy, so E[(r-1)^2] is the variance of r: sum pi^2 / mu - 1.
    policy, behavior = random_pair(np.random.default_rng(seed), 1.0)
    expected = np.sum(policy**2 / behavior) - 1
    np.testing.assert_allclose(ratio_variance(np.log(policy), np.log(behavior)), expected, rtol=1e-4)


def test_clipped_ratios_lie_inside_the_variance_ball():
    # |r - 1| <= .2 everywhere implies Var <= .04, with equality only at the corners.
    rng = np.random.default_rng(0)
    for _ in range(20):
        behavior = rng.dirichlet(np.ones(6))
        excess = rng.uniform(-1, 1, 6)
        excess -= behavior @ excess
        excess *= 0.2 / np.max(np.abs(excess))
        policy = behavior * (1 + excess)
        np.testing.assert_allclose(policy.sum(), 1.0)
        assert ratio_variance(np.log(policy), np.log(behavior)) <= 0.04 * (1 + 1e-5)


@pytest.mark.parametrize("s", [0.1, 0.2, 0.999])
def test_effective_sample_size(s):
    # ESS / N = 1 / (1 + Var) for ratios of mean 1; here half are 1 + s and half 1 - s, so Var = s^2.
    logp = np.log([[1 + s, 1 - s]])
    summary = ratio_stats.summarize(compute_stats(logp, np.zeros((1, 2)), np.ones(1), np.ones((1, 2), bool)))
    np.testing.assert_allclose(summary["ratio/token_variance"], s**2, rtol=1e-5)
    np.testing.assert_allclose(summary["ratio/effective_sample_size"], 1 / (1 + s**2), rtol=1e-5)


def test_the_penalty_damps_like_the_natural_gradient():
    # At r = 1 the Hessian of coef E[(r-1)^2] in the logits is 2 coef F, F = diag(mu) - mu mu^T.
    behavior = np.asarray([0.5, 0.3, 0.15, 0.05])
    coef = 2.5
    behavior_logp = jnp.log(jnp.asarray(behavior))
    hessian = jax.jit(jax.hessian(lambda x: lagrangian(x, behavior_logp, jnp.zeros(4), coef)[0]))(behavior_logp)
    fisher = np.diag(behavior) - np.outer(behavior, behavior)
    np.testing.assert_allclose(hessian, 2 * coef * fisher, atol=1e-5)


# The bandit: primal descent and dual ascent together --------------------------------------------------

BANDIT_ADVANTAGES = np.asarray([1.2, -0.7, 0.4, -1.1, 0.1, 0.8, -0.3, -0.5])
BANDIT_BEHAVIOR = np.asarray([0.05, 0.2, 0.1, 0.15, 0.2, 0.1, 0.12, 0.08])


@functools.partial(jax.jit, static_argnames="rule")
def solve_bandit(budget, start, rule="projected"):
    """Gradient descent on the logits, and ascent on the multiplier, from pi = mu."""
    behavior_logp = jnp.log(jnp.asarray(BANDIT_BEHAVIOR, jnp.float32))

    def step(_, carry):
        logits, state = carry
        grad, variance = jax.grad(lagrangian, has_aux=True)(
            logits, behavior_logp, BANDIT_ADVANTAGES, state.variance_coef
        )
        state = dual.update(state, variance, budget=budget, step=0.02, max_coef=50.0, max_step=1.0, rule=rule)
        return logits - 0.5 * grad, state

    logits, state = jax.lax.fori_loop(0, 4000, step, (behavior_logp, dual.init(start)))
    return jax.nn.softmax(logits) / BANDIT_BEHAVIOR, state.variance_coef


BANDIT_MEAN = BANDIT_BEHAVIOR @ BANDIT_ADVANTAGES
BANDIT_DEVIATION = np.sqrt(BANDIT_BEHAVIOR @ (BANDIT_ADVANTAGES - BANDIT_MEAN) ** 2)


def closed_form(budget):
    """(r*, lambda*): r*(a) = 1 + (A - mean A) / (2 lambda*), lambda* = std A / (2 sqrt(budget)); moments under mu."""
    coef = BANDIT_DEVIATION / (2 * np.sqrt(budget))
    ratio = 1 + (BANDIT_ADVANTAGES - BANDIT_MEAN) / (2 * coef)
    assert np.all(ratio > 0)  # the closed form needs it
    return ratio, coef


@pytest.mark.parametrize("rule", dual.RULES)
@pytest.mark.parametrize("start", [0.5, 10.0])
@pytest.mark.parametrize("budget", [0.01, 0.04, 0.1])
def test_bandit_converges_to_the_closed_form(budget, start, rule):
    ratio, coef = closed_form(budget)
    actual_ratio, actual_coef = solve_bandit(jnp.float32(budget), jnp.float32(start), rule=rule)
    np.testing.assert_allclose(actual_coef, coef, rtol=1e-3)
    np.testing.assert_allclose(actual_ratio, ratio, atol=1e-3)
    variance = BANDIT_BEHAVIOR @ (np.asarray(actual_ratio) - 1) ** 2
    np.testing.assert_allclose(variance, budget, rtol=2e-3)


# The same bandit as 100 tokens, each action as often as mu has it, so that plain means over tokens are E_mu.
TOKENS = np.repeat(np.arange(8), np.rint(100 * BANDIT_BEHAVIOR).astype(int))


@functools.partial(jax.jit, static_argnames=("rule", "normalized"))
def solve_tokens(advantages, learning_rate, *, rule, normalized):
    """As `solve_bandit` at a budget of .04 from lambda = 10; with `normalized` the multiplier is sigma_A lambda."""
    behavior_logp = jnp.log(jnp.asarray(BANDIT_BEHAVIOR, jnp.float32))
    advantages, mask = advantages[TOKENS][None], jnp.ones((1, len(TOKENS)), bool)

    def loss(logits, coef):
        if normalized:
            coef = coef * dual.advantage_scale(advantages, mask)
        logp = jax.nn.log_softmax(logits)
        value, stats = losses.r2vpo_loss(
            logp[TOKENS][None], behavior_logp[TOKENS][None], advantages, mask, variance_coef=coef
        )
        total, number = stats["ratio_variance"]
        return value, total / number

    def step(_, carry):
        logits, state = carry
        grad, variance = jax.grad(loss, has_aux=True)(logits, state.variance_coef)
        state = dual.update(state, variance, budget=0.04, step=0.02, max_coef=50.0, max_step=1.0, rule=rule)
        return logits - learning_rate * grad, state

    logits, state = jax.lax.fori_loop(0, 4000, step, (behavior_logp, dual.init(jnp.float32(10.0))))
    return jax.nn.softmax(logits) / BANDIT_BEHAVIOR, state.variance_coef


@pytest.mark.parametrize("rule", dual.RULES)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_in_units_of_the_deviation_the_multiplier_has_one_scale(scale, rule):
    # sigma_A lambda* = std A / (2 sqrt(budget)), so lambda* = 1 / (2 sqrt(.04)) = 2.5, whatever the advantages;
    # the policy is that of the closed form, which does not know their scale either.
    advantages = (scale * (BANDIT_ADVANTAGES - BANDIT_MEAN)).astype(np.float32)
    ratio, coef = solve_tokens(advantages, jnp.float32(0.5 / scale), rule=rule, normalized=True)
    np.testing.assert_allclose(coef, 2.5, rtol=1e-3)
    np.testing.assert_allclose(ratio, closed_form(0.04)[0], atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_without_it_the_multiplier_follows_the_advantages(scale):
    advantages = (scale * (BANDIT_ADVANTAGES - BANDIT_MEAN)).astype(np.float32)
    _, coef = solve_tokens(advantages, jnp.float32(0.5 / scale), rule="multiplicative", normalized=False)
    np.testing.assert_allclose(coef, scale * closed_form(0.04)[1], rtol=1e-3)


def test_bandit_with_room_to_spare_needs_no_multiplier():
    # No policy on these actions is further than max(1 / mu) - 1 = 19 from mu: a budget of 20 never binds.
    ratio, coef = solve_bandit(jnp.float32(20.0), jnp.float32(0.001))
    assert coef == 0
    assert ratio[0] * BANDIT_BEHAVIOR[0] > 0.9  # all but greedy


@pytest.mark.parametrize(("num_updates", "factor"), [(2, 3.992), (4, 1.775), (8, 1.304)])
def test_the_last_update_adds_what_the_correction_says(num_updates, factor):
    # V grows from V_{N-1}, measured before the last of N equal steps, to V_N by nearly (N / (N - 1))^2.
    behavior_logp = jnp.log(jnp.asarray(BANDIT_BEHAVIOR, jnp.float32))
    gradient = jax.jit(jax.grad(lambda logits: lagrangian(logits, behavior_logp, BANDIT_ADVANTAGES, 2.5)[0]))
    logits, variances = behavior_logp, [jnp.float32(0)]
    for _ in range(num_updates):
        logits = logits - 0.002 * gradient(logits)
        variances.append(ratio_variance(logits, behavior_logp))
    np.testing.assert_allclose(variances[-1] / variances[-2], factor, rtol=1e-3)
    np.testing.assert_allclose(dual.end_of_batch_variance(variances[-2], num_updates), variances[-1], rtol=3e-3)
    pooled = dual.pooled_variance(jnp.stack(variances[:-1]), jnp.ones(num_updates))
    np.testing.assert_allclose(pooled, variances[-1], rtol=5e-3)
