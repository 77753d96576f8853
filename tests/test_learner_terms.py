"""What the learner adds to an objective: rows that take no part, thresholds and scales of a whole minibatch, KL
terms, an entropy bonus, importance corrections and a critic.

Most tests read the gradient from the parameters that one SGD step leaves, and compare with `jax.grad` of the formula
over the whole batch at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r2vpo_jax import critic, dual, losses, sharding
from r2vpo_jax.config import ObjectiveConfig
from r2vpo_jax.learner import Learner
from tests.conftest import random_params
from tests.test_learner import KEY, RATE, assert_same

COEF = 2.5
OBJECTIVES = {
    "token_mean": {"name": "r2vpo", "variance_coef": COEF},
    "constant_length": {
        "name": "r2vpo_fixed",
        "variance_coef": COEF,
        "normalize_variance_coef": True,
        "reduction": "constant_length",
    },
    "sequence_mean": {"name": "ppo_kl", "reduction": "sequence_mean"},
    "m2po": {"name": "m2po", "m2_budget": 0.01},
    "bonus": {"name": "policy_gradient", "kl_coef": 1.0, "kl_corrected": True, "entropy_coef": 2.0},
    "idle_critic": {
        "name": "policy_gradient",
        "kl_coef": 1.0,
        "kl_corrected": True,
        "entropy_coef": 2.0,
        "advantage": "gae",
        "value_coef": 0.0,
    },
    "critic": {
        "name": "policy_gradient",
        "advantage": "gae",
        "value_coef": 0.7,
        "kl_coef": 1.0,
        "kl_estimator": "k2",
        "kl_target": 0.01,
        "correction": "truncate",
        "max_weight": 2.0,
    },
}
VALUE_RATE = 0.1

# Four groups of four: two are dropped, and two rows more. Row i is in micro-batch i % 4: of the second none is left.
KEEP = np.ones(16, bool)
KEEP[[1, 4, 5, 6, 7, 8, 9, 10, 11, 13]] = False


@pytest.fixture(scope="module")
def learners(tiny_model, tiny_config, mesh):
    """Learners by name, made once: SGD whose rate is part of the state, one minibatch of 16 rows, two epochs."""
    made = {}

    def make(name, micro_batch_size=4):
        if (name, micro_batch_size) not in made:
            config = tiny_config(
                objective={"variance_budget": None, "dual_step": None} | OBJECTIVES[name],
                trainer={"micro_batch_size": micro_batch_size, "num_minibatches": 1},
                optimizer={"value_learning_rate": VALUE_RATE},
            )
            optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)
            made[name, micro_batch_size] = Learner(tiny_model[0], config, mesh, optimizer=optimizer)
        return made[name, micro_batch_size]

    return make


@pytest.fixture(scope="module")
def params(tiny_model):
    """Random ones, flat, as in test_learner."""
    params = random_params(tiny_model[0])
    params["embed"] *= 0.5
    return params


@pytest.fixture(scope="module")
def head(tiny_model):
    """A value head that says something: (kernel, bias)."""
    kernel = 3 * np.random.default_rng(3).standard_normal(tiny_model[0].config.hidden_size)
    return kernel.astype(np.float32), np.float32(0.3)


@pytest.fixture(scope="module")
def forward(tiny_model, rollout):
    """(params, head) -> (logp, entropy, value), each [B, T], from a full forward pass; differentiable."""
    model, prompt = tiny_model[0], rollout.prompt_size
    column = np.arange(rollout.tokens.shape[1])
    valid = (column >= prompt - rollout.prompt_length[:, None]) & (column < prompt + rollout.response_length[:, None])

    def scores(params, head):
        hidden = model.apply({"params": params}, rollout.tokens, mask=valid, method="hidden_states")
        logits = model.apply({"params": params}, rollout.tokens, mask=valid)[:, prompt - 1 : -1]
        logps = jax.nn.log_softmax(logits)
        logp = jnp.take_along_axis(logps, rollout.tokens[:, prompt:, None], axis=-1)[..., 0]
        value = hidden[:, prompt - 1 : -1] @ head[0] / hidden.shape[-1] + head[1]
        return logp, -jnp.sum(jnp.exp(logps) * logps, axis=-1), value

    return scores


@pytest.fixture(scope="module")
def scored(forward, params, head):
    """NumPy (logp, entropy, value) under the parameters that all tests start from."""
    return jax.tree.map(np.asarray, jax.jit(forward)(params, head))


@pytest.fixture(scope="module")
def batch(rollout, scored):
    """Off-policy rows, ratios around 1 +- 0.2, one advantage a response; junk wherever nothing counts."""
    generator = np.random.default_rng(0)
    logp, _, value = scored
    mask = np.asarray(rollout.response_mask)

    def near(x, spread):
        return np.where(mask, x + spread * generator.standard_normal(x.shape), np.nan).astype(np.float32)

    behavior = near(logp, 0.2)
    return rollout.replace(
        behavior_logp=behavior,
        reference_logp=near(behavior, 0.3),
        advantage=(100 * generator.standard_normal(len(mask))).astype(np.float32),
        value=near(value, 0.3),
        value_target=near(value, 0.5),
    )


def per_token(batch):
    """The same with an advantage for each token, of size 1."""
    advantage = np.random.default_rng(4).standard_normal(batch.behavior_logp.shape)
    return batch.replace(advantage=np.where(batch.response_mask, advantage, np.nan).astype(np.float32))


def garbage(batch):
    """What does not take part spoiled beyond use."""
    rows = ~batch.keep

    def spoil(x, value):
        if x is None:
            return None
        return np.where(rows[:, None] if x.ndim == 2 else rows, np.float32(value), x)

    spoiled = {"behavior_logp": np.nan, "reference_logp": -np.inf, "advantage": np.inf, "reward": np.nan}
    spoiled |= {"value": np.nan, "value_target": np.inf, "proximal_logp": np.nan, "weights": np.inf}
    return batch.replace(**{name: spoil(getattr(batch, name), value) for name, value in spoiled.items()})


def start(learner, params, *, rate=RATE, head=None, kl_coef=None):
    """A fresh state with this rate, value head and weight of the KL."""
    state = learner.init_state(params)
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": jnp.float32(rate)}
    state = state.replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
    if head is not None:
        state = state.replace(critic=state.critic.replace(kernel=jnp.asarray(head[0]), bias=jnp.asarray(head[1])))
    return state if kl_coef is None else state.replace(kl_coef=jnp.float32(kl_coef))


def update(learner, params, batch, **changes):
    """(gradients, Stats, state) of one update from `start`."""
    after, stats = learner.update(start(learner, params, **changes), sharding.put_batch(batch, learner.mesh))
    after, stats = sharding.to_host((after, stats))
    assert stats.mean("nonfinite") == 0
    return jax.tree.map(lambda new, old: (old - new) / RATE, after.params, params), stats, after


def weights_of(batch, reduction):
    """What each token's term is multiplied by, from the definition of the reduction over the rows kept."""
    mask = np.asarray(batch.response_mask) & batch.keep[:, None]
    return {
        "token_mean": mask / mask.sum(),
        "sequence_mean": mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / batch.keep.sum(),
        "constant_length": mask / (batch.keep.sum() * mask.shape[1]),
    }[reduction].astype(np.float32)


