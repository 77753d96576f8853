"""What is in force in an evaluation: defaults, under what the evaluated run was trained with, under flags."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from r2vpo_jax.config import Config, leaves
from r2vpo_jax.config.evaluation import NOT_IDENTITY, EvaluationConfig, kind_of, spec_of
from r2vpo_jax.config.fields import build
from r2vpo_jax.config.presets import merged, without_none
from r2vpo_jax.config.run import HOW_TO_COMPUTE, ModelConfig
from r2vpo_jax.errors import usage_errors
from r2vpo_jax.evaluation import model_source
from r2vpo_jax.models.base import open_base_model
from r2vpo_jax.run import directory

_LENGTH = 1024  # most tokens of prompts and of responses, where neither run nor flag says anything


def resolve(
    *,
    model: str | None = None,
    checkpoint: str | None = None,
    tasks: str | None = None,
    sections: Mapping[str, Any] | None = None,
    **settings,
) -> EvaluationConfig:
    """The configuration that flags mean: every number in force.

    Args:
      model: a Hugging Face directory, a run directory, or the name of a shipped model; None: the arithmetic one.
      checkpoint: of a run directory, an iteration, "last" or "best".
      tasks: names of benchmarks with commas between them; None: the run's own task.
      sections: nested values of the sections model, mesh, evaluation, sampler and task; None is as good as absent.
      settings: other fields of `EvaluationConfig`.

    Raises:
      UsageError: what is unknown, out of range, not there, or does not go together.
    """
    with usage_errors(), directory.resolving(model):
        source = model_source.find(model, checkpoint)
        own = tasks is None and source.run is not None
        specs = [spec_of(source.run.task)] if own else [spec.strip() for spec in (tasks or "").split(",")]
        given = without_none(sections or {})
        has_data = any(kind_of(spec) == "text" for spec in specs)
        shared = _values_of(source.run, own_task=own) if source.run else {}
        if has_data and "task" not in shared:
            shared = merged(shared, {"task": _values_for(source, given.get("task", {}))})
        if given.get("task", {}).get("prompt", {}).get("template") == "plain" and "task" in shared:
            shared["task"]["prompt"] |= {"system": None, "thinking": None}  # of the chat template alone
        values = merged(merged(shared, given), {"model": {"path": source.name}})
        return build(EvaluationConfig, {"tasks": specs, "checkpoint": checkpoint, **settings, **values})


def differences(config: EvaluationConfig, run: Config) -> list[str]:
    """What the run was trained with and is evaluated without: "task.prompt.bos True there, False here", …"""
    own = config.tasks == (spec_of(run.task),)
    here = dict(leaves(dataclasses.asdict(config)))
    return [
        f"{path} {there} there, {here[path]} here"
        for path, there in leaves(_values_of(run, own_task=own))
        if path not in NOT_IDENTITY
        and here[path] != there
        and (config.has_data or not path.startswith(("task.", "sampler.")))
    ]


def _values_of(run: Config, *, own_task: bool) -> dict[str, Any]:
    """What an evaluation takes from a run: how it is computed, sampled, asked and judged."""
    values = {
        "model": {name: getattr(run.model, name) for name in HOW_TO_COMPUTE},
        "evaluation": dataclasses.asdict(run.evaluation),
    }
    if run.task.name == "text":
        task, text = run.task, run.task.text
        values["sampler"] = {"stop": run.sampler.stop}
        values["task"] = {
            "text": {"data_dir": text.data_dir, "max_response_length": text.max_response_length},
            "prompt": dataclasses.asdict(task.prompt),
            "verifier": dataclasses.asdict(task.verifier),
        }
        if own_task:
            values["task"]["reward"] = dataclasses.asdict(task.reward)
    return values


def _values_for(source: model_source.ModelSource, given: Mapping[str, Any]) -> dict[str, Any]:
    """How data sets are put to a model of which no run says it: by its chat template, within its positions."""
    base = open_base_model(ModelConfig(path=str(source.directory)), weights=False)
    room = base.model.config.max_position_embeddings
    response = given.get("text", {}).get("max_response_length")
    prompt = given.get("prompt", {}).get("max_length") or max(min(_LENGTH, 3 * room // 4, room - (response or 0)), 1)
    return {
        "text": {"max_response_length": response or max(min(_LENGTH, room - prompt), 1)},
        "prompt": {"template": "chat" if base.tokenizer.chat_template else "plain", "max_length": prompt},
    }
