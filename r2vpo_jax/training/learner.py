"""The learner: the functions of `update`, placed on a mesh and jitted, each once."""

import functools

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from r2vpo_jax import models, sharding
from r2vpo_jax.config import Config
from r2vpo_jax.models import attention, lora
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.sampler import rounded_weights
from r2vpo_jax.training import critic, token_gradients, update
from r2vpo_jax.training.learner_state import LearnerState, Optimizers, frozen_of, with_frozen, without_frozen
from r2vpo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from r2vpo_jax.training.update import RolloutReport, UpdateSettings


def settings_of(config: Config) -> UpdateSettings:
    """What the update has to know of a run's configuration."""
    trainer = config.trainer
    return UpdateSettings(
        objective=config.objective,
        group_size=config.sampler.group_size,
        num_minibatches=trainer.num_minibatches,
        num_epochs=trainer.num_epochs,
        micro_batch_size=trainer.micro_batch_size,
        scoring_chunk_size=trainer.scoring_chunk_size,
        packing=trainer.packing,
        stale=config.replay.enabled or config.stale,
    )


class _Update:
    """The optimizer step beside adapters: what is trained is donated, and the frozen weights are not, so that others may
    hold these too.
    """

    def __init__(self, step, shardings: LearnerState, rows, replicated):
        def of_parts(state: LearnerState, frozen, batch):
            state, stats = step(with_frozen(state, frozen), batch)
            return without_frozen(state), stats

        of_parts.__name__ = step.__name__  # what is said to be compiled
        trained, frozen = without_frozen(shardings), frozen_of(shardings)
        self._jitted = jax.jit(
            of_parts, in_shardings=(trained, frozen, rows), out_shardings=(trained, replicated), donate_argnums=0
        )

    def __call__(self, state: LearnerState, batch: Rollout):
        frozen = frozen_of(state)
        state, stats = self._jitted(without_frozen(state), frozen, batch)
        return with_frozen(state, frozen), stats

    def lower(self, state: LearnerState, batch: Rollout):
        """As of a jitted function, for its figures: what is compiled of it takes the parts of the state."""
        return self._jitted.lower(without_frozen(state), frozen_of(state), batch)