TERMS = dict.fromkeys(("variance", "behavior_kl", "corrected_kl", "reference_kl", "entropy", "value"), 0.0)


@pytest.fixture(scope="module")
def formula(forward):
    """Makes (loss, gradients by parameters and head) of every term there is, each times its coefficient."""

    def loss(trained, coefs, weight, share, data):
        """`share` multiplies a token's surrogate: importance weights, or 0 where a threshold cuts it off."""
        logp, entropy, value = forward(*trained)
        anchor, behavior, reference, advantage, old_value, target = data
        ratio = jnp.exp(jnp.where(weight > 0, logp - anchor, 0.0))
        x = jnp.where(weight > 0, logp - reference, 0.0)
        k3 = jnp.exp(-x) - 1 + x
        moved = old_value + jnp.clip(value - old_value, -0.2, 0.2)
        terms = -share * ratio * advantage
        terms += coefs["variance"] * (ratio - 1) ** 2
        terms += coefs["behavior_kl"] * (ratio - 1 - jnp.log(ratio))
        terms += coefs["corrected_kl"] * jnp.exp(jnp.where(weight > 0, logp - behavior, 0.0)) * k3
        terms += coefs["reference_kl"] * x**2 / 2
        terms -= coefs["entropy"] * entropy
        terms += coefs["value"] * jnp.maximum((value - target) ** 2, (moved - target) ** 2) / 2
        return jnp.sum(weight * terms)

    value_and_grad = jax.jit(jax.value_and_grad(loss))

    def make(trained, batch, reduction="token_mean", share=1.0, **coefs):
        weight = weights_of(batch, reduction)
        advantage = batch.advantage if batch.advantage.ndim == 2 else batch.advantage[:, None]
        anchor = batch.behavior_logp if batch.proximal_logp is None else batch.proximal_logp
        arrays = (anchor, batch.behavior_logp, batch.reference_logp, advantage, batch.value, batch.value_target)
        data = [np.where(weight > 0, x, 0.0).astype(np.float32) for x in arrays]
        share = np.broadcast_to(np.float32(share), weight.shape)
        assert coefs.keys() <= TERMS.keys()
        return value_and_grad(trained, TERMS | coefs, weight, share, data)

    return make


