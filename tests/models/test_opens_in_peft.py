"""Adapters that are exported alone open in PEFT, over the same base in Transformers, and say what ours say; so do merged ones."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import models
from r2vpo_jax.config import LoraConfig
from r2vpo_jax.models import lora, peft
from tests.helpers.params import random_params
from tests.helpers.paths import ROOT
from tests.models.goldens import apply, copy

sys.path.append(str(ROOT / "scripts"))  # as scripts/benchmark.py finds them

from references import environments

PINS = {"peft": "0.21.0", "torch": "2.13.0", "transformers": "5.23.0"}
# name -> (golden checkpoint, adapters)
CASES = {
    "qwen2": ("kv1_tied_rope_theta", LoraConfig(rank=4, alpha=8.0)),
    "qwen3": ("qwen3_tied", LoraConfig(rank=3, alpha=1.5, use_rslora=True)),
    "llama": ("llama_llama3_untied", LoraConfig(rank=2, alpha=32.0, target_modules=("q_proj", "o_proj", "down_proj"))),
}
TOKENS = [[3, 14, 15, 9, 2, 6, 5], [1, 7, 1, 8, 2, 8, 1]]

# Writes log-probabilities of the tokens after the first: under the base, under the adapters, merged by PEFT, merged by us.
OPEN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

tokens = torch.tensor(json.loads(sys.argv[1]))

def logps(model):
    with torch.no_grad():
        logits = model.eval()(tokens).logits.log_softmax(-1)
    return logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].tolist()

def base(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

rows = {}
for name in sys.argv[2:]:
    model = base(name + "/base")
    before = logps(model)
    adapted = PeftModel.from_pretrained(model, name + "/peft")
    there = logps(adapted)
    rows[name] = {"base": before, "adapted": there, "merged there": logps(adapted.merge_and_unload()), "merged": logps(base(name + "/merged"))}
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_peft_computes_what_we_compute(tmp_path):
    """Log-probabilities at rtol 1e-4; the adapters move them by far more."""
    try:
        python = environments.interpreter("peft", PINS)
    except environments.EnvironmentFailedError as error:
        pytest.skip(f"pip cannot install peft here: {error}")
    expected = {}
    for name, (case, config) in CASES.items():
        base = copy(case, tmp_path / name / "base")
        model = models.read_model(base, param_dtype=jnp.float32, lora=config)
        adapters = lora.split(random_params(model))[0]
        params = lora.join(models.load_params(base, model), adapters)
        peft.save_adapters(tmp_path / name / "peft", model, params, base=str(base))
        models.save_pretrained(tmp_path / name / "merged", model, params)
        tokens = np.asarray(TOKENS)
        logits = apply(model, params, tokens, np.ones(tokens.shape, bool))
        logp = np.asarray(jax.nn.log_softmax(logits))
        expected[str(tmp_path / name)] = np.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    command = [python, "-c", OPEN, json.dumps(TOKENS), *expected]
    environment = environments.clean_environment()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert not result.returncode, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for name, logp in expected.items():
        for which in ("adapted", "merged there", "merged"):
            np.testing.assert_allclose(found[name][which], logp, rtol=1e-4, err_msg=f"{name}: {which}")
        assert np.abs(np.asarray(found[name]["base"]) - logp).max() > 0.1, name