class Learner:
    """The jitted functions of one run. Holds no state: `LearnerState` goes in and comes out (donated).

    Attributes:
      update: (state, minibatch) -> (state, TrainStats). The optimizer step; the state is donated, but for weights that are
        frozen beside adapters.
      score: (params, rollout) -> log-probabilities f32 [B, T] of its responses, by the same code as the update.
      values: (params, critic state, rollout) -> the critic's values f32 [B, T] before each response token.
      minibatch: (rollout, key, number) -> the minibatch of update `number`.
      correct: (params, rollout) -> the rollout with importance weights.
      move_baseline: (params, rollout) -> the rollout with advantages from the baseline of least variance.
      variance: (state, rollout) -> V of the rollout under the state's parameters.
      step_multipliers: (dual state, kl coefficient, statistics of each update) -> (dual state, kl coefficient, report).
      token_gradients: (state, what `watch` gave, numbers of rows in it) -> `TokenGradients` of these.
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
        self.model, self.mesh, self.settings = model, mesh, settings_of(config)
        data_parallel = mesh.shape["data"] * mesh.shape["fsdp"]
        if self.settings.micro_batch_size % data_parallel:
            raise ValueError(
                f"trainer.micro_batch_size={self.settings.micro_batch_size} is not a multiple of the {data_parallel} "
                "data-parallel devices (mesh.data * mesh.fsdp)"
            )
        attention.check(model.config, mesh.devices.flat[0])
        self.schedule = learning_rate_schedule(config.optimizer, config.num_updates)
        self.optimizers = Optimizers(
            policy=optimizer or make_optimizer(config.optimizer, config.num_updates),
            value=critic.make_optimizer(config.optimizer.value_learning_rate, config.optimizer.max_grad_norm),
        )
        run = {"model": model, "settings": self.settings}
        self._init = functools.partial(update.init_state, optimizers=self.optimizers, **run)

        self.logical_axes = models.logical_axes(model)
        self.abstract_params = models.abstract_params(model)
        self.param_shardings = sharding.tree_shardings(self.logical_axes, self.abstract_params, mesh)
        self.abstract_state = jax.eval_shape(self._init, self.abstract_params)
        replicated = sharding.replicated(mesh)
        self.state_shardings = LearnerState(
            params=self.param_shardings,
            opt_state=optax.tree_map_params(
                self.optimizers.policy,
                lambda _, where: where,
                self.abstract_state.opt_state,
                lora.split(self.param_shardings)[0],
                transform_non_params=lambda _: replicated,
            ),
            dual=jax.tree.map(lambda _: replicated, self.abstract_state.dual),
            kl_coef=replicated,
            critic=jax.tree.map(lambda _: replicated, self.abstract_state.critic),
            version=replicated,
        )
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        step = self._on_mesh(update.update, optimizers=self.optimizers, **run)
        if model.config.lora is None:
            self.update = jax.jit(
                step,
                in_shardings=(self.state_shardings, rows),
                out_shardings=(self.state_shardings, replicated),
                donate_argnums=0,
            )
        else:
            self.update = _Update(step, self.state_shardings, rows, replicated)
        self.score = jax.jit(self._on_mesh(update.score, **run), out_shardings=rows)
        self.values = jax.jit(self._on_mesh(update.values, **run), out_shardings=rows)
        self.variance = jax.jit(self._on_mesh(update.variance, **run), out_shardings=replicated)
        self.correct = jax.jit(self._on_mesh(update.correct, **run), out_shardings=rows)
        self.move_baseline = jax.jit(self._on_mesh(update.move_baseline, **run), out_shardings=rows)
        self.minibatch = jax.jit(functools.partial(update.take_minibatch, settings=self.settings), out_shardings=rows)
        self._first_minibatch = jax.jit(
            functools.partial(token_gradients.first_minibatch, settings=self.settings), out_shardings=rows
        )
        self.token_gradients = jax.jit(self._on_mesh(token_gradients.of_rows, **run), out_shardings=replicated)
        self.step_multipliers = jax.jit(functools.partial(update.step_multipliers, settings=self.settings))
        self._sampling_weights = config.sampler.weights
        # Frozen weights that have the compute dtype are not copied: the update leaves them where they are.
        self._shares = model.config.lora is not None and model.config.weights_dtype == model.config.compute_dtype
        cast = lora.split(self.param_shardings)[0] if self._shares else self.param_shardings
        self.cast_params = jax.jit(self.as_compute, out_shardings=cast)
        self._round = jax.jit(self._rounded, out_shardings=self.param_shardings)

    def _on_mesh(self, function, **fixed):
        """`function` traced with the mesh at hand, so that activations are constrained to it."""

        def traced(*args):
            with sharding.activate(self.mesh):
                return function(*args, **fixed)

        traced.__name__ = function.__name__  # what is said to be compiled
        return traced

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
        """The parameters in the compute dtype, for the sampler: what is trained is a copy."""
        if not self._shares:
            return self.cast_params(state.params)
        trained, frozen = lora.split(state.params)
        return lora.join(frozen, self.cast_params(trained))

    def reference_params(self, state: LearnerState) -> dict:
        """The same as a frozen reference. Of a model with adapters that is the model under them."""
        return lora.without_adapters(self.sampler_params(state))

    def rollout_params(self, state: LearnerState) -> dict:
        """The same for rollouts: rounded as `sampler.weights` says."""
        params = self.sampler_params(state)
        return self._round(params) if self._sampling_weights != "compute" else params

    def as_compute(self, params):
        """Parameters in the compute dtype; to be traced."""
        # `+ 0` so that the result is a buffer of its own, never the learner's donated one.
        return jax.tree.map(lambda x: (x + 0).astype(self.model.config.compute_dtype), params)

    def as_sampled(self, params):
        """The same, rounded as `sampler.weights` says."""
        return self._rounded(self.as_compute(params))

    def _rounded(self, params):
        return rounded_weights(params, self._sampling_weights)

    def train_on_rollout(self, state: LearnerState, rollout: Rollout, key) -> tuple[LearnerState, RolloutReport]:
        """N minibatch updates, then one step of the multipliers.

        Args:
          state: donated; use the returned one.
          rollout: device arrays (`sharding.put_batch`) with advantages; reference_logp with a KL to the
            reference; value and value_target with a critic.
          key: decides the shuffle.
        """
        return update.train_on_rollout(state, rollout, key, self)

    def watch(self, params, rollout: Rollout) -> Rollout:
        """The first rows of a batch, ready for `token_gradients` after its updates.

        Args:
          params: before the first update.
          rollout: as for `train_on_rollout`.
        """
        return update.before_updates(params, self._first_minibatch(rollout), self)

    def each_update(self, step, state: LearnerState):
        """(state, list of results) of `step(state, number)` for each update of a rollout batch."""
        results = []
        for number in range(self.settings.num_updates):
            state, result = step(state, number)
            results.append(result)
        return state, results