# ---- rows that take no part ----


def arguments(name, batch):
    """(keyword arguments of `start`, of `formula`) for the objective of that reduction, on that batch."""
    mask = weights_of(batch, "token_mean") > 0
    if name == "token_mean":
        return {}, {"variance": COEF}
    if name == "constant_length":  # times the root mean square of the advantages of all tokens kept
        advantage = np.broadcast_to(batch.advantage[:, None], mask.shape)[mask].astype(np.float64)
        return {}, {"variance": COEF * np.sqrt(np.mean(advantage**2))}
    return {"kl_coef": 300.0}, {"behavior_kl": 300.0}


@pytest.mark.parametrize("keep", [KEEP, np.ones(16, bool)], ids=["dropped", "all"])
@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_an_update_is_that_of_the_rows_kept(reduction, keep, learners, params, head, batch, scored, formula):
    """The multipliers are those of the state: 300, where the configuration starts at 1, for the KL."""
    batch = batch.replace(keep=keep)
    state, coefs = arguments(reduction, batch)
    loss, (expected, _) = formula((params, head), batch, reduction, **coefs)
    grads, stats, _ = update(learners(reduction), params, batch, **state)
    assert_same(grads, expected)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    # V over the rows kept: its sum and its count, in the weights of the loss (those of a token mean else).
    mask = np.asarray(batch.response_mask) & keep[:, None]
    excess = np.where(mask, np.expm1(np.where(mask, scored[0] - batch.behavior_logp, 0.0).astype(np.float64)), 0.0)
    total, number = stats.sums["ratio_variance"]
    if reduction == "sequence_mean":
        assert number == keep.sum()
        np.testing.assert_allclose(total, np.sum((excess**2).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)), rtol=1e-4)
    else:
        assert number == mask.sum()
        np.testing.assert_allclose(total, np.sum(excess**2), rtol=1e-4)
    assert stats.histogram.sum() == mask.sum()


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_what_a_dropped_row_holds_changes_nothing(reduction, learners, params, batch):
    """NaN, infinite advantages: parameters, loss and every statistic stay the same bit for bit."""
    batch = batch.replace(keep=KEEP)
    clean, spoiled = (update(learners(reduction), params, b) for b in (batch, garbage(batch)))
    assert np.isnan(garbage(batch).behavior_logp[1]).all()
    jax.tree.map(np.testing.assert_array_equal, spoiled[2].params, clean[2].params)
    jax.tree.map(np.testing.assert_array_equal, spoiled[1], clean[1])


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean"])
def test_a_batch_of_which_nothing_is_kept_moves_nothing(name, learners, params, batch):
    """The multipliers neither: nothing was measured. The same batch with all rows does move both."""
    learner = learners(name)
    state = dict.fromkeys(("lambda", "beta"))
    for keep in (np.zeros(16, bool), np.ones(16, bool)):
        rows = sharding.put_batch(batch.replace(keep=keep), learner.mesh)
        after, stats, variance = learner.train_on_rollout(start(learner, params, rate=1e-6), rows, KEY)
        after, stats = sharding.to_host((after, stats))
        np.testing.assert_array_equal(variance["nonfinite"], [0, 0])
        state = float(after.dual.variance_coef), float(after.kl_coef)
        begin = (COEF, 0.0) if name == "token_mean" else (0.0, 1.0)
        moved = any(np.any(a != b) for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(params), strict=True))
        if keep.any():
            assert moved
            assert state[name == "sequence_mean"] != begin[name == "sequence_mean"]
        else:
            assert not moved
            assert state == begin
            assert stats.mean("loss") == stats.mean("grad_norm") == variance["last"] == 0
    assert int(after.version) == 2


