"""Adapters as a PEFT directory: adapter_config.json and adapter_model.safetensors, which `peft` and others open."""

import json
import math
import pathlib

import jax
import numpy as np

from r2vpo_jax import sharding
from r2vpo_jax.models import families, lora, tensor_files
from r2vpo_jax.models.decoder import Decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapters(path, model: Decoder, params, *, base: str, revision: str | None = None, write: bool = True) -> None:
    """Write the adapters, in their own dtype and under the names that PEFT gives them.

    Args:
      path: directory, made if needed.
      model: a decoder with adapters.
      params: its parameters: NumPy, or on devices.
      base: where the model under the adapters is, for base_model_name_or_path.
      revision: its commit, where that is a name on the Hub.
      write: False on all processes of a pod but one: they only take part in fetching.

    Raises:
      ValueError: the model has no adapters, or one of them is not finite. Nothing was written then.
    """
    config = model.config.lora
    if config is None:
        raise ValueError("there are no adapters to write: the model was trained without model.lora.rank")
    adapters = sharding.to_host(lora.split(params)[0])
    if not write:
        return
    tensors = dict(_tensors(model.config.family, adapters))
    for name, tensor in tensors.items():
        if not np.all(np.isfinite(np.asarray(tensor, np.float32))):
            raise ValueError(f"{name} is not finite; nothing was exported to {path}")
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / WEIGHTS, "wb") as file:
        headers = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        tensor_files.write_tensors(file, headers, iter(tensors.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "revision": revision,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (path / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _tensors(family: str, adapters):
    """(name, tensor) of each factor of each layer: A as [rank, inputs], B as [outputs, rank]."""
    table = families.FAMILIES[family].tensors
    for path, stacked in jax.tree_util.tree_leaves_with_path(adapters):
        *module, factor = (key.key for key in path)
        theirs = table[*module, "kernel"].name.removesuffix(".weight")
        for layer, x in enumerate(np.asarray(stacked)):
            rank_last = factor == "lora_a"
            rank = x.shape[-1] if rank_last else x.shape[0]
            matrix = x.reshape(math.prod(x.shape) // rank, rank) if rank_last else x.reshape(rank, -1)
            name = f"base_model.model.{theirs.format(layer=layer)}.lora_{'A' if rank_last else 'B'}.weight"
            yield name, np.ascontiguousarray(matrix.T)
