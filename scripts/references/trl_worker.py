"""Evaluate TRL's losses and advantages on given arrays; compare_references.py runs it in TRL's environment.

    python trl_worker.py ARRAYS.npz CASES.json RESULTS.npz

TRL's trainers score tokens with a model before anything else. Their methods are called on a stand-in for the
trainer, which returns the given log-probabilities instead and otherwise holds only the settings they read.
"""

import collections
import importlib.metadata
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer

TRAINERS = {trainer.__name__: trainer for trainer in (GRPOTrainer, RLOOTrainer, GMPOTrainer)}
ABSENT = "off_policy_mask_threshold environment_factories environments tools pad_to_multiple_of reward_clip_range"
OFF = "use_vllm aux_loss_enabled _entropy_bonus_enabled mask_truncated_completions normalize_advantages"


def stand_in(logp, settings):
    """What the methods read of a trainer: one process, one micro-batch an update, optional terms switched off."""
    args = dict(delta=None, use_bias_correction_kl=False, steps_per_generation=1, gradient_accumulation_steps=1)
    args |= dict(gradient_checkpointing_kwargs=None, per_device_train_batch_size=len(logp), **settings.get("args", {}))
    defaults = dict(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, torch.zeros_like(logp), None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _logs=collections.defaultdict(list),
        _pending_extra_logs={},
        _pending_metrics={},
        _tokenizer=SimpleNamespace(pad_token_id=0),
        accelerator=SimpleNamespace(
            num_processes=1, process_index=0, device="cpu", gather=lambda v: v, reduce=lambda v, reduction: v
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        max_completion_length=logp.shape[1],
        loss_type="grpo",
        importance_sampling_level="token",
        beta=0.0,
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        num_iterations=1,
        vllm_importance_sampling_correction=True,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        reward_func_names=[],
        reward_weights=torch.ones(1),
        reward_funcs=[None],
    )
    defaults |= dict.fromkeys(ABSENT.split()) | dict.fromkeys(OFF.split(), False)
    return SimpleNamespace(**{**defaults, **settings, "args": SimpleNamespace(**args)})


def loss(x, trainer, weights=None, mask="mask", **settings):
    """Value and gradient by `logp` of a trainer's loss; `weights` names the correction of the sampler's mismatch."""
    logp = x["logp"].clone().requires_grad_()
    inputs = {name: torch.ones_like(x[mask]) for name in ("prompt_ids", "prompt_mask", "completion_ids")}
    inputs |= {"completion_mask": x[mask], "num_items_in_batch": x[mask].sum(), "advantages": x["advantages"]}
    inputs |= {"old_per_token_logps": x["old_logp"], "ref_per_token_logps": x["ref_logp"]}
    inputs |= {"sampling_per_token_logps": x["sampler_logp"]}
    if weights:
        settings["use_vllm"], inputs["importance_sampling_ratio"] = True, x[weights]
    value = TRAINERS[trainer]._compute_loss(stand_in(logp, settings), None, inputs)
    value.backward()
    return {"value": value.detach(), "gradient": logp.grad}


def score(x, trainer, rewards, output, part_weights=None, **settings):
    """What a trainer makes of rewards and the sampler's log-probabilities: entry `output` of its result.

    Rewards are [B], or [B, F] by function with the name of their weights [F].
    """
    rows, length = x["mask"].shape
    # All responses are of full length, so that the given mask can be the mask of tool tokens.
    prompts, responses, texts = [[1]] * rows, [[1] * length] * rows, [""] * rows
    generated = (prompts, responses, x["mask"].tolist(), texts, x["sampler_logp"].tolist(), {}, None, None)
    settings["_generate"] = lambda _: (prompts, responses, texts) if trainer == "RLOOTrainer" else generated
    given = x[rewards] if x[rewards].ndim == 2 else x[rewards][:, None]
    settings["_calculate_rewards"] = lambda *args: given.clone()
    if part_weights:
        settings |= {"reward_weights": x[part_weights], "reward_funcs": [None] * given.shape[1]}
    stand = stand_in(x["old_logp"], settings)
    result = TRAINERS[trainer]._generate_and_score_completions(stand, [{"prompt": ""}] * rows)[output]
    return {"array": result.expand(rows, length) if result.ndim == 2 else result}


def main(arrays, cases, results):
    with np.load(arrays) as stored:
        x = {name: torch.from_numpy(stored[name]) for name in stored.files}
    out = {"versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "torch"))}
    with open(cases, encoding="utf-8") as file:
        for i, settings in enumerate(json.load(file)):
            result = {"loss": loss, "score": score}[settings.pop("call")](x, **settings)
            out |= {f"{i}_{name}": value.numpy() for name, value in result.items()}
    np.savez(results, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