# ---- what depends on the whole minibatch ----


@pytest.fixture(scope="module")
def m2po_batch(batch):
    return batch.replace(keep=KEEP)


def test_m2po_cuts_at_the_threshold_of_the_whole_minibatch(learners, params, head, m2po_batch, scored, formula):
    mask = np.asarray(m2po_batch.response_mask) & KEEP[:, None]
    arrays = (scored[0], m2po_batch.behavior_logp, m2po_batch.advantage, mask)
    threshold_of = jax.jit(functools.partial(losses.m2po_threshold, budget=0.01))
    threshold = threshold_of(*arrays)
    loss, expected_stats = jax.jit(losses.m2po_loss)(*arrays, threshold=threshold)
    parts = [threshold_of(*(x[i::4] for x in arrays)) for i in range(4)]
    assert all(abs(part / threshold - 1) > 0.05 for part in parts), "that of a micro-batch would be another one"

    grads, stats, _ = update(learners("m2po"), params, m2po_batch)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    for name in ("clip_fraction_low", "clip_fraction_high"):
        assert stats.sums[name][0] == expected_stats[name][0] > 0
    # g is r A, and 0 for the tokens cut.
    log_ratio = np.where(mask, scored[0] - m2po_batch.behavior_logp, 0.0)
    cut = (m2po_batch.advantage[:, None] * log_ratio > 0) & (np.abs(log_ratio) > threshold)
    _, (expected, _) = formula((params, head), m2po_batch, share=~cut)
    assert_same(grads, expected)


def test_m2po_does_not_depend_on_the_split_into_micro_batches(learners, params, m2po_batch):
    split, whole = (update(learners("m2po", size), params, m2po_batch) for size in (4, 16))
    assert_same(split[0], whole[0])
    for name in ("loss", "ratio_variance", "clip_fraction_low", "clip_fraction_high"):
        np.testing.assert_allclose(split[1].mean(name), whole[1].mean(name), rtol=1e-5)


def test_m2po_has_a_budget_however_it_is_chosen(tiny_model, tiny_config, mesh, batch):
    """A loss can be set on top of any preset; what is left None then has the default of `losses`."""
    objective = {"name": "ppo_clip", "loss": "m2po", "variance_budget": None, "dual_step": None}
    learner = Learner(tiny_model[0], tiny_config(objective=objective, trainer={"num_minibatches": 1}), mesh)
    jax.eval_shape(learner._update, learner.abstract_state, batch)


