"""The learner: one jitted, sharded optimizer update, and one dual step a rollout batch.

`update` is the optimizer step only. `train_on_rollout` runs the N minibatch updates of a rollout batch and
then steps the multiplier once, on the ratio variance of the *last* minibatch before its own update: the
first minibatch has r = 1 by construction, and stepping on it would bias the multiplier low.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from r2vpo_jax import accumulation, dual, kl, losses, models, ratio_stats, scoring, sharding
from r2vpo_jax.config import Config, ObjectiveConfig, OptimizerConfig
from r2vpo_jax.ratio_stats import Stats
from r2vpo_jax.rollout import Rollout


@struct.dataclass
class LearnerState:
    """Everything that training changes."""

    params: dict
    opt_state: optax.OptState
    dual: dual.DualState
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
    """The configured objective as (logp, behavior_logp, advantages, mask, dual, normalizer) -> (loss, stats)."""
    objective = losses.get(config.loss)
    hyper = {"reduction": config.reduction}
    if config.loss == "ppo_clip":
        hyper |= {"clip_low": config.clip_low, "clip_high": config.clip_high, "dual_clip": config.dual_clip}

    def loss(logp, behavior_logp, advantages, mask, dual_state, normalizer):
        extra = {"variance_coef": dual_state.variance_coef} if config.loss == "r2vpo" else {}
        return objective(logp, behavior_logp, advantages, mask, normalizer=normalizer, **hyper, **extra)

    return loss


class Learner:
    """The jitted functions of one run. Holds no state: `LearnerState` goes in and comes out (donated).

    Attributes:
      update: (state, minibatch) -> (state, Stats). The optimizer step; the state is donated.
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
        self.optimizer = optimizer or make_optimizer(config.optimizer, trainer.num_iterations * self.num_updates)
        self.schedule = learning_rate_schedule(config.optimizer, trainer.num_iterations * self.num_updates)
        self._loss = policy_loss(config.objective)

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
        self._dual_step = jax.jit(self._step_dual, donate_argnums=0)
        self._score = jax.jit(self._score_rollout, out_shardings=rows)
        self._sampler_params = jax.jit(self._cast_params, out_shardings=self.param_shardings)

    # State ----------------------------------------------------------------------------------------------

    def _init(self, params):
        objective = self.config.objective
        return LearnerState(
            params=params,
            opt_state=self.optimizer.init(params),
            # Objectives without a penalty have no multiplier: it is reported as 0.
            dual=dual.init(objective.variance_coef if objective.loss == "r2vpo" else 0.0),
            version=jnp.zeros((), jnp.int32),
        )

    def init_state(self, params) -> LearnerState:
        """A fresh state from host parameters; every leaf is placed by the mesh's rules."""
        params = jax.tree.map(
            lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda index: np.asarray(x)[index]),
            params,
            self.param_shardings,
        )
        return jax.jit(self._init, out_shardings=self.state_shardings, donate_argnums=0)(params)

    def sampler_params(self, state: LearnerState) -> dict:
        """A copy of the parameters in the compute dtype, for the sampler or as a frozen reference."""
        return self._sampler_params(state.params)

    def _cast_params(self, params):
        # `+ 0` so that the result is a buffer of its own, never the learner's donated one.
        return jax.tree.map(lambda x: (x + 0).astype(self.model.config.compute_dtype), params)

    # One optimizer update -------------------------------------------------------------------------------

    def _update(self, state: LearnerState, batch: Rollout) -> tuple[LearnerState, Stats]:
        objective, trainer = self.config.objective, self.config.trainer
        num_micro = batch.tokens.shape[0] // trainer.micro_batch_size
        if objective.reduction == "constant_length":
            normalizer = jnp.float32(batch.behavior_logp.size)
        else:
            normalizer = losses.count(batch.response_mask, objective.reduction)

        def loss_fn(params, batch: Rollout):
            mask = batch.response_mask
            logp, entropy = self._score_rows(params, batch)
            with_multiplier = functools.partial(self._loss, dual_state=state.dual, normalizer=normalizer)
            loss, stats = with_multiplier(logp, batch.behavior_logp, batch.advantage, mask)
            # The gradient coefficient of each token, whatever the objective: elementwise, so cheap.
            coefficient = -jax.grad(lambda x: with_multiplier(x, batch.behavior_logp, batch.advantage, mask)[0])(
                jax.lax.stop_gradient(logp)
            )
            merged = ratio_stats.compute(logp, batch.behavior_logp, batch.advantage, mask, coefficient=coefficient)
            tokens = jnp.sum(mask, dtype=jnp.float32)
            stats["entropy"] = (jnp.sum(jnp.where(mask, entropy, 0.0)), tokens)
            if objective.kl_coef:
                values = jnp.where(mask, kl.estimate(logp, batch.reference_logp, objective.kl_estimator), 0.0)
                loss = loss + objective.kl_coef * jnp.sum(values) / losses.count(full_mask, "token_mean")
                stats["reference_kl"] = (jnp.sum(values), tokens)
            return loss, merged.replace(sums=merged.sums | jax.lax.stop_gradient(stats))

        full_mask = batch.response_mask
        with sharding.activate(self.mesh):
            loss, stats, grads = accumulation.value_and_grad(loss_fn, state.params, batch, num_micro)
        stats = stats.reduce()
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A non-finite update is skipped inside the program; the caller counts and decides.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
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
        return state.replace(params=params, opt_state=opt_state, version=state.version + 1), stats

    def _score_rows(self, params, batch: Rollout):
        return scoring.score(
            self.model,
            params,
            batch.tokens,
            batch.prompt_length,
            batch.response_length,
            batch.temperature,
            prompt_size=batch.prompt_size,
            chunk_size=self.config.trainer.scoring_chunk_size,
        )

    def _score_rollout(self, params, batch: Rollout):
        """Log-probabilities f32 [B, T], one micro-batch at a time."""
        num_micro = batch.tokens.shape[0] // self.config.trainer.micro_batch_size
        with sharding.activate(self.mesh):
            micro_batches = accumulation.split_rows(batch, num_micro)
            logps = jax.lax.map(lambda b: self._score_rows(params, b)[0], micro_batches)
        return logps.swapaxes(0, 1).reshape(batch.behavior_logp.shape)

    def score(self, params, rollout: Rollout) -> jax.Array:
        """Log-probabilities f32 [B, T] of a rollout's responses, by the same code as the update."""
        return self._score(params, rollout)

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

    def _step_dual(self, dual_state, all_stats):
        objective = self.config.objective
        first, last = (s.mean("ratio_variance") for s in (all_stats[0], all_stats[-1]))
        if objective.adaptive:
            stepped = dual.update(
                dual_state,
                last,
                budget=objective.variance_budget,
                step_size=objective.dual_step / objective.variance_budget,
                max_coef=objective.max_variance_coef,
                max_step=objective.dual_max_step,
            )
            # A minibatch that was skipped as non-finite (and counted) must not poison the multiplier.
            dual_state = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(last), new, old), stepped, dual_state)
        merged = jax.tree.map(lambda *x: jnp.stack(x), *all_stats)
        return (
            dual_state,
            merged.reduce(),
            {"first": first, "last": last, "nonfinite": merged.sums["nonfinite"][0]},
        )

    def train_on_rollout(self, state: LearnerState, rollout: Rollout, key):
        """N minibatch updates, then one step of the multiplier.

        Args:
          state: donated; use the returned one.
          rollout: device arrays (`sharding.put_batch`) with advantages; reference_logp when KL is on.
          key: decides the shuffle.

        Returns:
          (state, merged Stats, {"first", "last": ratio variance of the first and last minibatch before their
          updates, "nonfinite": f32 [N], 1 where an update was skipped}).
        """
        all_stats = []
        for number in range(self.num_updates):
            epoch, index = divmod(number, self.config.trainer.num_minibatches)
            minibatch = self._minibatch(rollout, jax.random.fold_in(key, epoch), index)
            state, stats = self.update(state, minibatch)
            all_stats.append(stats)
        dual_state, merged, variance = self._dual_step(state.dual, all_stats)
        return state.replace(dual=dual_state), merged, variance

    def minibatch(self, rollout: Rollout, key, number: int) -> Rollout:
        """The minibatch that `train_on_rollout` used for update `number`, to save an offending one."""
        epoch, index = divmod(number, self.config.trainer.num_minibatches)
        return self._minibatch(rollout, jax.random.fold_in(key, epoch), index)
