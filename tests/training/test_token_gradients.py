"""What is said of the tokens of a few responses: against formulas in NumPy, and against the loss's own derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import losses, scoring
from r2vpo_jax.config import PRESETS, make_objective
from r2vpo_jax.training import samples, terms, token_gradients, update
from r2vpo_jax.training.update import UpdateSettings
from tests.helpers.rollouts import empty

LAMBDA, BETA = 2.0, 0.3
# Ratios of four responses, two to a problem; the last takes no part in learning, and nothing is at stake for the third.
RATIO = np.array(
    [[1.5, 1.05, 0.7, 2.5, 1.0], [0.6, 1.3, 0.9, 1.0, 1.0], [1.4, 0.5, 1.1, 1.0, 1.0], [3.0, 0.2, 1.0, 1.0, 1.0]]
)
LENGTH = np.array([5, 3, 3, 2], np.int32)
A = np.array([1.0, -0.5, 0.0, 2.0], np.float32)
MASK = np.arange(5) < LENGTH[:, None]
BEHAVIOR = np.where(MASK, -1.5, np.nan).astype(np.float32)  # what is masked may hold anything
PROXIMAL = np.where(MASK, -1.5 + 0.4 * np.sin(np.arange(20).reshape(4, 5)), np.nan).astype(np.float32)
LOGP = np.where(MASK, -1.5 + np.log(RATIO), np.nan).astype(np.float32)
ROWS = np.array([2, 0, 1], np.int32)


def looked_at(monkeypatch, objective, *, rows=ROWS, **fields):
    """`of_rows` with log-probabilities by hand in place of the decoder's."""
    monkeypatch.setattr(
        update,
        "score_rows",
        lambda params, head, batch, *_: scoring.Scores(jnp.asarray(LOGP)[batch.rollout_id], None, None),
    )
    settings = UpdateSettings(objective, group_size=2, num_minibatches=1, micro_batch_size=2)
    given = {"behavior_logp": BEHAVIOR, "advantage": A, "response_length": LENGTH, "keep": np.array([1, 1, 1, 0], bool)}
    batch = empty(4, 2, 5, rollout_id=np.arange(4), **given | fields)
    state = update.LearnerState(
        params={}, opt_state=(), dual=update.dual.init(LAMBDA), kl_coef=np.float32(BETA), critic=None, version=np.int32(0)
    )  # fmt: skip
    return batch, state, settings, token_gradients.of_rows(state, batch, jnp.asarray(rows), None, settings)


def clipped(ratio, advantage, low=0.8, high=1.2):
    return np.where((advantage > 0) & (ratio > high) | (advantage < 0) & (ratio < low), 0.0, 1.0)


def of_m2po(ratio, advantage, budget=0.1):
    """The threshold of the whole minibatch, of which the fourth response is no part."""
    log_ratio = np.log(RATIO[:2][MASK[:2]])
    harmful = np.sort(np.abs(log_ratio[log_ratio * np.repeat(A[:2], LENGTH[:2]) > 0]))
    means = np.cumsum(harmful**2) / np.arange(1, len(harmful) + 1)
    kept = int(np.sum(means <= budget))
    assert 0 < kept < len(harmful), "some are cut"
    bound = (harmful[kept - 1] + harmful[kept]) / 2
    return np.where(np.sign(advantage) * np.log(ratio) > bound, 0.0, 1.0)


def of_gspo(ratio, advantage):
    """One ratio for a response, and a clip of it."""
    s = np.exp(np.log(ratio).mean())
    return clipped(np.full_like(ratio, s), advantage, 0.9, 1.15) * s / ratio


def of_a_kl(ratio, advantage):
    """The slope of k3 by log π is 1 - exp(reference - log π)."""
    return clipped(ratio, advantage) - BETA * (1 - np.exp(-1.0 - (-1.5 + np.log(ratio)))) / (ratio * advantage)


HAND = {
    "ppo_clip": ({"name": "ppo_clip"}, clipped),
    "policy_gradient": ({"name": "policy_gradient"}, lambda r, a: np.ones_like(r)),
    "r2vpo": ({"name": "r2vpo_fixed", "dual": {"coef": LAMBDA}}, lambda r, a: 1 - 2 * LAMBDA * (r - 1) / a),
    "r2vpo, λ in units of σ": (
        {"name": "r2vpo_fixed", "dual": {"coef": LAMBDA, "normalize": True}},
        # The root mean square of A over the 11 tokens of the minibatch that count.
        lambda r, a: 1 - 2 * LAMBDA * np.sqrt((5 * 1.0 + 3 * 0.25) / 11) * (r - 1) / a,
    ),
    "cispo": ({"name": "cispo", "loss": {"options": {"max_ratio": 2.0}}}, lambda r, a: np.minimum(r, 2.0) / r),
    "m2po": ({"name": "m2po", "loss": {"options": {"budget": 0.1}}}, of_m2po),
    "gspo": ({"name": "gspo", "loss": {"options": {"clip_low": 0.1, "clip_high": 0.15}}}, of_gspo),
    "a KL in the loss": ({"name": "ppo_clip", "kl": {"coef": BETA, "estimator": "k3"}}, of_a_kl),
}