def test_a_normalized_multiplier_makes_the_loss_proportional_to_the_advantages(learners, params, batch):
    batch = batch.replace(keep=KEEP)
    one, ten = (
        update(learners("constant_length"), params, batch.replace(advantage=f * batch.advantage)) for f in (1, 10)
    )
    assert_same(ten[0], jax.tree.map(lambda g: 10 * g, one[0]))
    np.testing.assert_allclose(ten[1].mean("loss"), 10 * one[1].mean("loss"), rtol=1e-5)
    np.testing.assert_allclose(ten[1].mean("penalty"), 10 * one[1].mean("penalty"), rtol=1e-5)
    sigma = dual.advantage_scale(batch.advantage, batch.learning_mask)
    np.testing.assert_allclose(one[1].mean("penalty"), COEF * sigma * one[1].mean("ratio_variance"), rtol=1e-5)
    assert abs(one[1].mean("penalty") / one[1].mean("loss")) > 0.01, "a penalty that counts"


# ---- KL divergences ----


def at_distance(batch, scored, spread):
    """The batch as if sampled from a policy whose log-probabilities are `spread` away on average."""
    noise = np.random.default_rng(5).standard_normal(scored[0].shape)
    return batch.replace(behavior_logp=(scored[0] + spread * noise).astype(np.float32))


@pytest.mark.parametrize(
    ("spread", "factor"),
    [
        (0.5, 2.0),  # KL about 0.5^2 / 2 = 0.12, far above 1.5 times the target of 0.01
        (0.14, 1.0),  # 0.0098: near it
        (0.05, 0.5),  # 0.0013: below 2/3 of it
    ],
)
def test_beta_follows_the_kl_to_the_behavior_policy(spread, factor, learners, params, batch, scored):
    """Nothing is learned here (the rate is 0), so both minibatches measure mean(r - 1 - log r) of the batch."""
    learner, batch = learners("sequence_mean"), at_distance(batch, scored, spread)
    log_ratio = (scored[0] - batch.behavior_logp)[np.asarray(batch.response_mask)].astype(np.float64)
    divergence = np.mean(np.expm1(log_ratio) - log_ratio)
    state = start(learner, params, rate=0.0, kl_coef=3.0)
    after, stats, _ = learner.train_on_rollout(state, sharding.put_batch(batch, learner.mesh), KEY)
    np.testing.assert_allclose(stats.mean("kl"), divergence, rtol=1e-3)
    # Away from the edges of the rule, so that rounding decides nothing.
    assert (divergence > 0.02, 0.0075 < divergence < 0.0135, divergence < 0.005) == (
        factor == 2.0,
        factor == 1.0,
        factor == 0.5,
    )
    assert float(after.kl_coef) == 3.0 * factor


def test_beta_stays_where_the_last_minibatch_measured_nothing(learners, params, batch, scored):
    """Far above the target in the first minibatch and nothing kept, or NaN, in the last."""
    learner, far = learners("sequence_mean"), at_distance(batch, scored, 0.5)

    def measured(batch):
        return learner.update(start(learner, params, rate=0.0), sharding.put_batch(batch, learner.mesh))[1]

    spoiled = far.behavior_logp.copy()
    spoiled[0, 0] = np.nan
    good, empty, nan = (
        measured(b) for b in (far, far.replace(keep=np.zeros(16, bool)), far.replace(behavior_logp=spoiled))
    )
    state = learner.init_state(params)
    for stats, expected in (([good, empty], 1.0), ([good, nan], 1.0), ([empty, good], 2.0), ([nan, good], 2.0)):
        _, kl_coef, _, _ = learner._step_multipliers(state.dual, state.kl_coef, stats)
        assert float(kl_coef) == expected


def test_a_corrected_kl_and_an_entropy_bonus_follow_the_formula(learners, params, head, batch, scored, formula):
    """-r A + beta r k3 - c H with advantages of tokens; beta is 5, where the configuration starts at 1."""
    batch = per_token(batch).replace(keep=KEEP)
    loss, (expected, _) = formula((params, head), batch, corrected_kl=5.0, entropy=2.0)
    grads, stats, _ = update(learners("bonus"), params, batch, kl_coef=5.0)
    assert_same(grads, expected)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    mask = np.asarray(batch.response_mask) & KEEP[:, None]
    x, log_ratio = (
        (scored[0] - other)[mask].astype(np.float64) for other in (batch.reference_logp, batch.behavior_logp)
    )
    corrected = np.mean(np.exp(log_ratio) * (np.exp(-x) - 1 + x))
    assert abs(corrected / np.mean(np.exp(-x) - 1 + x) - 1) > 0.01, "uncorrected it is another number"
    np.testing.assert_allclose(stats.mean("kl"), corrected, rtol=1e-4)
    np.testing.assert_allclose(stats.mean("entropy"), np.mean(scored[1][mask]), rtol=1e-5)


