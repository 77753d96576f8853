"""From verdicts to advantages: shaped rewards, who takes part, and every estimator by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from r2vpo_jax.advantages import ESTIMATORS
from r2vpo_jax.config import make_objective
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.rows import rows_of_groups
from r2vpo_jax.tasks.base import Outcome
from r2vpo_jax.training import credit

JUNK = np.nan  # behind the end of a response


def verified(reward, length, *, size=4, errors=(), truncated=(), **fields):
    """A verified rollout on the host: `errors` and `truncated` are row numbers, per-token fields ragged lists."""
    reward, length = np.asarray(reward, np.float32), np.asarray(length, np.int32)
    rows = np.arange(len(reward))
    outcome = np.where(reward > 0, int(Outcome.RIGHT), int(Outcome.WRONG))
    outcome[list(errors)] = Outcome.ERROR
    return Rollout(
        tokens=np.zeros((len(rows), 2 + size), np.int32),
        prompt_length=np.full(len(rows), 2, np.int32),
        response_length=length,
        truncated=np.isin(rows, truncated),
        behavior_logp=np.zeros((len(rows), size), np.float32),
        temperature=np.ones(len(rows), np.float32),
        reward=reward,
        outcome=outcome.astype(np.int32),
        advantage=np.full(len(rows), np.nan, np.float32),
        keep=np.ones(len(rows), bool),
        group_id=(rows // 2).astype(np.int32),
        rollout_id=rows.astype(np.int32),
        version=np.zeros(len(rows), np.int32),
    ).replace(**{name: ragged(value, size) for name, value in fields.items()})


def ragged(rows, size):
    """f32 [B, size] from lists of different lengths, junk behind their ends."""
    return np.array([[*row, *[JUNK] * (size - len(row))] for row in rows], np.float32)


def assert_only_these_change(after, before, *names):
    for field in dataclasses.fields(Rollout):
        if field.name not in names:
            np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name), field.name)


# ---- the reward that is learned from ----


@pytest.mark.parametrize(
    ("lengths", "max_length", "buffer", "penalty", "expected"),
    [
        # Free up to 16 of 20, then (length - 16) / 4.
        ([1, 10, 16, 17, 18, 20], 20, 0.2, 1.0, [0, 0, 0, 0.25, 0.5, 1]),
        # The whole length is buffer: length / 10, times 3.
        ([0, 5, 10], 10, 1.0, 3.0, [0, 1.5, 3]),
        # The paper's numbers: 4,096 of 20,480.
        ([16384, 16385, 18432, 20480], 20480, 0.2, 1.0, [0, 1 / 4096, 0.5, 1]),
    ],
)
def test_the_penalty_for_length(lengths, max_length, buffer, penalty, expected):
    actual = credit.overlong_penalty(np.array(lengths), max_length, buffer=buffer, penalty=penalty)
    np.testing.assert_allclose(actual, expected, atol=1e-7)
    assert actual.dtype == np.float32


def test_the_penalty_is_taken_off_what_is_learned_and_not_off_the_verdict():
    """T = 20, buffer 0.2, at most 2: a right answer of 18 tokens is worth 1 - 2 * 0.5."""
    rollout = verified([1, 1, 1, 0], [10, 18, 20, 20], size=20)
    objective = make_objective(groups={"overlong_penalty": 2.0})
    np.testing.assert_allclose(credit.learning_reward(rollout, objective), [1, 0, -1, -2], atol=1e-6)
    np.testing.assert_array_equal(credit.learning_reward(rollout, make_objective()), rollout.reward)
    # Three right answers and yet a gradient: 1, 0, -1 and -2 around their mean of -1/2.
    objective = make_objective(groups={"overlong_penalty": 2.0, "zero_variance": "drop"}, advantage={"scale": "none"})
    filled = credit.fill_advantages(rollout, objective, 4)
    np.testing.assert_allclose(filled.advantage, [1.5, 0.5, -0.5, -1.5], atol=1e-6)
    assert_only_these_change(filled, rollout, "advantage")


def test_a_response_without_a_verdict_abstains():
    """Votes 1, 0, 1 have mean 2/3 and unbiased deviation sqrt((1/9 + 4/9 + 1/9) / 2) = 1 / sqrt(3)."""
    rollout = verified([1, 0, 0, 1], [2, 3, 4, 1], errors=[2])
    filled = credit.fill_advantages(rollout, make_objective(), 4)
    np.testing.assert_allclose(filled.advantage, np.array([1, -2, 0, 1]) / 3 * np.sqrt(3), rtol=1e-5)
    np.testing.assert_array_equal(filled.keep, [True, True, False, True])
    np.testing.assert_array_equal(credit.learning_reward(rollout, make_objective()), [1, 0, np.nan, 1])
    assert_only_these_change(filled, rollout, "advantage", "keep")


def test_or_it_counts_as_wrong():
    """Rewards 1, 0, 0, 1 have mean 1/2 and unbiased deviation sqrt(1/3)."""
    rollout = verified([1, 0, 0, 1], [2, 3, 4, 1], errors=[2])
    filled = credit.fill_advantages(rollout, make_objective(groups={"verifier_errors": "wrong"}), 4)
    np.testing.assert_allclose(filled.advantage, np.array([1, -1, -1, 1]) / 2 * np.sqrt(3), rtol=1e-5)
    assert filled.keep.all()


@pytest.mark.parametrize("advantage", [name for name, row in ESTIMATORS.items() if not row.parts])
def test_an_abstention_weighs_nothing_in_any_estimator(advantage):
    """Whatever its length, values and log-probabilities are, all others get the same advantages."""
    objective = make_objective(
        advantage={"estimator": advantage}, kl={"coef": 0.5, "where": "reward", "estimator": "k1"}
    )
    generator = np.random.default_rng(0)
    arrays = {name: [list(generator.standard_normal(n)) for n in (2, 3, 4, 1)] for name in ("value", "reference_logp")}
    other = {name: [*rows[:2], [9.0, -7.0], rows[3]] for name, rows in arrays.items()}
    first, second = (
        credit.fill_advantages(verified([1, 0, 0, 1], length, errors=[2], **fields), objective, 4, 0.5)
        for length, fields in (([2, 3, 4, 1], arrays), ([2, 3, 2, 1], other))
    )
    voted = np.array([0, 1, 3])
    np.testing.assert_array_equal(second.advantage[voted], first.advantage[voted])
    assert np.all(np.abs(first.advantage[voted]).reshape(3, -1).max(axis=1) > 0.1)
    np.testing.assert_array_equal(first.keep, [True, True, False, True])
    if advantage != "gae":  # whose estimate there is of values alone
        np.testing.assert_array_equal(first.advantage[2], np.zeros_like(first.advantage[2]))
    assert np.all(np.isfinite(first.advantage))


def test_a_masked_truncated_response_counts_in_the_baseline_only():
    rollout = verified([1, 0, 0, 0], [2, 4, 4, 3], truncated=[1, 2])
    for truncated, keep in (("mask", [True, False, False, True]), ("keep", [True] * 4)):
        filled = credit.fill_advantages(
            rollout, make_objective(groups={"truncated": truncated}, advantage={"scale": "none"}), 4
        )
        # Mean 1/4, the truncated ones included; without them it would be 1/2.
        np.testing.assert_allclose(filled.advantage, [0.75, -0.25, -0.25, -0.25])
        np.testing.assert_array_equal(filled.keep, keep)


# ---- groups of equal rewards ----

GROUPS = verified([1, 1, 1, 0, 0, 0, 0, 1, 0, 0], [2, 3, 4, 1, 2, 2, 3, 4, 1, 2], errors=[8])
# 1 1 | 1 0 | 0 0 | 0 1 | abstains, 0: one vote cannot differ
DIFFER = np.array([False, True, False, True, False])


@pytest.mark.parametrize("zero_variance", ["drop", "resample"])
@pytest.mark.parametrize("advantage", [name for name, row in ESTIMATORS.items() if row.group_baseline])
def test_dropping_changes_who_takes_part_and_nothing_else(advantage, zero_variance):
    kept, dropped = (
        credit.fill_advantages(
            GROUPS, make_objective(advantage={"estimator": advantage}, groups={"zero_variance": choice}), 2
        )
        for choice in ("keep", zero_variance)
    )
    np.testing.assert_array_equal(dropped.keep, np.repeat(DIFFER, 2))
    np.testing.assert_array_equal(kept.keep, [True] * 8 + [False, True])
    assert_only_these_change(dropped, kept, "keep")
    assert_only_these_change(kept, GROUPS, "keep", "advantage")


def test_groups_differ_in_their_verdicts():
    plain = make_objective()
    np.testing.assert_array_equal(credit.groups_differ(GROUPS, plain, 2), DIFFER)
    # 1 1 of 2 and 3 tokens are learned from as 0.5 and 0.25, but both are right.
    shaped = make_objective(groups={"overlong_penalty": 1.0, "overlong_buffer": 1.0})
    np.testing.assert_allclose(credit.learning_reward(GROUPS, shaped)[:2], [0.5, 0.25])
    np.testing.assert_array_equal(credit.groups_differ(GROUPS, shaped, 2), DIFFER)
    # An abstention beside a right answer does not differ from it; a wrong answer does.
    right = GROUPS.replace(reward=np.array([*GROUPS.reward[:9], 1], np.float32))
    np.testing.assert_array_equal(credit.groups_differ(right, plain, 2), DIFFER)
    wrong = make_objective(groups={"verifier_errors": "wrong"})
    np.testing.assert_array_equal(credit.groups_differ(right, wrong, 2), [*DIFFER[:4], True])


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [(1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4])],
)
def test_groups_that_differ_come_first_and_others_fill_up(wanted, chosen):
    """Groups 1 and 3 differ. In the order of sampling; those that fill up take no part."""
    objective = make_objective(groups={"zero_variance": "resample"})
    places = credit.chosen_groups(GROUPS, objective, 2, wanted)
    batch = jax.tree.map(lambda x: x[rows_of_groups(places, 2)], GROUPS)
    np.testing.assert_array_equal(batch.rollout_id, [row for g in chosen for row in (2 * g, 2 * g + 1)])
    for field in dataclasses.fields(Rollout):
        if getattr(GROUPS, field.name) is not None:
            expected = getattr(GROUPS, field.name)[batch.rollout_id]
            np.testing.assert_array_equal(getattr(batch, field.name), expected, field.name)
    filled = credit.fill_advantages(batch, objective, 2)
    np.testing.assert_array_equal(filled.keep, np.repeat(DIFFER[chosen], 2))


# ---- estimators by hand ----


def with_kl(*, reward=(1, 0), **fields):
    """Two ragged rows in which k1 = behavior - reference is [0.5, 0.25] and [1, 0, -0.5]."""
    behavior = [[-1.0, -2.0], [-0.5, -1.0, -3.0]]
    k1 = [[0.5, 0.25], [1.0, 0.0, -0.5]]
    reference = [np.subtract(b, x) for b, x in zip(behavior, k1, strict=True)]
    return verified(reward, [2, 3], behavior_logp=behavior, reference_logp=reference, **fields)


def in_reward(estimator, *, k="k1", **advantage):
    # The weight in force is given to fill_advantages: an adaptive one leaves that of the configuration.
    kl = {"coef": 99.0, "where": "reward", "estimator": k}
    return make_objective(advantage={"estimator": estimator} | advantage, kl=kl)


def test_leave_one_out():
    """Rewards 3, 0, 0, 1: minus the mean of the three others, 1/3, 4/3, 4/3 and 1."""
    filled = credit.fill_advantages(
        verified([3, 0, 0, 1], [1, 2, 3, 4]), make_objective(advantage={"estimator": "leave_one_out"}), 4
    )
    np.testing.assert_allclose(filled.advantage, [8 / 3, -4 / 3, -4 / 3, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "sums"),
    [
        ("k1", (0.75, 0.5)),
        ("k2", ((0.25 + 0.0625) / 2, (1 + 0.25) / 2)),
        # exp(-x) - 1 + x, summed over 0.5 and 0.25, and over 1, 0 and -0.5
        ("k3", (0.1065306597 + 0.0288007831, 0.3678794412 + 0.1487212707)),
    ],
)
def test_a_sequence_pays_for_its_divergence(estimator, sums):
    """Returns R - 0.4 sum KL. With G = 2 both others' mean is the other's: the difference of the returns."""
    returns = np.array([1, 0]) - 0.4 * np.array(sums)
    filled = credit.fill_advantages(with_kl(), in_reward("leave_one_out", k=estimator), 2, 0.4)
    np.testing.assert_allclose(filled.advantage, returns - returns[::-1], rtol=1e-6)
    filled = credit.fill_advantages(with_kl(), in_reward("group_relative", scale="none", k=estimator), 2, 0.4)
    np.testing.assert_allclose(filled.advantage, (returns - returns[::-1]) / 2, rtol=1e-6)
    assert_only_these_change(filled, with_kl(), "advantage")


def test_a_divergence_in_the_loss_is_not_in_the_reward_too():
    objective = make_objective(advantage={"estimator": "leave_one_out"}, kl={"coef": 0.4})
    filled = credit.fill_advantages(with_kl(), objective, 2, 0.4)
    np.testing.assert_array_equal(filled.advantage, [1, -1])


def test_gdpo():
    """Parts (1, 0), (0, 1) in one group and (1, 1), (0, -) in the other; a = sqrt(1/2).

    First group: (a, -a) + (-a, a) = 0. The last response abstains, so that the other group has nothing to compare.
    Without abstention it is (a, -a) + (a, -a) = (2a, -2a), whose deviation over the batch is sqrt(8 a^2 / 3).
    """
    objective = make_objective("ppo_clip", advantage={"estimator": "gdpo"})
    rollout = verified([1, 1, 2, 0], [1, 2, 3, 4], errors=[3]).replace(
        reward_parts=np.float32([[1, 0], [0, 1], [1, 1], [0, 0]])
    )
    filled = credit.fill_advantages(rollout, objective, 2)
    np.testing.assert_array_equal(filled.advantage, np.zeros(4))
    np.testing.assert_array_equal(filled.keep, [1, 1, 1, 0])
    assert filled.reward_parts is None
    judged = rollout.replace(outcome=np.where(rollout.outcome == Outcome.ERROR, 0, rollout.outcome))
    filled = credit.fill_advantages(judged, objective, 2)
    np.testing.assert_allclose(filled.advantage, [0, 0, 1.5**0.5, -(1.5**0.5)], rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match="gdpo normalizes each part of a reward by itself, and this task's reward has one"
    ):
        credit.fill_advantages(rollout.replace(reward_parts=None), objective, 2)


def test_reinforce_pp_with_a_baseline():
    """Returns 0.7 and -0.2, around their mean +-0.45, on 2 and 3 tokens.

    Over five tokens: mean -0.09, squares 2 * 0.54^2 + 3 * 0.36^2 = 0.972, deviation sqrt(0.972 / 4).
    """
    filled = credit.fill_advantages(with_kl(), in_reward("reinforce_pp_baseline"), 2, 0.4)
    expected = np.array([[0.54, 0.54, 0, 0], [-0.36, -0.36, -0.36, 0]]) / np.sqrt(0.243)
    np.testing.assert_allclose(filled.advantage, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("discount", "centered", "squares"),
    [
        # Token rewards [-0.2, 0.9] and [-0.4, 0, 0.2]; to go [0.7, 0.9] and [-0.2, 0.2, 0.2], mean 0.36.
        (1.0, [[0.34, 0.54, 0, 0], [-0.56, -0.16, -0.16, 0]], 0.772),
        # To go [-0.2 + 0.45, 0.9] and [-0.4 + 0.05, 0.1, 0.2], mean 0.22.
        (0.5, [[0.03, 0.68, 0, 0], [-0.57, -0.12, -0.02, 0]], 0.803),
    ],
)
def test_reinforce_pp(discount, centered, squares):
    filled = credit.fill_advantages(with_kl(), in_reward("reinforce_pp", discount=discount), 2, 0.4)
    np.testing.assert_allclose(filled.advantage, np.array(centered) / np.sqrt(squares / 4), rtol=1e-5)
    assert filled.value_target is None


# V of two ragged rows, of 3 and 2 tokens; the first is right.
VALUES = [[0.5, 0.25, 1.0], [0.0, 0.5]]


@pytest.mark.parametrize(
    ("settings", "advantage", "target"),
    [
        # delta = [0.25 - 0.5, 1 - 0.25, 1 - 1] and [0.5 - 0, 0 - 0.5]; A_t = delta_t + 0.5 A_{t+1}.
        ({"discount": 1.0}, [[0.125, 0.75, 0.0], [0.25, -0.5, 0.0]], [[0.625, 1.0, 1.0], [0.25, 0.0, 0.0]]),
        # delta = [0.2 - 0.5, 0.8 - 0.25, 0] and [0.4 - 0, -0.5]; A_t = delta_t + 0.4 A_{t+1}.
        ({"discount": 0.8}, [[-0.08, 0.55, 0.0], [0.2, -0.5, 0.0]], [[0.42, 0.8, 1.0], [0.2, 0.0, 0.0]]),
    ],
)
def test_gae(settings, advantage, target):
    rollout = verified([1, 0], [3, 2], size=3, value=VALUES)
    objective = make_objective(advantage={"estimator": "gae", "trace_decay": 0.5, "whiten": False} | settings)
    filled = credit.fill_advantages(rollout, objective, 2)
    np.testing.assert_allclose(filled.advantage, advantage, atol=1e-6)
    np.testing.assert_allclose(filled.value_target, target, atol=1e-6)
    assert_only_these_change(filled, rollout, "advantage", "value_target")


def test_gae_is_whitened_but_its_targets_are_not():
    """Over five tokens 0.125, 0.75, 0, 0.25, -0.5: mean 0.125, squares 2 * 0.625^2 + 2 * 0.125^2 = 0.8125."""
    rollout = verified([1, 0], [3, 2], size=3, value=VALUES)
    filled = credit.fill_advantages(rollout, make_objective(advantage={"estimator": "gae", "trace_decay": 0.5}), 2)
    expected = np.array([[0, 0.625, -0.125], [0.125, -0.625, 0]]) / np.sqrt(0.8125 / 4)
    np.testing.assert_allclose(filled.advantage, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(filled.value_target, [[0.625, 1.0, 1.0], [0.25, 0.0, 0.0]], atol=1e-6)
    # A third row abstains: it is not among the five.
    three = verified([1, 0, 0], [3, 2, 1], size=3, value=[*VALUES, [7.0]], errors=[2])
    filled = credit.fill_advantages(three, make_objective(advantage={"estimator": "gae", "trace_decay": 0.5}), 3)
    np.testing.assert_allclose(filled.advantage[:2], expected, rtol=1e-5, atol=1e-6)


def test_gae_pays_for_the_divergence_at_each_token():
    """Token rewards R - 0.4 k1: [-0.2, 0.9] and [-0.4, 0, 0.2]; V is [0.5, 1] and [0, 0.5, 0.5].

    delta = [-0.2 + 1 - 0.5, 0.9 - 1] and [-0.4 + 0.5, 0, 0.2 - 0.5]; A_t = delta_t + 0.5 A_{t+1}.
    """
    rollout = with_kl(value=[[0.5, 1.0], [0.0, 0.5, 0.5]])
    filled = credit.fill_advantages(rollout, in_reward("gae", trace_decay=0.5, whiten=False), 2, 0.4)
    advantage = [[0.3 - 0.05, -0.1, 0, 0], [0.1 + 0.5 * (0 - 0.15), -0.15, -0.3, 0]]
    np.testing.assert_allclose(filled.advantage, advantage, atol=1e-6)
    np.testing.assert_allclose(filled.value_target, [[0.75, 0.9, 0, 0], [0.025, 0.35, 0.2, 0]], atol=1e-6)


def best_of_group(rewards, *, discount):
    """An estimator of a user's own: the best response of each group, discounted by its length."""
    totals = rewards.totals.reshape(-1, rewards.group_size)
    best = (totals == totals.max(axis=1, keepdims=True)).reshape(-1)
    return best * discount ** rewards.mask.sum(axis=1)


