"""One rollout batch as pure functions: minibatches, the optimizer update, and the step of the multipliers.

    settings = UpdateSettings(objective=make_objective("r2vpo"), group_size=16, num_minibatches=4)
    state = init_state(params, model, optimizers, settings)
    state, report = train_on_rollout(state, rollout, key, UpdateFunctions(model, optimizers, settings))

Everything here can be called under jit, vmap and scan, on any devices; `Learner` places and jits it. The multipliers
(lambda of the ratio variance, beta of an adaptive KL) step once per rollout batch: beta on what the *last* minibatch
measured before its own update, lambda on that or on the whole batch after the last update (objective.dual.measure).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import struct

from r2vpo_jax import advantages, corrections, dual, kl, losses, scoring
from r2vpo_jax.models import lora
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.train_stats import TrainStats
from r2vpo_jax.training import accumulation, critic, packing, terms
from r2vpo_jax.training.critic import CriticState
from r2vpo_jax.training.learner_state import LearnerState, Optimizers
from r2vpo_jax.training.settings import UpdateSettings
from r2vpo_jax.training.terms import anchor, mean_over_tokens, normalizer


@struct.dataclass
class RolloutReport:
    """What training on one rollout batch measured."""

    stats: TrainStats  # merged over the updates
    variance_first: jax.Array  # f32 [] V of the first minibatch, before its update
    variance_last: jax.Array  # f32 [] V of the last minibatch, before its update
    variance_after: jax.Array | None  # f32 [] V of the whole batch after the last update, where that is measured
    dual_signal: jax.Array  # f32 [] what the multiplier was given
    skipped: jax.Array  # f32 [updates] 1 where an update was not finite, and so was not applied


def init_state(params, model, optimizers: Optimizers, settings: UpdateSettings) -> LearnerState:
    """A fresh state.

    Args:
      params: of the model; they become the state's.
      model: the decoder.
      optimizers: the value head has one if the objective has a critic.
      settings: of the run.
    """
    objective = settings.objective
    return LearnerState(
        params=params,
        # Moments are float32 whatever the parameters are, as the gradients that they are sums of.
        opt_state=optimizers.policy.init(jax.tree.map(lambda x: x.astype(jnp.float32), lora.split(params)[0])),
        # Objectives without a penalty have no multiplier: it is 0.
        dual=dual.init(objective.dual.coef if objective.has_multiplier else 0.0),
        kl_coef=jnp.float32(objective.kl.coef),
        critic=critic.init(model.config.hidden_size, optimizers.value) if objective.critic else None,
        version=jnp.zeros((), jnp.int32),
    )


# One optimizer update ---------------------------------------------------------------------------------------


def update(
    state: LearnerState, batch: Rollout, model, optimizers: Optimizers, settings: UpdateSettings
) -> tuple[LearnerState, TrainStats]:
    """The optimizer step, and nothing else. A non-finite update is skipped, and counted in the statistics.

    Args:
      state: the old one.
      batch: a minibatch of B responses with advantages; B is a multiple of the micro-batch size. With
        reference_logp for a KL to the reference, with value and value_target for a critic.
      model, optimizers, settings: of the run.

    Raises:
      ValueError: B is not a multiple of the micro-batch size.
    """
    num_micro, whole = settings.num_micro_batches(len(batch.keep)), _of_whole_minibatch(state, batch, model, settings)
    params, frozen = lora.split(state.params)
    head = None if state.critic is None else (state.critic.kernel, state.critic.bias)

    def full(trained):
        return lora.join(frozen, trained[0]), trained[1]

    if settings.packing:
        loss_of = functools.partial(loss_of_scores, settings=settings, **whole)
        loss, scores, grads = packing.value_and_grad(loss_of, (params, head), batch, model, settings, full)
        stats = _of_row_micro_batches(lambda *rows: loss_of(*rows)[1], scores, batch, settings)
    else:

        def loss_fn(trained, rows):
            return micro_batch_loss(full(trained), rows, model=model, settings=settings, **whole)

        loss, stats, grads = accumulation.value_and_grad(loss_fn, (params, head), batch, num_micro)
    grads, head_grads = grads
    stats, grad_norm = stats.reduce(), optax.tree.norm((grads, head_grads))
    updates, opt_state = optimizers.policy.update(grads, state.opt_state, params)
    scales = settings.objective.correction.step_scaling != "none"
    if scales:
        # Of the update, weight decay included: it is the learning rate that is scaled.
        scale = terms.step_scale(stats, settings.objective.correction)
        updates = jax.tree.map(lambda x: (scale * x).astype(x.dtype), updates)
    new = {"params": optax.apply_updates(params, updates), "opt_state": opt_state, "critic": None}
    if head is not None:
        head_updates, head_opt_state = optimizers.value.update(head_grads, state.critic.opt_state, head)
        new["critic"] = CriticState(*optax.apply_updates(head, head_updates), head_opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    old = {name: getattr(state, name) for name in new} | {"params": params}
    # In the dtypes of `init_state`, whatever the optimizer makes of them: a checkpoint restores these.
    new = jax.tree.map(lambda new, old: jnp.where(finite, new.astype(old.dtype), old), new, old)
    one = jnp.float32(1)
    measured = {
        "loss": (loss, one),
        "grad_norm": (grad_norm, one),
        "update_norm": (optax.tree.norm(updates), one),
        "nonfinite": ((~finite).astype(jnp.float32), one),
    }
    if scales:
        measured["step_scale"] = (scale, one)
    stats = stats.replace(sums=stats.sums | measured)
    new["params"] = lora.join(frozen, new["params"])
    return state.replace(**new, version=state.version + 1), stats


def computed_arguments(state: LearnerState, batch: Rollout, model, settings: UpdateSettings) -> dict[str, jax.Array]:
    """Those arguments of the loss that depend on the state or on the whole minibatch (`losses.computed`)."""
    objective = settings.objective

    def variance_coef():
        coef = state.dual.variance_coef
        if objective.dual.normalize:
            coef = coef * dual.advantage_scale(batch.advantage, batch.learning_mask)
        return coef

    def threshold():
        arrays = score(state.params, batch, model, settings), anchor(batch), batch.advantage, batch.learning_mask
        return losses.m2po_threshold(*arrays, budget=objective.loss.options["budget"])

    how = {"variance_coef": variance_coef, "threshold": threshold}
    return {name: how[name]() for name in losses.computed(objective.loss.name)}


def _of_whole_minibatch(state: LearnerState, batch: Rollout, model, settings: UpdateSettings) -> dict:
    """The arguments of `loss_of_scores` that are the same for all micro-batches."""
    return {
        "state": state,
        "normalizer": normalizer(batch, settings.objective),
        "computed": computed_arguments(state, batch, model, settings),
        "imitation_normalizer": terms.imitation_normalizer(batch, settings.objective),
    }


def micro_batch_loss(
    trained, batch: Rollout, *, model, settings: UpdateSettings, **whole
) -> tuple[jax.Array, TrainStats]:
    """(loss, statistics) of one micro-batch; losses add up over those of a minibatch.

    Args:
      trained: (params, value head or None).
      batch: rows of the minibatch.
      model, settings: of the run.
      **whole: as for `loss_of_scores`.
    """
    return loss_of_scores(score_rows(*trained, batch, model, settings), batch, settings=settings, **whole)


def loss_of_scores(
    scores: scoring.Scores,
    batch: Rollout,
    *,
    state: LearnerState,
    settings: UpdateSettings,
    normalizer,
    computed,
    imitation_normalizer=None,
) -> tuple[jax.Array, TrainStats]:
    """`micro_batch_loss`, given the scores of its rows.

    Args:
      scores: f32 [B, T] each, under the policy.
      batch: rows of the minibatch.
      state: for the multipliers and the version.
      settings: of the run.
      normalizer: `normalizer` of the whole minibatch.
      computed: `computed_arguments` of the whole minibatch.
      imitation_normalizer: `terms.imitation_normalizer` of the whole minibatch, where right responses are imitated.
    """
    objective, mask = settings.objective, batch.learning_mask
    reduction = {"reduction": objective.loss.reduction, "normalizer": normalizer}
    weights, weight_stats = terms.update_weights(batch, scores.logp, objective)
    weighed = batch.replace(weights=weights)
    shared = {"batch": weighed, "kl_coef": state.kl_coef, "objective": objective}
    loss_of = functools.partial(terms.policy_loss, **shared, **reduction, **computed)
    loss, stats = loss_of(scores.logp)
    merged = terms.gradient_stats(lambda logp: loss_of(logp)[0], scores.logp, weighed, state.version, reduction)

    stats |= weight_stats
    stats["entropy"] = mean_over_tokens(scores.entropy, mask)
    if objective.imitates:
        imitated = terms.imitation(batch, scores.logp, objective.loss.reduction, imitation_normalizer)
        loss = loss + objective.loss.imitation_coef * imitated
        stats["imitation"] = mean_over_tokens(-scores.logp, batch.response_mask & terms.right(batch)[:, None])
    if objective.has_entropy_bonus:
        loss = loss - objective.loss.entropy_coef * losses.reduce(scores.entropy, mask, **reduction)
    if scores.value is not None:
        value_loss, value_stats = critic.value_loss(
            scores.value, batch.value, batch.value_target, mask, clip=objective.advantage.value_clip, **reduction
        )
        loss = loss + objective.advantage.value_coef * value_loss
        stats |= value_stats
    return loss, merged.replace(sums=merged.sums | jax.lax.stop_gradient(stats))


# Scoring ----------------------------------------------------------------------------------------------------


def score_rows(params, head, batch: Rollout, model, settings: UpdateSettings) -> scoring.Scores:
    """Log-probabilities and entropies of the responses, and values with a head (kernel, bias); all rows at one time."""
    return scoring.score(
        model,
        params,
        batch.tokens,
        batch.prompt_length,
        batch.response_length,
        batch.temperature,
        prompt_size=batch.prompt_size,
        chunk_size=settings.scoring_chunk_size,
        value_head=None if head is None else functools.partial(critic.values, head),
        entropy_gradient=settings.objective.has_entropy_bonus,
    )


def score(params, batch: Rollout, model, settings: UpdateSettings) -> jax.Array:
    """Log-probabilities f32 [B, T] of a batch's responses, one micro-batch at a time, by the same code as the update."""
    return _map_rows(lambda scores: scores.logp, (params, None), batch, model, settings)