def test_a_step_along_the_bonus_alone_raises_the_entropy(learners, params, head, batch, forward):
    """No advantage and no KL: the gradient is -c dH, so a step of size e raises H by e |g|^2 / c at first order."""
    batch = per_token(batch)
    nothing = batch.replace(advantage=np.zeros_like(batch.advantage))
    grads, stats, _ = update(learners("bonus"), params, nothing, kl_coef=0.0)
    np.testing.assert_allclose(stats.mean("loss"), -2.0 * stats.mean("entropy"), rtol=1e-6)
    squared = sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))
    size = 0.01 / squared
    mask = np.asarray(batch.response_mask)
    entropy = jax.jit(lambda params: jnp.mean(forward(params, head)[1], where=mask))
    moved = entropy(jax.tree.map(lambda p, g: p - size * g, params, grads))
    np.testing.assert_allclose(moved - entropy(params), size * squared / 2.0, rtol=0.05)


# ---- corrections ----

OFFSETS = np.linspace(-1.0, 1.5, 16).astype(np.float32)  # exp: 0.37 to 4.5, and 2 at 0.69


@pytest.fixture(scope="module")
def mismatched(batch, scored):
    """Sampled by a policy whose log-probabilities are off by one number a row."""
    behavior = np.where(batch.response_mask, scored[0] - OFFSETS[:, None], np.nan)
    return per_token(batch).replace(behavior_logp=behavior.astype(np.float32))


def test_weights_are_the_truncated_ratios_of_the_learner_to_the_sampler(learners, params, mismatched, scored):
    """And taken before the first update, by the learner's own scores."""
    learner = learners("critic")
    mask = np.asarray(mismatched.response_mask)
    corrected = learner._correct(learner.init_state(params).params, sharding.put_batch(mismatched, learner.mesh))
    np.testing.assert_allclose(np.asarray(corrected.proximal_logp)[mask], scored[0][mask], rtol=1e-5, atol=1e-5)
    expected = np.where(mask, np.minimum(np.exp(OFFSETS), 2.0)[:, None], 0.0)
    assert (np.exp(OFFSETS) > 2.0).sum() == 5, "some are cut"
    np.testing.assert_allclose(corrected.weights, expected, rtol=1e-4)


def test_the_ratio_is_against_the_proximal_policy(learners, params, head, mismatched, scored):
    """r is 1 in the first minibatch, though the sampler's policy is another: (exp(c) - 1)^2 is 1.7 on average."""
    learner = learners("critic")
    state = start(learner, params, rate=0.0, head=head)
    after, stats, variance = learner.train_on_rollout(state, sharding.put_batch(mismatched, learner.mesh), KEY)
    assert variance["first"] < 1e-9
    assert variance["last"] < 1e-9  # nothing was learned
    mask = np.asarray(mismatched.response_mask)
    uncorrected = np.mean(np.square(np.expm1(OFFSETS))[:, None] * np.ones(mask.shape), where=mask)
    assert uncorrected > 1
    weights = np.broadcast_to(np.minimum(np.exp(OFFSETS), 2.0)[:, None], mask.shape)[mask]
    np.testing.assert_allclose(stats.mean("weight"), weights.mean(), rtol=1e-4)
    np.testing.assert_allclose(stats.mean("weight_squared"), np.square(weights).mean(), rtol=1e-4)
    # The anchor stays where it is while the parameters move.
    state = start(learner, params, rate=1e-3, head=head)
    after, _, variance = learner.train_on_rollout(state, sharding.put_batch(mismatched, learner.mesh), KEY)
    assert variance["first"] < 1e-9 < 1e-7 < variance["last"] < 0.1
    assert int(after.version) == 2


