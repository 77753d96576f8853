"""The published runs on mathematical reasoning, and the methods that they are compared with, for any model of a table.

Words after the colon, separated by commas, choose the model, the method and the size. Each may be left out:

    --config=experiments/configs/math_reasoning.py                          DeepSeek-R1-Distill-Qwen-1.5B, R2VPO-ON
    --config=experiments/configs/math_reasoning.py:qwen3_8b                 another model, see MODELS
    --config=experiments/configs/math_reasoning.py:qwen3_8b,r2vpo_off       another method, see METHODS
    --config=experiments/configs/math_reasoning.py:qwen3_8b,grpo,smoke      two small iterations that take a minute on a CPU

The abstracts of the R2VPO papers (arXiv 2601.03320, 2605.26784) name models and tasks and no hyper-parameters. Each
number below is therefore marked: [public] a public GRPO run of openPangu-7B and Qwen3-8B on DAPO-Math-17k, 8 GPUs;
[card] the model's card; [dapo] arXiv 2503.14476; [ours] chosen by us, not run at this size.
"""

import dataclasses
from typing import Any

from r2vpo_jax import config


@dataclasses.dataclass(frozen=True)
class Model:
    """What differs between the runs of two models."""

    directory: str  # below models/; --config.model.path says where it really is
    prompt: dict[str, Any] = dataclasses.field(default_factory=dict)  # more fields of task.prompt
    responses_at_once: int = 256  # sampled at one time, all devices together; bounds the memory


# The tokenizer of openPangu is code of its own, which is never run: put a tokenizer.json into the directory
# (docs/run_on_math.md). Its prompts start with BOS, which the chat template does not write.
MODELS = {
    "deepseek_r1_distill_qwen_1_5b": Model("DeepSeek-R1-Distill-Qwen-1.5B"),
    "openpangu_1b": Model("openPangu-Embedded-1B", {"bos": True}),
    "openpangu_7b": Model("openPangu-Embedded-7B", {"bos": True}, responses_at_once=128),
    "qwen3_0_6b": Model("Qwen3-0.6B", {"thinking": True}),
    "qwen3_1_7b": Model("Qwen3-1.7B", {"thinking": True}),
    "qwen3_4b": Model("Qwen3-4B", {"thinking": True}, responses_at_once=128),
    "qwen3_8b": Model("Qwen3-8B", {"thinking": True}, responses_at_once=128),
}
METHODS = {
    # The budget is [ours], a guess that has to be above the rounding of bfloat16, which the run measures first.
    # docs/algorithms/r2vpo.md, "Choosing delta", says how to set it from 20 iterations without a constraint.
    "r2vpo_on": {"objective": {"name": "r2vpo", "dual": {"budget": 0.004}}},
    # [ours] Every batch is trained on four iterations, 16 updates, after it was sampled.
    "r2vpo_off": {"objective": {"name": "r2vpo", "dual": {"budget": 0.004}}, "replay": {"lag": 4}},
    # [public] As that run: token mean, clip 0.2, dual clip 3, no KL.
    "grpo": {
        "objective": {
            "name": "grpo",
            "kl": {"coef": 0.0},
            "loss": {"reduction": "token_mean", "options": {"dual_clip": 3.0}},
        }
    },
    # [dapo] The preset: clip 0.2 / 0.28, dynamic sampling, soft penalty for length. A bound on resampling is [ours].
    "dapo": {"objective": {"name": "dapo", "groups": {"max_resamples": 2}}},
}
SIZES = ("full", "smoke")

# [card] The sentence that DeepSeek-R1-Distill and Qwen3 recommend for mathematics.
QUESTION = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def get_config(choice: str = "deepseek_r1_distill_qwen_1_5b"):
    """The ConfigDict of one run.

    Args:
      choice: a model, a method and a size, or some of them, separated by commas.

    Raises:
      ValueError: a word that is none of them, or two words for one of them.
    """
    model_name, method, size = _choose(choice)
    model = MODELS[model_name]
    run = config.make(
        model={
            "path": f"models/{model.directory}",
            "compute_dtype": "bfloat16",  # [public], with float32 weights and optimizer state
            "scan_layers": True,
            "remat": True,
            "attention_block_size": 512,
        },
        mesh={"data": 1, "fsdp": -1},
        task={
            "name": "text",
            "text": {
                "data_dir": "data",
                "train": "dapo_math_17k?rows=256:",
                "validation": "dapo_math_17k?rows=:256",  # [ours] held out: the benchmarks serve the final score only
                "test": "aime24 + aime25",
                "max_response_length": 8192,  # [public]
            },
            "prompt": {"text": QUESTION, "max_length": 2048} | model.prompt,  # [public]
            "verifier": {"num_workers": 8, "bad_gold": "drop"},
        },
        sampler={"group_size": 16, "temperature": 1.0, "batch_size": model.responses_at_once},  # [public] G, T
        optimizer={  # [public]
            "learning_rate": 1e-6,
            "warmup_updates": 0,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "b2": 0.999,
        },
        evaluation={
            "temperature": 0.8,
            "top_p": 0.7,
            "batch_size": model.responses_at_once,
        },  # [public] temperature, top_p
        objective={"groups": {"verifier_errors": "wrong"}},  # [ours] what cannot be judged was not an answer
        trainer={
            "num_iterations": 500,  # [ours]
            "prompts_per_rollout": 128,  # [public]
            "num_minibatches": 4,  # [public]
            "num_epochs": 1,  # [public]
            "micro_batch_size": 16,  # a multiple of the devices on the data and fsdp axes
            "scoring_chunk_size": 512,
            "eval_every": 10,
            "eval_problems": 256,
            "eval_samples": 1,
            "test_samples": 16,
            "checkpoint_every": 10,
        },
    )
    run.update(METHODS[method])
    if size == "smoke":
        _make_small(run)
    return run


def _choose(choice: str) -> list[str]:
    """The model, the method and the size; the first of each table where no word names one."""
    tables = {"model": MODELS, "method": METHODS, "size": SIZES}
    words = choice.split(",")
    known = [name for table in tables.values() for name in table]
    if unknown := [word for word in words if word not in known]:
        lists = "; ".join(f"{kind}s: {', '.join(table)}" for kind, table in tables.items())
        raise ValueError(
            f"{unknown[0]!r} is unknown: write MODEL,METHOD,SIZE after the colon, or some of them. {lists}"
        )
    chosen = []
    for kind, table in tables.items():
        named = [word for word in words if word in table]
        if len(named) > 1:
            raise ValueError(f"{choice!r} names more than one {kind}: {', '.join(named)}")
        chosen.append(named[0] if named else next(iter(table)))
    return chosen


def _make_small(run) -> None:
    """Two iterations of the same run that a laptop's CPU goes through in a minute; nothing is learned."""
    run.task.update(
        text={"train": "dapo_math_17k?rows=4:", "validation": "dapo_math_17k?rows=:4", "max_response_length": 32},
        prompt={"max_length": 512},
        verifier={"num_workers": 1},
    )
    run.sampler.update(group_size=4, batch_size=16)
    run.trainer.update(
        num_iterations=2 + run.replay.lag,
        prompts_per_rollout=8,
        num_minibatches=2,
        micro_batch_size=16,
        eval_every=2,
        eval_problems=2,
        test_problems=2,
        test_samples=2,
        checkpoint_every=2,
    )
