"""The programs of a workload with tunix; benchmark.py starts it in an environment of its own.

    python tunix_programs.py WORKLOAD.json WEIGHTS

A rollout is its sampler at temperature 1, without the log-probabilities that it can return. An update is the train
step of its RL trainer with the registered GRPO loss, micro-batches accumulated by the trainer.
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import optax
from benchmarks import workloads
from serving import Steps, serve
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.rl import common, function_registry
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig


class Tokens:
    """A tokenizer whose texts are rows of tokens already."""

    def __init__(self, eos, pad):
        self._eos, self._pad = eos, pad

    def encode(self, row):
        return list(row)

    def decode(self, ids):
        return str(len(ids))

    def bos_id(self):
        return None

    def eos_id(self):
        return self._eos

    def pad_id(self):
        return self._pad


class Programs(Steps):
    def __init__(self, workload, weights):
        self.workload, self.weights = workload, weights
        self.pad = workload.vocab_size - 1  # tunix tells padding by the token

    def peak_bytes(self):
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def _rollout(self):
        work = self.workload
        cache = CacheConfig(
            cache_size=work.prompt_size + work.response_size,
            num_layers=work.num_layers,
            num_kv_heads=work.num_kv_heads,
            head_dim=work.head_dim,
        )
        eos = work.eos_ids[0] if work.eos_ids else -1
        seeds = itertools.count()  # not the same draws for every batch
        sampler = Sampler(self.model(work.compute_dtype), Tokens(eos, self.pad), cache)

        def generate(rows):
            out = sampler(
                rows,
                work.response_size,
                max_prompt_length=work.prompt_size,
                temperature=1.0,
                top_p=1.0,
                seed=next(seeds),
            )
            ended = [[*tokens.tolist(), *work.eos_ids] for tokens in out.tokens]  # it cuts off the end of text
            return [row[: work.response_size] for row in ended]

        return lambda: workloads.rollout_facts(work, generate), {}

    def _update(self):
        work, arrays = self.workload, workloads.update_arrays(self.workload)
        columns = jnp.arange(work.response_size)
        mask = columns < arrays["response_length"][:, None]
        tokens = jnp.minimum(arrays["tokens"], self.pad - 1)
        prompts, responses = tokens[:, : work.prompt_size], tokens[:, work.prompt_size :]
        whole = {
            "prompt_ids": prompts,
            "prompt_mask": jnp.ones_like(prompts),
            "completion_ids": jnp.where(mask, responses, self.pad),
            "completion_mask": mask.astype(jnp.int32),
            "advantages": jnp.asarray(arrays["advantage"]),
            "old_per_token_logps": jnp.asarray(arrays["behavior_logp"]),
        }
        size, count = work.micro_batch_size, work.update_rows // work.micro_batch_size
        batches = [
            common.TrainExample(
                ref_per_token_logps=None, **{name: x[i * size : (i + 1) * size] for name, x in whole.items()}
            )
            for i in range(count)
        ]
        settings = SimpleNamespace(
            beta=0.0,
            epsilon=0.2,
            epsilon_high=0.2,
            loss_algo="grpo",
            loss_agg_mode="sequence-mean-token-mean",
            temperature=1.0,
            kl_loss_mode=None,
            kl_clamp_value=None,
            entropy_coef=None,
        )
        policy_loss = function_registry.get_policy_loss_fn("grpo")

        def loss(model, train_example):  # with these names: nnx resolves them to positions
            return policy_loss(model, train_example, algo_config=settings, pad_id=self.pad, eos_id=-1)

        trainer = Trainer(
            self.model("float32"),
            optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0)),
            TrainingConfig(eval_every_n_steps=10**9, gradient_accumulation_steps=count),
            lambda: {},
        )
        trainer.with_loss_fn(loss, has_aux=True).with_gen_model_input_fn(lambda batch: {"train_example": batch})
        train_step, _ = trainer.jit_train_and_eval_step()

        def step():
            for batch in batches:
                out = train_step(batch)
            jax.block_until_ready((out, jax.tree.leaves(trainer.optimizer)))

        return step, workloads.update_facts(work)

    def model(self, param_dtype):
        """The weights in a dtype."""
        work = self.workload
        config = qwen2.ModelConfig(
            num_layers=work.num_layers,
            vocab_size=work.vocab_size,
            embed_dim=work.hidden_size,
            hidden_dim=work.intermediate_size,
            num_heads=work.num_heads,
            head_dim=work.head_dim,
            num_kv_heads=work.num_kv_heads,
            rope_theta=10_000,
            norm_eps=1e-6,
            use_tied_embedding=work.tie_word_embeddings,
            remat_config=qwen2.RematConfig.DECODER if work.remat else qwen2.RematConfig.NONE,
            dtype=jnp.dtype(work.compute_dtype),
            param_dtype=jnp.dtype(param_dtype),
        )
        return qwen2_params.create_model_from_safe_tensors(self.weights, config, dtype=jnp.dtype(param_dtype))


def main(workload, weights):
    jax.config.update("jax_enable_compilation_cache", False)
    fields = json.loads(Path(workload).read_text(encoding="utf-8"))
    serve(Programs(workloads.Workload(**fields), weights))


if __name__ == "__main__":
    main(*sys.argv[1:])