# ---- the critic ----


def corrected(batch, scored):
    """As `_with_correction` leaves it, with weights of its own to tell them from others."""
    generator = np.random.default_rng(6)
    mask = np.asarray(batch.response_mask)
    near = scored[0] + 0.2 * generator.standard_normal(mask.shape)
    weights = generator.uniform(0.5, 2.0, mask.shape)
    return batch.replace(
        proximal_logp=np.where(mask, near, np.nan).astype(np.float32),
        weights=np.where(mask, weights, np.nan).astype(np.float32),
    )


def test_policy_value_kl_and_correction_add_up(learners, params, head, batch, scored, formula):
    """-w r A + beta x^2 / 2 + 0.7 value loss, r against the proximal policy; weights are the surrogate's alone."""
    batch = corrected(per_token(batch), scored).replace(keep=KEEP)
    share = np.where(batch.learning_mask, batch.weights, 0.0)
    loss, (expected, head_grads) = formula((params, head), batch, share=share, reference_kl=3.0, value=0.7)
    grads, stats, after = update(learners("critic"), params, batch, head=head, kl_coef=3.0)
    assert_same(grads, expected)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves((expected, head_grads))))
    np.testing.assert_allclose(stats.mean("grad_norm"), norm, rtol=1e-5)
    # The head has an Adam of its own, whose first step is its rate against the sign of the gradient.
    assert min(np.abs(g).min() for g in head_grads) > 1e-4
    for new, old, grad in zip((after.critic.kernel, after.critic.bias), head, head_grads, strict=True):
        np.testing.assert_allclose(new, old - VALUE_RATE * np.sign(grad), rtol=1e-4, atol=1e-4)


def test_what_a_dropped_row_holds_changes_nothing_for_a_critic(learners, params, head, batch, scored):
    batch = corrected(per_token(batch), scored).replace(keep=KEEP)
    clean, spoiled = (update(learners("critic"), params, b, head=head) for b in (batch, garbage(batch)))
    jax.tree.map(np.testing.assert_array_equal, spoiled[1:], clean[1:])


def test_the_value_loss_alone_moves_the_trunk(learners, params, head, batch, scored, formula):
    batch = corrected(per_token(batch), scored)
    nothing = batch.replace(advantage=np.zeros_like(batch.advantage))
    loss, (expected, _) = formula((params, head), nothing, value=0.7)
    grads, stats, _ = update(learners("critic"), params, nothing, head=head, kl_coef=0.0)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    assert largest > 1e-3
    for a, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_allclose(stats.mean("loss"), loss, rtol=1e-5)
    np.testing.assert_allclose(0.7 * stats.mean("value_loss"), loss, rtol=1e-5)
    mask = np.asarray(batch.response_mask)
    targets, errors = batch.value_target[mask], (scored[2] - batch.value_target)[mask]
    np.testing.assert_allclose(critic.explained_variance(stats), 1 - np.var(errors) / np.var(targets), rtol=1e-3)
    bounded = np.abs(scored[2] - batch.value)[mask] > 0.2
    assert 0 < stats.mean("value_clip_fraction") < bounded.mean()


def test_a_critic_of_weight_zero_leaves_the_policy_alone(learners, params, head, batch):
    batch = per_token(batch)
    without = update(learners("bonus"), params, batch, kl_coef=5.0)
    with_one = update(learners("idle_critic"), params, batch, kl_coef=5.0, head=head)
    assert_same(with_one[0], without[0])
    for name in ("loss", "kl", "entropy", "surrogate"):
        np.testing.assert_allclose(with_one[1].mean(name), without[1].mean(name), rtol=1e-6)
    np.testing.assert_array_equal(with_one[2].critic.kernel, head[0])  # no gradient reaches the head
    assert without[2].critic is None
    assert with_one[1].mean("value_loss") > 0.01, "it is measured all the same"


