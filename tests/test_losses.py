"""Objectives against numbers worked out by hand, one token each; responses are in test_losses_sequences.py.

The oracles give r = exp(logp - behavior_logp), and check the loss and the gradient coefficient
g = d(-loss)/d(logp) * count.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import losses
from tests.helpers.losses import (
    COLUMNS,
    NAMES,
    ROWS,
    batch,
    by_hand,
    evaluate,
    one_token,
    same_up_to_rounding,
)

# One token, by hand ---------------------------------------------------------------------------------

# log pi is -2 everywhere: an objective of the form sg(g) log pi has the loss 2 g.
ORACLES = {
    # Hyper-parameters, A, r, loss, g.
    "r2vpo": [
        # loss = -rA + coef (r-1)^2             g = r (A - 2 coef (r-1))
        ({"variance_coef": 2.5}, 1.0, 1.0, -1.0, 1.0),  # at r = 1 the penalty and its gradient vanish
        ({"variance_coef": 2.5}, 1.0, 1.3, -1.075, -0.65),  # -1.3 + 2.5 * .09          1.3 (1 - 5 * .3)
        ({"variance_coef": 0.5}, 1.0, 2.0, -1.5, 0.0),  # -2 + .5 * 1                   r* = 1 + 1 / (2 * .5) = 2
        ({"variance_coef": 2.5}, 1.0, 1.2, -1.1, 0.0),  # the objective's maximum, A + A^2 / (4 coef), at r* = 1.2
        ({"variance_coef": 2.5}, -1.0, 0.8, 0.9, 0.0),  # .8 + 2.5 * .04                r* = 1 - 1 / 5
        ({"variance_coef": 2.5}, -1.0, 0.1, 2.125, 0.35),  # .1 + 2.5 * .81             .1 (-1 + 5 * .9)
        ({"variance_coef": 2.5}, -1.0, 2.0, 4.5, -12.0),  # 2 + 2.5 * 1                 2 (-1 - 5)
        ({"variance_coef": 2.5}, 0.0, 1.5, 0.625, -3.75),  # 2.5 * .25                  -5 * 1.5 * .5: back to r = 1
        ({"variance_coef": 2.5}, 0.0, 0.5, 0.625, 1.25),  # 2.5 * .25                   5 * .5 * .5
        ({"variance_coef": 0.0}, 1.0, 1.3, -1.3, 1.3),  # no penalty: r A
        # A response of one token has s = r.
        ({"variance_coef": 2.5, "penalty_scope": "sequence"}, 1.0, 1.3, -1.075, -0.65),
        ({"variance_coef": 0.5, "penalty_scope": "sequence"}, 1.0, 2.0, -1.5, 0.0),
        ({"variance_coef": 2.5, "penalty_weight": "advantage"}, -2.0, 0.8, 1.8, 0.0),  # 1.6 + 5 * .04    r* = 1 - 1 / 5
        ({"variance_coef": 2.5, "negative_factor": 4.0}, -1.0, 0.8, 1.2, 2.4),  # .8 + 10 * .04    .8 (-1 + 20 * .2)
        ({"variance_coef": 2.5, "negative_factor": 4.0}, 1.0, 1.3, -1.075, -0.65),  # as with 1
    ],
    "policy_gradient": [
        # loss = -rA         g = rA
        ({}, 1.0, 1.3, -1.3, 1.3),
        ({}, 1.0, 0.5, -0.5, 0.5),
        ({}, -2.0, 3.0, 6.0, -6.0),
        ({}, 0.0, 2.0, 0.0, 0.0),
    ],
    "ppo_clip": [
        # loss = -min(rA, clip(r) A)         g = rA, or 0 where the clip binds
        ({}, 1.0, 1.0, -1.0, 1.0),
        ({}, 1.0, 1.1, -1.1, 1.1),  # inside the clip: r A
        ({}, 1.0, 1.3, -1.2, 0.0),  # min(1.3, 1.2)
        ({}, 1.0, 0.5, -0.5, 0.5),  # min(.5, .8): no clip against an improvement
        ({}, -1.0, 0.5, 0.8, 0.0),  # min(-.5, -.8)
        ({}, -1.0, 1.3, 1.3, -1.3),  # min(-1.3, -1.2)
        ({}, -1.0, 4.0, 4.0, -4.0),  # unbounded without the dual clip
        ({}, 0.0, 1.5, 0.0, 0.0),  # the clip does not pull a token with A = 0 back
        ({"clip_low": 0.2, "clip_high": 0.28}, 1.0, 1.25, -1.25, 1.25),  # clipped at .2, not at .28
        ({"clip_low": 0.2, "clip_high": 0.28}, 1.0, 1.29, -1.28, 0.0),
        ({"clip_low": 0.2, "clip_high": 0.28}, -1.0, 0.79, 0.8, 0.0),  # the lower bound stays at .2
        ({"clip_low": 0.2, "clip_high": 0.28}, -1.0, 0.81, 0.81, -0.81),
        ({"dual_clip": 3.0}, -1.0, 4.0, 3.0, 0.0),  # max(-4, -3)
        ({"dual_clip": 3.0}, -1.0, 2.0, 2.0, -2.0),
        ({"dual_clip": 3.0}, -1.0, 0.5, 0.8, 0.0),
        ({"dual_clip": 3.0}, 1.0, 4.0, -1.2, 0.0),  # for A > 0 only the usual clip
    ],
    "cispo": [
        # g = clip(r, min, max) A         loss = 2 g
        ({}, 1.0, 6.0, 10.0, 5.0),  # bounded at 5, and not cut off
        ({}, -1.0, 0.1, -0.2, -0.1),  # PPO drops it
        ({}, -1.5, 2.0, -6.0, -3.0),
        ({"min_ratio": 0.8, "max_ratio": 1.2}, 1.0, 0.5, 1.6, 0.8),
        ({"min_ratio": 0.8, "max_ratio": 1.2}, -1.0, 1.3, -2.4, -1.2),
    ],
    "gspo": [
        # A response of one token has s = r: PPO's clip with bounds .9997 and 1.0004.
        ({}, 1.0, 1.0003, -1.0003, 1.0003),
        ({}, 1.0, 1.0006, -1.0004, 0.0),
        ({}, -1.0, 0.9998, 0.9998, -0.9998),
        ({}, -1.0, 0.9995, 0.9997, 0.0),
        ({}, 1.0, 0.5, -0.5, 0.5),  # the clip is one-sided
        ({}, -1.0, 2.0, 2.0, -2.0),
    ],
    "spo": [
        # loss = -rA + |A| (r-1)^2 / (2 epsilon)         g = r (A - |A| (r-1) / epsilon)
        ({}, 1.0, 1.2, -1.1, 0.0),  # -1.2 + .04 / .4            turns back at 1 + epsilon
        ({}, 1.0, 1.3, -1.075, -0.65),  # -1.3 + .09 / .4        1.3 (1 - .3 / .2)
        ({}, -2.0, 0.5, 2.25, 1.5),  # 1 + 2 * .25 / .4          .5 (-2 + 2 * .5 / .2)
        ({}, -2.0, 0.8, 1.8, 0.0),  # 1.6 + 2 * .04 / .4         1 - epsilon, whatever the size of A
        ({"epsilon": 0.5}, -1.0, 2.0, 3.0, -6.0),  # 2 + 1       2 (-1 - 1 / .5)
        ({}, 0.0, 2.0, 0.0, 0.0),  # unlike r2vpo, no pull on a token with A = 0
    ],
    "m2po": [
        # PPO's clip at exp(-threshold) and exp(threshold); log 1.3 = .2624, log 1.5 = .4055, log .8 = -.2231.
        ({"threshold": 0.3}, 1.0, 1.3, -1.3, 1.3),
        ({"threshold": 0.3}, 1.0, 1.5, -1.3498588, 0.0),  # exp(.3)
        ({"threshold": 0.3}, 1.0, 0.5, -0.5, 0.5),
        ({"threshold": 0.3}, -1.0, 0.8, 0.8, -0.8),
        ({"threshold": 0.3}, -1.0, 0.5, 0.7408182, 0.0),  # exp(-.3)
        ({"threshold": 0.3}, -1.0, 3.0, 3.0, -3.0),
        ({"threshold": math.inf}, 1.0, 100.0, -100.0, 100.0),
        ({"threshold": math.inf}, -1.0, 0.01, 0.01, -0.01),
    ],
    "gmpo": [
        # loss = -exp(c) A, c = log r clipped on one side at .4         log 1.4 = .3365, log .7 = -.3567
        ({}, 1.0, 1.4, -1.4, 1.4),
        ({}, 1.0, 2.0, -1.4918247, 0.0),  # exp(.4)
        ({}, 1.0, 0.1, -0.1, 0.1),
        ({}, -1.0, 0.7, 0.7, -0.7),
        ({}, -1.0, 0.5, 0.6703200, 0.0),  # exp(-.4)
        ({}, -1.0, 5.0, 5.0, -5.0),
        ({"log_clip": 0.0}, 1.0, 1.1, -1.0, 0.0),
    ],
    "sapo": [
        # loss = -(4 / tau) p A         g = 4 p (1-p) r A, p = sigmoid(tau (r-1))
        ({}, 1.0, 1.0, -2.0, 1.0),  # p = .5
        ({}, -1.0, 1.0, 1.9047619, -1.0),  # 2 / 1.05
        ({}, 1.0, 2.0, -2.9242343, 1.5728955),  # p = .7310586: 4 p           8 p * .2689414
        ({}, -1.0, 2.0, 2.8219996, -1.5362196),  # p = .7407749: 4 p / 1.05   8 p * .2592251
        ({"tau_positive": 2.0}, 1.0, 1.5, -1.4621172, 1.1796716),  # p = .7310586: 2 p       6 p * .2689414
        ({"tau_negative": 1.0}, -1.0, 0.5, 1.5101627, -0.4700074),  # p = .3775407: 4 p      2 p * .6224593
    ],
    "vespo": [
        # g = w^k exp(lambda (1-w)) A, w = r; k, lambda = 2, 3 for A >= 0 and 3, 2 for A < 0         loss = 2 g
        ({}, 1.0, 2.0, 0.3982965, 0.1991483),  # 4 exp(-3)
        ({}, -1.0, 2.0, -2.1653645, -1.0826823),  # 8 exp(-2)
        ({}, 1.0, 0.5, 2.2408445, 1.1204223),  # .25 exp(1.5)
        ({}, 1.0, 2 / 3, 2.4162505, 1.2081253),  # largest, at k / lambda: 4/9 exp(1)
        ({}, -2.0, 0.5, -1.3591409, -0.6795705),  # -2 * .125 exp(1)
        ({"power_positive": 0, "decay_positive": 1}, 1.0, 2.0, 0.7357589, 0.3678794),  # exp(-1)
        ({"power_negative": 1, "decay_negative": 1}, -1.0, 2.0, -1.4715178, -0.7357589),  # -2 exp(-1)
    ],
    "topr": [
        # g = A for A >= 0, min(r, max_ratio) A for A < 0         loss = 2 g
        ({}, 1.0, 5.0, 2.0, 1.0),
        ({}, 1.0, 0.1, 2.0, 1.0),
        ({}, -1.0, 3.0, -2.0, -1.0),
        ({}, -1.0, 0.5, -1.0, -0.5),
        ({"max_ratio": 2.0}, -1.0, 3.0, -4.0, -2.0),
    ],
    "dro": [
        # loss = 2 A + beta (log r)^2 / 2         g = A - beta log r
        ({"beta": 0.5}, 1.0, math.e, 2.25, 0.5),  # 2 + .25            1 - .5
        ({"beta": 0.5}, -1.0, 1 / math.e, -1.75, -0.5),  # -2 + .25    -1 + .5
        ({"beta": 0.5}, 0.0, math.e**2, 1.0, -1.0),  # .25 * 4         -.5 * 2
        ({}, 1.0, math.e, 2.05, 0.9),  # beta = .1: 2 + .05             1 - .1
        ({"beta": 0.0}, 1.0, 50.0, 2.0, 1.0),
    ],
    "gppo": [
        # loss = -g, but for the dual clip
        ({}, 1.0, 1.25, -1.25, 1.25),
        ({}, 1.0, 2.0, -1.28, 1.28),  # PPO drops it
        ({}, 1.0, 4.0, -1.28, 1.28),  # the dual clip is for A < 0
        ({}, 1.0, 0.5, -0.5, 0.5),
        ({}, -1.0, 0.5, 0.8, -0.8),
        ({}, -1.0, 2.0, 2.0, -2.0),
        ({}, -1.0, 4.0, 3.0, 0.0),  # max(-4, -3)
        ({"dual_clip": None}, -1.0, 4.0, 4.0, -4.0),
        ({"keep_high": 0.5}, 1.0, 2.0, -0.64, 0.64),  # .5 * 1.28
        ({"keep_low": 0.5}, -1.0, 0.5, 0.4, -0.4),  # .5 * .8
    ],
    "aspo": [
        # A > 0: g = min(1/r, 3) A; A < 0: g = min(r, 3) A; 0 where PPO cuts         loss = -g, or -g at the bound
        ({}, 1.0, 0.5, -2.0, 2.0),
        ({}, 1.0, 0.25, -3.0, 3.0),  # min(4, 3)
        ({}, 1.0, 1.1, -0.9090909, 0.9090909),  # 1 / 1.1
        ({}, 1.0, 1.3, -0.8333333, 0.0),  # 1 / 1.2
        ({}, -1.0, 0.5, 0.8, 0.0),
        ({}, -1.0, 0.9, 0.9, -0.9),
        ({}, -1.0, 4.0, 3.0, -3.0),  # bounded, and not cut off
        ({"dual_clip": 2.0}, 2.0, 0.25, -4.0, 4.0),
    ],
    "luspo": [
        # A response of one token is GSPO's; bounds .998 and 1.0025.
        ({}, 1.0, 1.002, -1.002, 1.002),
        ({}, 1.0, 1.003, -1.0025, 0.0),
        ({}, -1.0, 0.999, 0.999, -0.999),
        ({}, -1.0, 0.997, 0.998, 0.0),
    ],
}
CASES = [(name, *oracle) for name, oracles in ORACLES.items() for oracle in oracles]


@pytest.mark.parametrize(("name", "hyper", "advantage", "ratio", "loss", "coefficient"), CASES)
def test_one_token(name, hyper, advantage, ratio, loss, coefficient):
    actual = one_token(name, advantage, -2.0, math.log(ratio), **hyper)
    np.testing.assert_allclose(actual, (loss, coefficient), rtol=1e-5, atol=2e-6)


# Of these the probabilities matter, pi of the policy and mu of the behavior policy, not only the ratio.
PROBABILITY_ORACLES = {
    # Hyper-parameters, A, mu, pi, loss, g.
    "drpo": [
        # loss = -rA + |A| mu (r-1)^2 / (2 epsilon)         g = r (A - |A| (pi - mu) / epsilon)
        ({"epsilon": 0.1}, 1.0, 0.5, 0.7, -1.0, -1.4),  # r = 1.4: -1.4 + .5 * .16 / .2        1.4 (1 - .2 / .1)
        ({}, 1.0, 0.5, 0.7, -1.3968, 1.3776),  # -1.4 + .5 * .16 / 25                          1.4 (1 - .2 / 12.5)
        ({"epsilon": 0.1}, -2.0, 0.25, 0.05, 2.0, 0.4),  # r = .2: .4 + 2 * .25 * .64 / .2     .2 (-2 + 2 * .2 / .1)
        # A rare token may move far: r = 100: -100 + 1e-4 * 99^2 / .2          100 (1 - .0099 / .1)
        ({"epsilon": 0.1}, 1.0, 1e-4, 1e-2, -95.0995, 90.1),
    ],
    "dppo_tv": [
        # g = min(r, 20) A, and 0 where pi moved by more than .15 along A         loss = -g log pi
        ({}, 1.0, 0.5, 0.9, 0.0, 0.0),  # .9 - .5
        ({}, 1.0, 0.5, 0.6, 0.6129907, 1.2),  # -1.2 log .6
        ({}, 1.0, 1e-5, 1e-3, 138.15511, 20.0),  # r = 100, which PPO drops: 20 * 6.9077553
        ({}, 1.0, 0.5, 0.3, 0.7223837, 0.6),  # it fell: a step along A = 1 brings it back         -.6 log .3
        ({}, -1.0, 0.5, 0.3, 0.0, 0.0),
        ({}, -1.0, 0.5, 0.4, -0.7330326, -0.8),  # .8 log .4
        ({}, -1.0, 0.5, 0.9, -0.1896489, -1.8),  # it rose: 1.8 log .9
        ({"divergence_low": 0.3}, -1.0, 0.5, 0.3, -0.7223837, -0.6),
        ({"divergence_high": 0.5}, 1.0, 0.5, 0.9, 0.1896489, 1.8),
        ({"max_ratio": 1.5}, 1.0, 0.05, 0.1, 3.4538776, 1.5),  # -1.5 log .1
        # The penalty is not cut: log 1.8 = .5877867: .25 (log 1.8)^2          -.5 log 1.8
        ({"beta": 0.5}, 1.0, 0.5, 0.9, 0.0863733, -0.2938933),
        # -1.2 log .6 + .001 (log 1.2)^2: log 1.2 = .1823216                   1.2 - .002 log 1.2
        ({"beta": 0.002}, 1.0, 0.5, 0.6, 0.6130240, 1.1996354),
    ],
    "dppo_kl": [
        # As dppo_tv, by D = mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)) > .05         loss = -g log pi
        ({}, 1.0, 0.5, 0.6, 0.6129907, 1.2),  # D = .5 log(.25 / .24) = .0204
        ({}, 1.0, 0.5, 0.7, 0.0, 0.0),  # D = .5 log(.25 / .21) = .0872
        ({}, 1.0, 0.5, 0.3, 0.7223837, 0.6),  # D = .0872 too, but it fell
        ({}, -1.0, 0.5, 0.3, 0.0, 0.0),
        ({}, -1.0, 0.5, 0.4, -0.7330326, -0.8),  # D = .0204
        ({}, -1.0, 0.5, 0.7, -0.4993449, -1.4),  # it rose: 1.4 log .7
        ({}, 1.0, 1e-5, 1e-3, 138.15511, 20.0),  # D = -1e-5 * 4.605 + .00099 = .00094
        # D is not symmetric: .2 log(.2 / .1) + .8 log(.8 / .9) = .1386 - .0942 = .0444, and the other way
        # .1 log(.1 / .2) + .9 log(.9 / .8) = -.0693 + .1060 = .0367: only the first is above .04.
        ({"divergence_low": 0.04}, -1.0, 0.2, 0.1, 0.0, 0.0),
        ({"divergence_high": 0.04}, 1.0, 0.1, 0.2, 3.2188758, 2.0),  # -2 log .2
        ({"divergence_high": 0.1}, 1.0, 0.5, 0.7, 0.4993449, 1.4),
        ({"max_ratio": 1.1}, 1.0, 0.5, 0.6, 0.5619081, 1.1),  # -1.1 log .6
    ],
}
PROBABILITY_CASES = [(name, *oracle) for name, oracles in PROBABILITY_ORACLES.items() for oracle in oracles]


@pytest.mark.parametrize(("name", "hyper", "advantage", "mu", "pi", "loss", "coefficient"), PROBABILITY_CASES)
def test_one_token_of_given_probabilities(name, hyper, advantage, mu, pi, loss, coefficient):
    actual = one_token(name, advantage, math.log(pi), math.log(pi / mu), **hyper)
    np.testing.assert_allclose(actual, (loss, coefficient), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_has_oracles(name):
    assert len((ORACLES | PROBABILITY_ORACLES)[name]) >= 3


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(
    ("name", "hyper", "log_ratio"),
    [
        ("ppo_clip", {"clip_high": 0.0}, 0.0),
        ("ppo_clip", {"clip_low": 0.0, "clip_high": 0.0}, 0.0),
        ("gspo", {"clip_low": 0.0, "clip_high": 0.0}, 0.0),
        ("gmpo", {"log_clip": 0.0}, 0.0),
        ("gppo", {"clip_low": 0.0, "clip_high": 0.0}, 0.0),
        ("m2po", {"threshold": 0.25}, 0.25),
        ("m2po", {"threshold": 0.25}, -0.25),
        ("policy_gradient", {}, 20.0),
        ("policy_gradient", {}, -20.0),
    ],
)
def test_a_ratio_on_the_bound_is_not_cut(name, hyper, log_ratio, advantage):
    # Clips and the clamp cut beyond their bounds; the derivatives of min and max share out a tie instead.
    actual = one_token(name, advantage, -2.0, log_ratio, **hyper)
    expected = math.exp(log_ratio) * advantage
    np.testing.assert_allclose(actual, (-expected, expected), rtol=1e-5)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("mu", "coefficient"),
    [
        (0.999, 1.001001),  # D = .999 log .999 + .001 log(.001 / 1e-8) = -.0010 + .0115 <= .05: kept, 1 / .999
        (0.99, 0.0),  # D = .99 log .99 + .01 log(.01 / 1e-8) = -.0099 + .1382
        (1.0, 1.0),  # D = 0
    ],
)
def test_dppo_kl_of_a_token_that_became_certain(mu, coefficient, jit):
    # pi = 1, as it is in float32 for many a token: 1 - pi is taken for 1e-8, in compiled code too.
    arrays = by_hand([[1 / mu]], [1.0])
    arrays["behavior_logp"] -= arrays["logp"]
    arrays["logp"] *= 0
    _, _, grad = evaluate("dppo_kl", arrays, jit=jit)
    np.testing.assert_allclose(-grad[0, 0], coefficient, rtol=1e-5)


@pytest.mark.parametrize(("advantage", "coef"), [(1.0, 2.5), (-0.5, 1.0), (2.0, 5.0)])
def test_r2vpo_objective_is_concave_in_the_ratio(advantage, coef):
    turning = 1 + advantage / (2 * coef)
    log_ratios = [math.log(f * turning) for f in (0.5, 1.0, 1.5)]
    points = [one_token("r2vpo", advantage, -2.0, x, variance_coef=coef) for x in log_ratios]
    np.testing.assert_allclose(-points[1][0], advantage + advantage**2 / (4 * coef), rtol=1e-5)
    assert points[0][0] > points[1][0] < points[2][0]
    assert points[0][1] > 0 > points[2][1]


# One objective as a case of another -----------------------------------------------------------------

UNBOUNDED = {"min_ratio": 0.0, "max_ratio": math.inf}
CLIP = {"clip_low": 0.2, "clip_high": 0.25}
LOG_CLIP = math.log(1.25)  # exp(-log 1.25) = 1 - .2


def all_tokens(arrays):
    return arrays


def one_token_rows(arrays):
    return arrays | {"mask": np.arange(COLUMNS) == np.zeros((ROWS, 1))}


def one_token_rows_of_negative_advantage(arrays):
    return one_token_rows(arrays) | {"advantages": -np.abs(arrays["advantages"])}


def positive_advantages(arrays):
    return arrays | {"advantages": np.abs(arrays["advantages"])}


def negative_advantages(arrays):
    return arrays | {"advantages": -np.abs(arrays["advantages"])}


def advantages_of_one_size(arrays):
    return arrays | {"advantages": np.copysign(np.float32(1.5), arrays["advantages"])}


def certain_behavior(arrays):
    return arrays | {"logp": arrays["logp"] - arrays["behavior_logp"], "behavior_logp": np.zeros_like(arrays["logp"])}


EQUAL = [
    (all_tokens, "r2vpo", {"variance_coef": 0.0}, "policy_gradient", {}),
    (all_tokens, "m2po", {"threshold": math.inf}, "policy_gradient", {}),
    (all_tokens, "m2po", {"threshold": LOG_CLIP}, "ppo_clip", CLIP),
    (all_tokens, "dppo_tv", {"divergence_low": 1, "divergence_high": 1, "max_ratio": math.inf}, "cispo", UNBOUNDED),
    (advantages_of_one_size, "spo", {"epsilon": 0.2}, "r2vpo", {"variance_coef": 1.5 / (2 * 0.2)}),
    (certain_behavior, "drpo", {"epsilon": 0.2}, "spo", {"epsilon": 0.2}),
    (positive_advantages, "topr", {}, "dro", {"beta": 0.0}),
    (negative_advantages, "aspo", {**CLIP, "dual_clip": 1e6}, "ppo_clip", CLIP),
    (one_token_rows, "r2vpo", {"penalty_scope": "sequence"}, "r2vpo", {}),
    (one_token_rows, "gspo", CLIP, "ppo_clip", CLIP),
    (one_token_rows, "luspo", CLIP, "ppo_clip", CLIP),
    (one_token_rows, "gmpo", {"log_clip": LOG_CLIP}, "m2po", {"threshold": LOG_CLIP}),
    (one_token_rows_of_negative_advantage, "topr", {"max_ratio": math.inf}, "cispo", UNBOUNDED),
]
EQUAL_IN_GRADIENT = [
    (all_tokens, "cispo", UNBOUNDED, "policy_gradient", {}),
    (all_tokens, "gppo", {**CLIP, "keep_low": 0, "keep_high": 0, "dual_clip": None}, "ppo_clip", CLIP),
    (all_tokens, "gppo", {**CLIP, "keep_low": 0, "keep_high": 0}, "ppo_clip", {**CLIP, "dual_clip": 3.0}),
]


def wide_batch():
    """Every bound binds for some tokens, and not for others; in the first column too."""
    ratio = [[1.1, 0.3, 1.6, 0.9, 4.5], [0.6, 1.3, 0.9, 5.0, 0.7], [1.6, 0.7, 1.1, 0.2, 1.2], [0.9, 3.5, 0.5, 1.2, 2.0]]
    arrays = batch() | {"mask": np.ones((ROWS, COLUMNS), bool)}
    arrays["logp"] = arrays["behavior_logp"] + np.log(ratio).astype(np.float32)
    signs = np.asarray([[1, -1, -1, 1, -1], [-1, 1, -1, 1, -1], [1, 1, -1, -1, 1], [-1, -1, 1, 1, 1]], np.float32)
    return arrays | {"advantages": signs * (0.5 + np.abs(arrays["advantages"]))}


@pytest.mark.parametrize(("change", "name", "hyper", "other", "other_hyper"), EQUAL + EQUAL_IN_GRADIENT)
def test_one_objective_is_a_case_of_another(change, name, hyper, other, other_hyper):
    arrays = change(wide_batch())
    loss, _, grad = evaluate(name, arrays, jit=False, **hyper)
    expected, _, expected_grad = evaluate(other, arrays, jit=False, **other_hyper)
    same_up_to_rounding(grad, expected_grad)
    if (change, name, hyper, other, other_hyper) in EQUAL:
        same_up_to_rounding(loss, expected)
    assert np.sum(expected_grad != 0) >= 2


def test_the_batch_of_these_cases_reaches_the_clip_on_both_sides():
    arrays = wide_batch()
    _, stats, _ = evaluate("ppo_clip", arrays, jit=False, **CLIP, dual_clip=3.0)
    assert all(
        stats[f"{k}_fraction{side}"][0] > 0 for k, side in (("clip", "_low"), ("clip", "_high"), ("dual_clip", ""))
    )


@pytest.mark.parametrize(
    ("weight", "penalties"),
    # lambda 2, r - 1 = 1 and -1/2, |A| = 3, mu = 1/4 and 1/2
    [("none", (2.0, 0.5)), ("advantage", (6.0, 1.5)), ("probability", (0.5, 0.25)), ("both", (1.5, 0.75))],
)
def test_what_weighs_the_penalty_of_a_token(weight, penalties):
    """The constrained quantity stays E[(r - 1)^2] whatever the weight."""
    logp, behavior_logp = jnp.log(jnp.array([[[0.5, 0.25]], [[0.25, 0.5]]]))
    _, stats = losses.r2vpo_loss(
        logp, behavior_logp, jnp.array([-3.0]), jnp.ones((1, 2)), variance_coef=2.0, penalty_weight=weight
    )
    np.testing.assert_allclose(stats["penalty"][0], sum(penalties), rtol=1e-6)
    np.testing.assert_allclose(stats["ratio_variance"][0], 1.25, rtol=1e-6)
