"""Rollout, scoring, update and a whole iteration of a workload, with this project's public functions.

Of the package only names are used that it has had since 4d68057, so that a worker can run the same programs with an
older revision (references/revision_worker.py); what has moved comes in as an argument.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from references.serving import Steps

from benchmarks import workloads
from benchmarks.workloads import GROUP, Workload
from r2vpo_jax import config as config_lib
from r2vpo_jax import models, sampler, sharding
from r2vpo_jax.rollout import Rollout

NAMES = ("rollout", "scoring", "update", "iteration")
_QUIET = 1e-4  # what layers write to the residual stream where weights draw the lengths


class Programs(Steps):
    """The programs of one workload, each prepared, measured and released on request."""

    def __init__(self, workload: Workload, learner_class, settings=()):
        """Build the configuration; nothing is computed yet.

        Args:
          workload: what to run.
          learner_class: this revision's `Learner`.
          settings: pairs (path of a configuration field, value) on top of the workload's.

        Raises:
          ValueError: a setting that the configuration refuses.
        """
        self.workload, self._learner_class = workload, learner_class
        self.config = _configuration(workload, dict(settings))
        self.model = models.Decoder(_decoder_config(workload, self.config.model))
        self.mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])  # the ceilings are those of one device

    def peak_bytes(self):
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use")

    def describe(self) -> dict:
        """The fields of the configuration that decide how fast it is."""
        trainer, model = self.config.trainer, self.config.model
        skipped = ("path", "export_dtype", "param_dtype", "lora")
        said = {f"model.{f.name}": getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skipped}
        if getattr(model, "lora", None) and model.lora.rank:  # not every revision has adapters
            said |= {f"model.lora.{name}": value for name, value in vars(model.lora).items()}
        chosen = ("micro_batch_size", "scoring_chunk_size", "packing")  # not every revision has all of them
        said |= {f"trainer.{name}": getattr(trainer, name) for name in chosen if hasattr(trainer, name)}
        return said | {f"sampler.{name}": value for name, value in self._segments().items()}

    def save(self, path) -> None:
        """Write the rollout's weights as a Hugging Face directory, for samplers of other projects."""
        models.save_pretrained(path, self.model, self._params(), eos_ids=self.workload.eos_ids)

    # Programs -----------------------------------------------------------------------------------------------------

    def _rollout(self):
        params = self._params(self.model.config.compute_dtype)

        def step():
            rollout = self._generate(params)
            return {"tokens": int(rollout.response_length.sum()), "lengths": rollout.response_length.tolist()}

        return step, {}

    def _scoring(self):
        learner, params, batch = self._learner(), self._params(self.model.config.compute_dtype), self._batch()
        score, facts = _compiled(learner.score, params, batch)

        def step():
            jax.block_until_ready(score(params, batch))

        return step, facts | workloads.update_facts(self.workload)

    def _update(self):
        learner, batch = self._learner(), self._batch()
        state = learner.init_state(self._params())
        update, facts = _compiled(learner.update, state, batch)

        def step():
            nonlocal state
            state, stats = update(state, batch)
            jax.block_until_ready((state, stats))

        return step, facts | workloads.update_facts(self.workload)

    def _iteration(self):
        """A rollout, rewards by a rule that costs nothing, scores of the whole batch, and the updates."""
        learner = self._learner()
        state = learner.init_state(self._params())

        def step():
            nonlocal state
            params = learner.sampler_params(state)
            rollout = self._generate(params)
            responses = np.where(rollout.response_mask, rollout.response_tokens, 0)
            rewards = (responses.sum(axis=1) % 2).astype(np.float32)
            advantages = workloads.group_advantages(rewards)
            batch = sharding.put_batch(rollout.replace(reward=rewards, advantage=advantages), self.mesh)
            scores = learner.score(params, batch)
            state, *_ = learner.train_on_rollout(state, batch, jax.random.key(1))
            jax.block_until_ready((state, scores))
            return {"tokens": int(rollout.response_length.sum()), "lengths": rollout.response_length.tolist()}

        return step, {}

    # Parts --------------------------------------------------------------------------------------------------------

    def _learner(self):
        return self._learner_class(self.model, self.config, self.mesh)

    def _generate(self, params):
        """The workload's rollout, on the host."""
        work, tokens = self.workload, workloads.prompts(self.workload)
        settings = sampler.Sampling(
            group_size=work.group_size, max_response_length=work.response_size, eos_ids=work.eos_ids
        )
        return sampler.generate(
            self.model,
            params,
            tokens,
            np.full(work.num_prompts, work.prompt_size),
            jax.random.key(0),
            settings,
            mesh=self.mesh,
            problem_ids=np.arange(work.num_prompts),
            batch_size=work.prompts_at_once,
            **self._segments(),
        )

    def _segments(self) -> dict:
        """How long a segment of decoding is, if this revision has segments."""
        name = "segment_length"
        return {name: getattr(self.config.sampler, name)} if hasattr(self.config.sampler, name) else {}

    def _params(self, dtype=None):
        """Random weights, or those that draw lengths; of the masters' dtype or another one."""

        @jax.jit
        def make(key):
            params = models.init_params(self.model, key)
            if self.workload.long_tail:
                params = jax.tree_util.tree_map_with_path(_quieter, params)
            return jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)

        params = make(jax.random.key(0))
        if self.workload.long_tail:
            for name, array in zip(("embed", "lm_head"), workloads.length_weights(self.workload), strict=True):
                params[name] = jnp.asarray(array, params[name].dtype)
        return params

    def _batch(self):
        """A batch for scoring and an update, on the devices."""
        arrays, rows = workloads.update_arrays(self.workload), self.workload.update_rows
        numbers = np.arange(rows, dtype=np.int32)
        rollout = Rollout(
            **arrays,
            prompt_length=np.full(rows, self.workload.prompt_size, np.int32),
            truncated=np.zeros(rows, bool),
            temperature=np.ones(rows, np.float32),
            reward=np.zeros(rows, np.float32),
            outcome=np.zeros(rows, np.int32),
            keep=np.ones(rows, bool),
            group_id=numbers // GROUP,
            rollout_id=numbers,
            version=np.zeros(rows, np.int32),
        )
        return sharding.put_batch(rollout, self.mesh)