def values(params, state: CriticState, batch: Rollout, model, settings: UpdateSettings) -> jax.Array:
    """The critic's values f32 [B, T] before each response token."""
    return _map_rows(lambda scores: scores.value, (params, (state.kernel, state.bias)), batch, model, settings)


def _map_rows(of, trained, batch: Rollout, model, settings: UpdateSettings):
    """One of the scores of all rows, f32 [B, T], one micro-batch at a time."""
    if settings.packing:
        return of(packing.score(trained, batch, model, settings))
    split = accumulation.split_rows(batch, settings.num_micro_batches(len(batch.keep)))
    outputs = jax.lax.map(lambda rows: of(score_rows(*trained, rows, model, settings)), split)
    return outputs.swapaxes(0, 1).reshape(batch.behavior_logp.shape)


def _of_row_micro_batches(function, scores: scoring.Scores, batch: Rollout, settings: UpdateSettings):
    """`function` (scores, rows) of each micro-batch of rows, stacked."""
    split = accumulation.split_rows((scores, batch), settings.num_micro_batches(len(batch.keep)))
    return jax.lax.map(lambda rows: function(*rows), split)


# One rollout batch ------------------------------------------------------------------------------------------


def take_minibatch(rollout: Rollout, key, number, settings: UpdateSettings) -> Rollout:
    """The minibatch of update `number`: each epoch shuffles whole groups anew.

    Args:
      rollout: a rollout batch; groups are contiguous.
      key: of the rollout batch.
      number: int or int32 [], from 0.
      settings: of the run.
    """
    group, num_groups = settings.group_size, rollout.tokens.shape[0] // settings.group_size
    size = num_groups // settings.num_minibatches
    epoch, index = number // settings.num_minibatches, number % settings.num_minibatches
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_groups)
    chosen = jax.lax.dynamic_slice_in_dim(order, index * size, size)
    rows = (chosen[:, None] * group + jnp.arange(group)).reshape(-1)
    return jax.tree.map(lambda x: x[rows], rollout)