def test_values_are_those_of_the_head(learners, params, head, batch, scored):
    learner = learners("critic")
    values = learner.values(start(learner, params, head=head), sharding.put_batch(batch, learner.mesh))
    mask = np.asarray(batch.response_mask)
    np.testing.assert_allclose(np.asarray(values)[mask], scored[2][mask], rtol=1e-4, atol=1e-5)
    fresh = learner.values(learner.init_state(params), sharding.put_batch(batch, learner.mesh))
    np.testing.assert_array_equal(np.asarray(fresh), np.zeros_like(values))


def test_the_critic_learns_what_can_be_learned(learners, params, head, batch, scored):
    """Targets are those of another head: from 0, where a fresh one starts, towards 1. The decoder stands still.

    The first step of Adam is its rate in every number that has a gradient, so that no weight may be left out.
    """
    learner = learners("critic")
    target = np.where(batch.response_mask, scored[2], np.nan).astype(np.float32)
    # The old values are the targets, so that the clip never binds on the way there.
    batch = corrected(per_token(batch), scored).replace(value=target, value_target=target)
    rows, state, history = sharding.put_batch(batch, learner.mesh), start(learner, params, rate=0.0), []
    for _ in range(60):
        state, stats = learner.update(state, rows)
        history.append(critic.explained_variance(jax.tree.map(np.asarray, stats)))
        if len(history) == 1:
            np.testing.assert_allclose(np.abs(state.critic.kernel), VALUE_RATE, rtol=1e-2)
            np.testing.assert_allclose(np.abs(state.critic.bias), VALUE_RATE, rtol=1e-2)
    np.testing.assert_allclose(history[0], 0.0, atol=1e-5)
    assert history[0] < history[20] < history[-1]
    assert history[-1] > 0.7
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(state.params), params)


# ---- one program for all of it ----


def test_nothing_compiles_after_the_first_rollout(learners, tiny_model, params, rollout, mesh):
    """Critic, adaptive KL to a reference and correction, as the trainer calls them; other rows the second time."""
    learner = learners("critic")
    reference = learner.sampler_params(learner.init_state(tiny_model[1]))
    functions = ("update", "_minibatch", "_step_multipliers", "_score", "_values", "_correct", "_sampler_params")
    state, sizes, order = start(learner, params, rate=1e-3), [], np.arange(16)
    for number in range(3):
        order = np.roll(order, 4)
        drawn = jax.tree.map(lambda x: x[order], rollout)  # noqa: B023
        rows = sharding.put_batch(drawn, mesh)
        drawn = drawn.replace(
            reference_logp=sharding.to_host(learner.score(reference, rows)),
            value=sharding.to_host(learner.values(state, rows)),
            value_target=np.ones(drawn.behavior_logp.shape, np.float32),
            advantage=np.ones(drawn.behavior_logp.shape, np.float32),
        )
        state, _, _ = learner.train_on_rollout(state, sharding.put_batch(drawn, mesh), jax.random.key(number))
        learner.sampler_params(state)
        sizes.append({name: getattr(learner, name)._cache_size() for name in functions})
    assert all(size >= 1 for size in sizes[0].values())
    assert sizes[1] == sizes[0]
    assert sizes[2] == sizes[0]
    assert int(state.version) == 6


def test_the_objectives_here_are_what_they_are_taken_for():
    """So that no default turns a comparison into one of nothing."""
    made = {name: ObjectiveConfig(**fields) for name, fields in OBJECTIVES.items()}
    assert {made[name].reduction for name in losses.REDUCTIONS} == set(losses.REDUCTIONS)
    assert made["token_mean"].adaptive
    assert not made["constant_length"].adaptive
    assert (made["sequence_mean"].kl_to, made["sequence_mean"].kl_target) == ("behavior", 0.01)
    assert made["critic"].critic
    assert made["critic"].needs_reference
    assert made["bonus"].kl_estimator == "k3"
    assert made["critic"].value_clip == 0.2
