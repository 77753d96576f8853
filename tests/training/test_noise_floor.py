"""The refusal of a noisy set-up, and the remedy that it names."""

import re

import numpy as np
import pytest

from r2vpo_jax.errors import UsageError
from r2vpo_jax.training import noise_floor
from r2vpo_jax.training.trainer import train
from tests.helpers.rollouts import make

RESIDUAL, SCORES, LOGITS = "float32_residual", "float32_scores", "float32_logits"


def refusal(config, floors):
    """The text of a refusal where each set of switches has a floor; and the sets that were measured."""
    rollout, asked = make(0), []

    def scored(floor):
        return rollout.behavior_logp + np.log1p(np.sqrt(floor)).astype(np.float32), rollout

    def again(changes):
        assert all(changes.values())
        asked.append(tuple(changes))
        return scored(floors[tuple(changes)])

    how = {"say": lambda _: None, "event": lambda *_: None, "again": again}
    with pytest.raises(UsageError) as refused:
        noise_floor.check(*scored(1e-3), config, first=True, **how)
    return str(refused.value), asked


def test_a_refusal_names_the_cheapest_switches_that_would_pass(tiny_config):
    def config(limit=1e-4, **model):
        return tiny_config(model={"compute_dtype": "bfloat16", **model}, trainer={"max_noise_floor": limit})

    floors = {
        (RESIDUAL,): 5e-4, (SCORES,): 2e-4, (RESIDUAL, SCORES): 5e-5, (RESIDUAL, SCORES, LOGITS): 2e-5,
        (LOGITS,): 4e-5, (RESIDUAL, LOGITS): 3e-4,
    }  # fmt: skip
    text, asked = refusal(config(), floors)
    assert asked == [(RESIDUAL,), (SCORES,), (RESIDUAL, SCORES)]
    assert (
        "1.00e-03, above 1e-04: the constraint would act on numerical noise. Measured here: 5.00e-04 with float32_residual, "
        "2.00e-04 with float32_scores, 5.00e-05 with float32_residual and float32_scores. "
        "Use --config.model.float32_residual=True --config.model.float32_scores=True, or a larger objective.dual.budget"
    ) in text

    text, asked = refusal(config(1e-5), floors)
    assert asked[-1] == (RESIDUAL, SCORES, LOGITS)
    assert "No switch is enough (measured here: " in text
    assert "Use model.compute_dtype=float32, or a larger" in text

    assert refusal(config(float32_scores=True), floors | {(RESIDUAL, LOGITS): 9e-5})[1] == [
        (RESIDUAL,),
        (RESIDUAL, LOGITS),
    ]
    every = dict.fromkeys((RESIDUAL, SCORES, LOGITS), True)
    for nothing_to_try in (config(**every), tiny_config(trainer={"max_noise_floor": 1e-4})):
        text, asked = refusal(nothing_to_try, floors)
        assert asked == []
        assert "numerical noise. Use model.compute_dtype=float32, or a larger objective.dual.budget" in text
    text, asked = refusal(config(attention="cudnn"), floors)
    assert asked == [(RESIDUAL,)], "kernels of attention and float32_scores exclude each other"


@pytest.mark.slow  # two samplers and two scorers to compile
def test_a_run_measures_a_switch_before_it_is_refused(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(noise_floor, "_REMEDIES", ((RESIDUAL, SCORES, LOGITS),))
    config = tiny_config(model={"compute_dtype": "bfloat16"}, trainer={"max_noise_floor": 1e-12})
    with pytest.raises(UsageError) as refused:
        train(config, tmp_path / "run")
    found = re.search(r"ratio variance is (\S+), above .*easured here: (\S+) with", str(refused.value))
    assert found, str(refused.value)
    rounded, kept = map(float, found.groups())
    assert kept < rounded