def correct(params, rollout: Rollout, model, settings: UpdateSettings) -> Rollout:
    """The rollout with proximal log-probabilities, taken once before the first update, and their weights."""
    proximal = score(params, rollout, model, settings)
    weights = terms.correction_weights(proximal, rollout, settings.objective.correction)
    return rollout.replace(proximal_logp=proximal, weights=weights)


def move_baseline(params, rollout: Rollout, model, settings: UpdateSettings) -> Rollout:
    """The rollout with advantages from the baseline of least variance (`advantages.minimum_variance`).

    It takes the norm of the gradient of each response's log-probability, one backward pass after the other, before the
    first update.
    """
    trained, frozen = lora.split(params)

    def one(row: Rollout):
        row = jax.tree.map(lambda x: x[None], row)

        def log_probability(trained):
            logp = score_rows(lora.join(frozen, trained), None, row, model, settings).logp
            return jnp.sum(jnp.where(row.learning_mask, logp, 0.0)), logp

        gradient, logp = jax.grad(log_probability, has_aux=True)(trained)
        weight = corrections.sequence_weights(logp, row.behavior_logp, row.learning_mask)[0]
        return jnp.where(row.keep[0], (weight * optax.tree.norm(gradient)) ** 2, 0.0)

    weights = jax.lax.map(one, rollout)
    # A response has one advantage; where an estimator repeats it at each token, the first is as good as any.
    per_token = rollout.advantage.ndim == 2
    first = jnp.where(rollout.keep, rollout.advantage[:, 0] if per_token else rollout.advantage, 0.0)
    shift = advantages.minimum_variance(first, settings.group_size, weights) - first
    return rollout.replace(advantage=rollout.advantage + (shift[:, None] if per_token else shift))