def test_an_estimator_of_ones_own():
    name = f"{__name__}:best_of_group"
    objective = make_objective(advantage={"estimator": name, "discount": 0.5})
    filled = credit.fill_advantages(verified([3, 0, 0, 1], [1, 2, 3, 4]), objective, 2)
    np.testing.assert_allclose(filled.advantage, [0.5, 0, 0, 0.0625])  # 0.5^1 and 0.5^4
    with pytest.raises(ValueError, match="zero_variance=drop needs a baseline from the group"):
        make_objective(advantage={"estimator": name}, groups={"zero_variance": "drop"})
    with pytest.raises(ValueError, match="objective.advantage.estimator: estimator 'no_such:f': there is no module"):
        make_objective(advantage={"estimator": "no_such:f"})


def wants_more(rewards, *, temperature):
    return rewards.totals / temperature


def first_three(rewards):
    return rewards.totals[:3]


def test_an_estimator_of_ones_own_that_cannot_work():
    with pytest.raises(ValueError, match="wants temperature; an estimator may take scale, discount"):
        make_objective(advantage={"estimator": f"{__name__}:wants_more"})
    objective = make_objective(advantage={"estimator": f"{__name__}:first_three"})
    with pytest.raises(ValueError, match=r"advantages of shape \(3,\) for 4 responses of 4 tokens"):
        credit.fill_advantages(verified([3, 0, 0, 1], [1, 2, 3, 4]), objective, 2)