def _quieter(path, x):
    return x * _QUIET if any(part.key in ("o_proj", "down_proj") for part in path) else x


def _configuration(workload: Workload, settings: dict):
    sections = {
        "trainer": {
            "num_iterations": 10_000,
            "prompts_per_rollout": workload.rollout_rows // GROUP,
            "num_minibatches": workload.rollout_rows // workload.update_rows,
            "micro_batch_size": workload.micro_batch_size,
            "allow_single_update": True,
        },
        "sampler": {"group_size": GROUP, "batch_size": workload.prompts_at_once * max(workload.group_size, GROUP)},
        "optimizer": {"learning_rate": 1e-6},  # lengths that the weights draw stay what they are
        "model": {name: getattr(workload, name) for name in ("compute_dtype", "scan_layers", "remat")},
    }
    values = config_lib.make(**sections)
    for path, value in settings.items():
        *parents, name = path.split(".")
        node = functools.reduce(lambda node, parent: node.get(parent, {}), parents, values)
        if name not in node:
            raise ValueError(f"the configuration has no field {path}")
        node[name] = value
    return config_lib.from_flags(values)


def _decoder_config(workload: Workload, compute) -> models.DecoderConfig:
    """The workload's shape, computed as the section `model` of the configuration says."""
    shape = {f.name: getattr(workload, f.name) for f in dataclasses.fields(workload)}
    fields = {f.name for f in dataclasses.fields(models.DecoderConfig)}
    how = {f.name: getattr(compute, f.name) for f in dataclasses.fields(compute)}
    return models.DecoderConfig(**{name: value for name, value in (shape | how).items() if name in fields})


def _compiled(function, *args):
    """(function, facts): compiled ahead where it can be, with what the compiler says of time and memory."""
    if not hasattr(function, "lower"):
        return function, {}
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    facts = {"compile_seconds": time.perf_counter() - start}
    if (memory := compiled.memory_analysis()) is not None:
        parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
        facts["program_bytes"] = sum(parts) - memory.alias_size_in_bytes
    # What stands before a jitted function, as that of a model with adapters, is called as before.
    return (compiled if isinstance(function, jax.stages.Wrapped) else function), facts
