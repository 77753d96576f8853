"""The learner: one jitted, sharded optimizer update, and one dual step a rollout batch.

`update` is the optimizer step only. `train_on_rollout` runs the N minibatch updates of a rollout batch and
then steps the multipliers (lambda of the ratio variance, beta of an adaptive KL) once, on what the *last*
minibatch measured before its own update: on fresh data the first minibatch has r = 1 by construction, and stepping
on it would bias them low. On stale data lambda sees what the updates added: V of the last minibatch less V of the
first.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from r2vpo_jax import accumulation, corrections, critic, dual, kl, losses, models, ratio_stats, scoring, sharding
from r2vpo_jax.config import Config, OptimizerConfig
from r2vpo_jax.critic import CriticState
from r2vpo_jax.objective import ObjectiveConfig
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.train_stats import TrainStats


@struct.dataclass
class LearnerState:
    """Everything that training changes."""

    params: dict
    opt_state: optax.OptState
    dual: dual.DualState
    kl_coef: jax.Array  # f32 [] beta, the weight of the KL divergence
    critic: CriticState | None  # the value head, if there is one
    version: jax.Array  # int32 [] optimizer updates done


class NonFiniteUpdateError(FloatingPointError):
    """An update had a NaN or infinite loss or gradient. It was not applied."""


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Warm-up, then constant, linear or cosine, over `num_updates` updates."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(num_updates - config.warmup_updates, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, end, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_fraction),
    }[config.schedule]
    if config.warmup_updates == 0:
        return after
    warmup = optax.linear_schedule(peak / config.warmup_updates, peak, max(config.warmup_updates - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_updates])


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """AdamW with a global-norm clip; weight decay on matrices only."""

    def is_matrix(params):
        names = ("kernel", "embed", "lm_head")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, num_updates),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        ),
    )


def policy_loss(config: ObjectiveConfig):
    """The configured objective: `losses.get` with every hyper-parameter bound that the learner does not compute."""
    return functools.partial(losses.get(config.loss), reduction=config.reduction, **config.hyperparameters())


class Learner:
    """The jitted functions of one run. Holds no state: `LearnerState` goes in and comes out (donated).

    Attributes:
      update: (state, minibatch) -> (state, TrainStats). The optimizer step; the state is donated.
      state_shardings: where each part of a LearnerState lives.
    """

    def __init__(self, model: models.Decoder, config: Config, mesh: jax.sharding.Mesh, optimizer=None):
        """Compile nothing yet.

        Args:
          model: the decoder.
          config: the run's.
          mesh: from `sharding.make_mesh`.
          optimizer: replaces the configured AdamW.

        Raises:
          ValueError: a micro-batch does not divide over the mesh's data-parallel devices.
        """
        self.model, self.config, self.mesh = model, config, mesh
        trainer = config.trainer
        self.num_updates = trainer.updates_per_rollout
        data_parallel = mesh.shape["data"] * mesh.shape["fsdp"]
        if trainer.micro_batch_size % data_parallel:
            raise ValueError(
                f"trainer.micro_batch_size={trainer.micro_batch_size} is not a multiple of the {data_parallel} "
                "data-parallel devices (mesh.data * mesh.fsdp)"
            )
        self.optimizer = optimizer or make_optimizer(config.optimizer, config.num_updates)
        self.schedule = learning_rate_schedule(config.optimizer, config.num_updates)
        self._loss = policy_loss(config.objective)
        self._value_optimizer = critic.make_optimizer(
            config.optimizer.value_learning_rate, config.optimizer.max_grad_norm
        )

        self.logical_axes = models.logical_axes(model)
        self.abstract_params = models.abstract_params(model)
        self.param_shardings = sharding.tree_shardings(self.logical_axes, self.abstract_params, mesh)
        self.abstract_state = jax.eval_shape(self._init, self.abstract_params)
        replicated = sharding.replicated(mesh)
        self.state_shardings = LearnerState(
            params=self.param_shardings,
            opt_state=optax.tree_map_params(
                self.optimizer,
                lambda _, where: where,
                self.abstract_state.opt_state,
                self.param_shardings,
                transform_non_params=lambda _: replicated,
            ),
            dual=jax.tree.map(lambda _: replicated, self.abstract_state.dual),
            kl_coef=replicated,
            critic=jax.tree.map(lambda _: replicated, self.abstract_state.critic),
            version=replicated,
        )
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        self.update = jax.jit(
            self._update,
            in_shardings=(self.state_shardings, rows),
            out_shardings=(self.state_shardings, replicated),
            donate_argnums=0,
        )
        self._minibatch = jax.jit(self._take_minibatch, out_shardings=rows)
        self._step_multipliers = jax.jit(self._next_multipliers)
        self._score = jax.jit(self._score_rollout, out_shardings=rows)
        self._values = jax.jit(self._value_rollout, out_shardings=rows)
        self._correct = jax.jit(self._with_correction, out_shardings=rows)
        self._sampler_params = jax.jit(self._cast_params, out_shardings=self.param_shardings)

    # State ----------------------------------------------------------------------------------------------

    def _init(self, params):
        objective = self.config.objective
        return LearnerState(
            params=params,
            opt_state=self.optimizer.init(params),
            # Objectives without a penalty have no multiplier: it is reported as 0.
            dual=dual.init(objective.variance_coef if objective.loss == "r2vpo" else 0.0),
            kl_coef=jnp.float32(objective.kl_coef),
            critic=critic.init(self.model.config.hidden_size, self._value_optimizer) if objective.critic else None,
            version=jnp.zeros((), jnp.int32),
        )

    def init_state(self, params) -> LearnerState:
        """A fresh state; every leaf is placed by the mesh's rules.

        Args:
          params: on the host, or jax.Arrays (`models.load_params` with the mesh), which stay on the devices and
            are donated: they are the state's now.
        """

        def place(x, where):
            if isinstance(x, jax.Array):
                return x if x.sharding.is_equivalent_to(where, x.ndim) else jax.device_put(x, where)
            return jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index])

        params = jax.tree.map(place, params, self.param_shardings)
        return jax.jit(self._init, out_shardings=self.state_shardings, donate_argnums=0)(params)

    def sampler_params(self, state: LearnerState) -> dict:
        """A copy of the parameters in the compute dtype, for the sampler or as a frozen reference."""
        return self._sampler_params(state.params)

    def _cast_params(self, params):
        # `+ 0` so that the result is a buffer of its own, never the learner's donated one.
        return jax.tree.map(lambda x: (x + 0).astype(self.model.config.compute_dtype), params)

    # One optimizer update -------------------------------------------------------------------------------

    def _update(self, state: LearnerState, batch: Rollout) -> tuple[LearnerState, TrainStats]:
        normalizer = self._normalizer(batch)
        with sharding.activate(self.mesh):
            traced = self._traced_hyperparameters(state, batch)
            loss_fn = functools.partial(self._micro_batch_loss, state=state, normalizer=normalizer, traced=traced)
            head = None if state.critic is None else (state.critic.kernel, state.critic.bias)
            num_micro = batch.tokens.shape[0] // self.config.trainer.micro_batch_size
            loss, stats, grads = accumulation.value_and_grad(loss_fn, (state.params, head), batch, num_micro)
        stats, (grads, head_grads) = stats.reduce(), grads
        grad_norm = optax.tree.norm((grads, head_grads))
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        new = {"params": optax.apply_updates(state.params, updates), "opt_state": opt_state, "critic": None}
        if head is not None:
            head_updates, head_opt_state = self._value_optimizer.update(head_grads, state.critic.opt_state, head)
            new["critic"] = CriticState(*optax.apply_updates(head, head_updates), head_opt_state)
        # A non-finite update is skipped inside the program; the caller counts and decides.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        old = {name: getattr(state, name) for name in new}
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        one = jnp.float32(1)
        stats = stats.replace(
            sums=stats.sums
            | {
                "loss": (loss, one),
                "grad_norm": (grad_norm, one),
                "update_norm": (optax.tree.norm(updates), one),
                "nonfinite": ((~finite).astype(jnp.float32), one),
            }
        )
        return state.replace(**new, version=state.version + 1), stats

    def _normalizer(self, batch: Rollout):
        """The count of the reduction, over the whole minibatch."""
        if self.config.objective.reduction == "constant_length":
            return jnp.sum(batch.keep, dtype=jnp.float32) * batch.response_size
        return losses.count(batch.learning_mask, self.config.objective.reduction)

    def _traced_hyperparameters(self, state: LearnerState, batch: Rollout) -> dict:
        """Those of the loss that depend on the state or on the whole minibatch."""
        objective = self.config.objective
        if objective.loss == "r2vpo":
            coef = state.dual.variance_coef
            if objective.normalize_variance_coef:
                coef = coef * dual.advantage_scale(batch.advantage, batch.learning_mask)
            return {"variance_coef": coef}
        if objective.loss == "m2po":
            logp = self._score_rollout(state.params, batch)
            arrays = logp, _anchor(batch), batch.advantage, batch.learning_mask
            return {"threshold": losses.m2po_threshold(*arrays, budget=objective.m2_budget)}
        return {}

    def _micro_batch_loss(self, trained, batch: Rollout, *, state: LearnerState, normalizer, traced):
        """(loss, TrainStats) of one micro-batch; losses add up over those of a minibatch."""
        objective, mask = self.config.objective, batch.learning_mask
        scores = self._score_rows(*trained, batch)
        logp, anchor = scores.logp, _anchor(batch)
        reduction = {"reduction": objective.reduction, "normalizer": normalizer}

        def mean_over_tokens(x):
            return jnp.sum(jnp.where(mask, x, 0.0)), jnp.sum(mask, dtype=jnp.float32)

        def objective_of(logp):
            loss, stats = self._loss(
                logp, anchor, batch.advantage, mask, weights=batch.weights, normalizer=normalizer, **traced
            )
            if objective.kl_coef:
                divergence = self._divergence(batch, logp)
                stats["kl"] = mean_over_tokens(divergence)
                if objective.kl_in == "loss":
                    loss = loss + state.kl_coef * losses.reduce(divergence, mask, **reduction)
            return loss, stats

        loss, stats = objective_of(logp)
        # g of each token, whatever the objective: elementwise, so cheap.
        slope = jax.grad(lambda x: objective_of(x)[0])(jax.lax.stop_gradient(logp))
        weight = losses.token_weights(mask, **reduction)
        merged = ratio_stats.compute(
            logp,
            anchor,
            batch.advantage,
            mask,
            coefficient=-slope / jnp.where(weight == 0, 1.0, weight),
            weights=batch.weights,
            age=state.version - batch.version,
        )

        stats["entropy"] = mean_over_tokens(scores.entropy)
        if objective.entropy_coef:
            loss = loss - objective.entropy_coef * losses.reduce(scores.entropy, mask, **reduction)
        if batch.weights is not None:
            stats["weight"] = mean_over_tokens(batch.weights)
            stats["weight_squared"] = mean_over_tokens(batch.weights**2)
        if scores.value is not None:
            value_loss, value_stats = critic.value_loss(
                scores.value, batch.value, batch.value_target, mask, clip=objective.value_clip, **reduction
            )
            loss = loss + objective.value_coef * value_loss
            stats |= value_stats
        return loss, merged.replace(sums=merged.sums | jax.lax.stop_gradient(stats))

    def _divergence(self, batch: Rollout, logp):
        """The configured estimate of a KL divergence at each token, f32 [B, T]."""
        objective = self.config.objective
        if objective.kl_to == "behavior":
            return kl.estimate(_anchor(batch), logp, objective.kl_estimator)
        behavior = batch.behavior_logp if objective.kl_corrected else None
        return kl.estimate(logp, batch.reference_logp, objective.kl_estimator, behavior_logp=behavior)

    def _score_rows(self, params, head, batch: Rollout) -> scoring.Scores:
        return scoring.score(
            self.model,
            params,
            batch.tokens,
            batch.prompt_length,
            batch.response_length,
            batch.temperature,
            prompt_size=batch.prompt_size,
            chunk_size=self.config.trainer.scoring_chunk_size,
            value_head=head,
        )

    def _map_rows(self, function, batch: Rollout):
        """`function` of the rows, f32 [B, T], one micro-batch at a time."""
        num_micro = batch.tokens.shape[0] // self.config.trainer.micro_batch_size
        with sharding.activate(self.mesh):
            outputs = jax.lax.map(function, accumulation.split_rows(batch, num_micro))
        return outputs.swapaxes(0, 1).reshape(batch.behavior_logp.shape)

    def _score_rollout(self, params, batch: Rollout):
        return self._map_rows(lambda rows: self._score_rows(params, None, rows).logp, batch)

    def _value_rollout(self, params, state: CriticState, batch: Rollout):
        return self._map_rows(lambda rows: self._score_rows(params, (state.kernel, state.bias), rows).value, batch)

    def score(self, params, rollout: Rollout) -> jax.Array:
        """Log-probabilities f32 [B, T] of a rollout's responses, by the same code as the update."""
        return self._score(params, rollout)

    def values(self, state: LearnerState, rollout: Rollout) -> jax.Array:
        """The critic's values f32 [B, T] before each response token."""
        return self._values(state.params, state.critic, rollout)

    # One rollout batch ----------------------------------------------------------------------------------

    def _take_minibatch(self, rollout: Rollout, key, number):
        """Minibatch `number` of a shuffle by whole groups."""
        group = self.config.sampler.group_size
        num_groups = rollout.tokens.shape[0] // group
        size = num_groups // self.config.trainer.num_minibatches
        order = jax.random.permutation(key, num_groups)
        chosen = jax.lax.dynamic_slice_in_dim(order, number * size, size)
        rows = (chosen[:, None] * group + jnp.arange(group)).reshape(-1)
        return jax.tree.map(lambda x: x[rows], rollout)

    def _with_correction(self, params, rollout: Rollout) -> Rollout:
        """The rollout with proximal log-probabilities, taken once before the first update, and their weights."""
        objective = self.config.objective
        proximal = self._score_rollout(params, rollout)
        weights = corrections.importance_weights(
            proximal,
            rollout.behavior_logp,
            rollout.response_mask,
            mode=objective.correction,
            scope=objective.correction_scope,
            max_weight=objective.max_weight,
            min_weight=objective.min_weight,
        )
        return rollout.replace(proximal_logp=proximal, weights=weights)

    def _next_multipliers(self, dual_state, kl_coef, all_stats):
        objective = self.config.objective
        first, last = (s.mean("ratio_variance") for s in (all_stats[0], all_stats[-1]))
        # A minibatch that was skipped as non-finite (and counted), or in which nothing counts, measures nothing.
        measured = jnp.isfinite(last) & (all_stats[-1].sums["ratio_variance"][1] > 0)
        # Stale data starts at V > 0 whatever this batch's updates do: that must not wind the multiplier up (ours).
        excess = {"auto": self.config.replay.enabled, "excess": True, "absolute": False}[objective.dual_signal]
        signal = last - first if excess else last
        if objective.adaptive:
            measured = measured & jnp.isfinite(signal)
            stepped = dual.update(
                dual_state,
                signal,
                budget=objective.variance_budget,
                step=objective.dual_step,
                max_coef=objective.max_variance_coef,
                max_step=objective.dual_max_step,
                rule=objective.dual_rule,
            )
            dual_state = jax.tree.map(lambda new, old: jnp.where(measured, new, old), stepped, dual_state)
        if objective.kl_target is not None:
            stepped = kl.adapt_coef(kl_coef, all_stats[-1].mean("kl"), target=objective.kl_target)
            kl_coef = jnp.where(measured, stepped, kl_coef)
        merged = jax.tree.map(lambda *x: jnp.stack(x), *all_stats)
        return (
            dual_state,
            kl_coef,
            merged.reduce(),
            {"first": first, "last": last, "signal": signal, "nonfinite": merged.sums["nonfinite"][0]},
        )

    def train_on_rollout(self, state: LearnerState, rollout: Rollout, key):
        """N minibatch updates, then one step of the multipliers.

        Args:
          state: donated; use the returned one.
          rollout: device arrays (`sharding.put_batch`) with advantages; reference_logp with a KL to the
            reference; value and value_target with a critic.
          key: decides the shuffle.

        Returns:
          (state, merged TrainStats, {"first", "last": ratio variance of the first and last minibatch before their
          updates, "signal": what the multiplier was given, "nonfinite": f32 [N], 1 where an update was skipped}).
        """
        if self.config.objective.correction != "none":
            rollout = self._correct(state.params, rollout)
        all_stats = []
        for number in range(self.num_updates):
            epoch, index = divmod(number, self.config.trainer.num_minibatches)
            minibatch = self._minibatch(rollout, jax.random.fold_in(key, epoch), index)
            state, stats = self.update(state, minibatch)
            all_stats.append(stats)
        dual_state, kl_coef, merged, variance = self._step_multipliers(state.dual, state.kl_coef, all_stats)
        return state.replace(dual=dual_state, kl_coef=kl_coef), merged, variance

    def minibatch(self, rollout: Rollout, key, number: int) -> Rollout:
        """The minibatch that `train_on_rollout` used for update `number`, to save an offending one."""
        epoch, index = divmod(number, self.config.trainer.num_minibatches)
        return self._minibatch(rollout, jax.random.fold_in(key, epoch), index)


def _anchor(batch: Rollout):
    """The log-probabilities that the ratio is against: proximal ones if the data is corrected, else behavior."""
    return batch.behavior_logp if batch.proximal_logp is None else batch.proximal_logp