def variance(state: LearnerState, rollout: Rollout, model, settings: UpdateSettings) -> jax.Array:
    """V of a whole rollout batch under the parameters as they are, f32 []: the mean that the penalty takes."""
    whole, trained = _of_whole_minibatch(state, rollout, model, settings), (state.params, None)

    def of_scores(scores, rows):
        return loss_of_scores(scores, rows, settings=settings, **whole)[1].sums["ratio_variance"]

    if settings.packing:
        scores = packing.score(trained, rollout, model, settings, take=rollout.keep)
        variances = _of_row_micro_batches(of_scores, scores, rollout, settings)
    else:
        split = accumulation.split_rows(rollout, settings.num_micro_batches(len(rollout.keep)))
        variances = jax.lax.map(lambda rows: of_scores(score_rows(*trained, rows, model, settings), rows), split)
    total, count = (jnp.sum(x) for x in variances)
    return total / jnp.where(count == 0, 1.0, count)


def step_multipliers(
    dual_state: dual.DualState,
    kl_coef,
    stats: TrainStats | Sequence[TrainStats],
    settings: UpdateSettings,
    *,
    variance_before=None,
    variance_after=None,
) -> tuple[dual.DualState, jax.Array, RolloutReport]:
    """The multipliers after a rollout batch, and what its updates measured.

    Args:
      dual_state, kl_coef: of the state.
      stats: of each update, in order: one after the other, or stacked along axis 0.
      settings: of the run.
      variance_before, variance_after: f32 [], V of the batch before its first and after its last update, for
        objective.dual.measure=after; the first is needed with stale data only (`UpdateSettings.excess`).

    Raises:
      ValueError: objective.dual.measure=after without these, or corrected or pooled with a single update.
    """
    objective = settings.objective
    if not isinstance(stats, TrainStats):
        stats = jax.tree.map(lambda *x: jnp.stack(x), *stats)
    first_stats, last_stats = (jax.tree.map(lambda x: x[i], stats) for i in (0, -1))  # noqa: B023
    first, last = first_stats.mean("ratio_variance"), last_stats.mean("ratio_variance")
    # A minibatch that was skipped as non-finite (and counted), be it for its gradient alone, or in which nothing counts,
    # measures nothing.
    skipped = stats.sums["nonfinite"][0]
    measured = jnp.isfinite(last) & (last_stats.sums["ratio_variance"][1] > 0) & (skipped[-1] == 0)
    measure = objective.dual.measure if objective.dual.adaptive else "before"
    if measure == "after" and (variance_after is None or (settings.excess and variance_before is None)):
        raise ValueError("objective.dual.measure=after needs variance_after, and variance_before with stale data")
    start, end = (variance_before, variance_after) if measure == "after" else (first, last)
    signal = end - start if settings.excess else end
    if measure == "corrected":
        signal = dual.end_of_batch_variance(signal, settings.num_updates)
    if measure == "pooled":
        sums, counts = stats.sums["ratio_variance"]
        added = sums / jnp.where(counts == 0, 1.0, counts) - first
        signal = dual.pooled_variance(added, counts) + (0.0 if settings.excess else first)
    if objective.dual.adaptive:
        stepped = dual.update(
            dual_state,
            signal,
            budget=objective.dual.budget,
            step=objective.dual.step,
            max_coef=objective.dual.max_coef,
            max_step=objective.dual.max_step,
            rule=objective.dual.rule,
            smoothing=objective.dual.smoothing,
            carry=objective.dual.carry,
            proportional=objective.dual.proportional,
        )
        possible = measured & jnp.isfinite(signal)
        dual_state = jax.tree.map(lambda new, old: jnp.where(possible, new, old), stepped, dual_state)
        measured = possible
    if objective.kl.target is not None:
        stepped = kl.adapt_coef(kl_coef, last_stats.mean("kl"), target=objective.kl.target)
        kl_coef = jnp.where(measured, stepped, kl_coef)
    report = RolloutReport(
        stats=stats.reduce(),
        variance_first=first,
        variance_last=last,
        variance_after=variance_after,
        dual_signal=signal,
        skipped=skipped,
    )
    return dual_state, kl_coef, report