@pytest.mark.parametrize("case", HAND)
def test_against_formulas_by_hand(case, monkeypatch):
    sections, formula = HAND[case]
    _, _, _, found = looked_at(
        monkeypatch, make_objective(**sections), reference_logp=np.full((4, 5), -1.0, np.float32)
    )
    assert found.rows.tolist() == ROWS.tolist()
    np.testing.assert_allclose(found.log_ratio, np.where(MASK, np.log(RATIO), 0.0)[ROWS], atol=2e-7)
    assert np.isnan(found.kept[0]).all(), "nothing is at stake where A = 0"
    for place, row in enumerate(ROWS[1:], 1):
        length = LENGTH[row]
        np.testing.assert_allclose(
            found.kept[place, :length], formula(RATIO[row, :length], A[row]), rtol=1e-5, atol=1e-5
        )
        assert np.isnan(found.kept[place, length:]).all()


def test_on_stale_data_weights_are_in_it(monkeypatch):
    """R²VPO with its ratio against the proximal policy ρ, and weights w = min(proximal / μ, 1.2): g / (r A) is
    w ρ / r (1 - 2 λ (ρ - 1) / A), and w ρ / r = min(1, 1.2 μ / proximal)."""
    objective = make_objective("r2vpo_fixed", dual={"coef": LAMBDA}, correction={"mode": "truncate", "max_weight": 1.2})
    w = np.minimum(np.exp(PROXIMAL - BEHAVIOR), 1.2)
    *_, found = looked_at(monkeypatch, objective, proximal_logp=PROXIMAL, weights=w)
    rho, weighed = np.exp(LOGP - PROXIMAL)[0], np.minimum(1, 1.2 / np.exp(PROXIMAL - BEHAVIOR))[0]
    assert (weighed < 1).any()
    np.testing.assert_allclose(found.kept[1], weighed * (1 - 2 * LAMBDA * (rho - 1)), rtol=1e-5)


def test_a_response_that_takes_no_part_keeps_nothing(monkeypatch):
    *_, found = looked_at(monkeypatch, make_objective("policy_gradient"), rows=np.array([3], np.int32))
    np.testing.assert_array_equal(found.kept, [[0, 0, np.nan, np.nan, np.nan]])


def test_every_preset_by_the_derivative_of_its_loss(monkeypatch):
    """The loss of the whole minibatch, differentiated at each token, over r A and the token's share of the mean; A of tokens."""
    advantage = np.where(MASK, np.linspace(-1, 1.5, 20).reshape(4, 5), np.nan).astype(np.float32)
    seen = set()
    for preset in PRESETS:
        objective = make_objective(preset)
        batch, state, settings, found = looked_at(
            monkeypatch, objective, advantage=advantage, reference_logp=np.full((4, 5), -1.0, np.float32)
        )
        weights, _ = terms.update_weights(batch, jnp.asarray(LOGP), objective)
        mask = MASK & np.array([1, 1, 1, 0], bool)[:, None]
        reduction = {"reduction": objective.loss.reduction, "normalizer": 7.0}
        computed = update.computed_arguments(state, batch, None, settings)

        def loss_of(
            logp, objective=objective, batch=batch, weights=weights, mask=mask, reduction=reduction, computed=computed
        ):
            function = losses.get(objective.loss.name)
            given = dict(objective.loss.options) | computed | reduction
            loss, _ = function(logp, BEHAVIOR, batch.advantage, mask, weights=weights, **given)
            if objective.has_kl and objective.kl.where == "loss":
                loss += BETA * losses.reduce(terms.divergence(batch, logp, objective), mask, **reduction)
            return loss

        slope = -np.asarray(jax.grad(loss_of)(jnp.asarray(LOGP))) / np.where(
            mask, losses.token_weights(mask, **reduction), 1.0
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = slope / (RATIO * advantage)
        expected = np.where(np.isfinite(expected) & mask, expected, np.nan)[ROWS]
        np.testing.assert_allclose(found.kept, expected, rtol=2e-5, atol=2e-5, err_msg=preset)
        seen |= {"cut"} if np.any(expected == 0) else set()
        seen |= {"back"} if np.any(expected < 0) else set()
        seen |= {"more"} if np.any(expected > 1.01) else set()
    assert seen == {"cut", "back", "more"}


def test_rows_worth_a_look_come_first():
    """Of each problem of the first minibatch a good response and a bad one; then what is left, in its order."""
    settings = UpdateSettings(make_objective(), group_size=4, num_minibatches=2)
    advantage = np.array([0, 0, 0, 0, -1, -1, 3, -1, 9, -9, 0, 0, 0, 0, 0, 0], np.float32)
    outline = empty(16, 1, 1, advantage=advantage)
    for keep, expected in ((np.ones(16, bool), [6, 4, 0, 1]), (np.arange(16) != 4, [6, 5, 0, 1])):
        found = token_gradients.worth_a_look(outline.replace(keep=keep), 4, settings)
        assert found.tolist() == expected
    assert token_gradients.worth_a_look(outline, 99, settings).tolist() == [6, 4, 0, 1, 2, 3, 5, 7]
    per_token = outline.replace(advantage=np.ones((16, 1), np.float32))
    assert token_gradients.worth_a_look(per_token, 2, settings).tolist() == [0, 1]


def test_pieces_are_the_text_token_by_token():
    """Bytes as tokens: a character is with its last byte; what no character is does not hold anything up for long."""

    def decode(tokens):
        return bytes(tokens).decode("utf-8", "replace")

    for text in ("", "ab", "naïve — 中文 😀!", "x\n\ty", "�", "a�b"):
        tokens = list(text.encode())
        found = samples.pieces(tokens, decode)
        assert len(found) == len(tokens)
        assert "".join(found) == text
    assert samples.pieces(list("é!".encode()), decode) == ["", "é", "!"]
    endless = samples.pieces([0xFF] * 40 + [65], decode)
    assert len(endless) == 41
    assert endless[-1] == "A"