class UpdateFunctions:
    """The functions above for one run. `Learner` has the same, each placed and jitted, and a loop on the host.

    Args:
      model: the decoder.
      optimizers: of the run.
      settings: of the run.
    """

    def __init__(self, model, optimizers: Optimizers, settings: UpdateSettings):
        self.settings = settings
        run = {"model": model, "settings": settings}
        self.update = functools.partial(update, optimizers=optimizers, **run)
        self.score = functools.partial(score, **run)
        self.values = functools.partial(values, **run)
        self.correct = functools.partial(correct, **run)
        self.move_baseline = functools.partial(move_baseline, **run)
        self.minibatch = functools.partial(take_minibatch, settings=settings)
        self.variance = functools.partial(variance, **run)
        self.step_multipliers = functools.partial(step_multipliers, settings=settings)

    def each_update(self, step, state: LearnerState):
        """(state, stacked results) of `step(state, number)` for each update of a rollout batch."""
        return jax.lax.scan(step, state, jnp.arange(self.settings.num_updates))


def before_updates(params, rollout: Rollout, functions) -> Rollout:
    """The rollout with what is taken once, before its first update: importance weights, and advantages of another baseline.

    Args:
      params: of the policy before the first update.
      rollout: with advantages.
      functions: `UpdateFunctions`, or a `Learner`.
    """
    objective = functions.settings.objective
    if objective.correction.weighs:
        rollout = functions.correct(params, rollout)
    if objective.advantage.minimum_variance:
        rollout = functions.move_baseline(params, rollout)
    return rollout


def train_on_rollout(state: LearnerState, rollout: Rollout, key, functions) -> tuple[LearnerState, RolloutReport]:
    """N minibatch updates, then one step of the multipliers: the order of things, for every way to compute them.

    Args:
      state: the old one.
      rollout: with advantages; reference_logp with a KL to the reference; value and value_target with a critic.
      key: decides the shuffle.
      functions: `UpdateFunctions`, or a `Learner`.
    """
    rollout = before_updates(state.params, rollout, functions)

    def step(state, number):
        return functions.update(state, functions.minibatch(rollout, key, number))

    settings = functions.settings
    after, before = settings.objective.measures_after, None
    if after and settings.excess:
        before = functions.variance(state, rollout)
    state, stats = functions.each_update(step, state)
    measured = {"variance_before": before, "variance_after": functions.variance(state, rollout) if after else None}
    dual_state, kl_coef, report = functions.step_multipliers(state.dual, state.kl_coef, stats, **measured)
    return state.replace(dual=dual_state, kl_coef=kl_coef), report
