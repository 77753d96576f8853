"""What is exported, and what ships, opens in Transformers 4 and 5, each in an environment of its own, and reads alike."""

import dataclasses
import json
import subprocess
import sys
import venv

import numpy as np
import pytest

from r2vpo_jax import models
from r2vpo_jax.models.tokenizer import load_tokenizer
from tests.helpers.paths import ROOT, TINY_BASE
from tests.helpers.tokenizers import byte_tokenizer
from tests.models.goldens import CASES, copy

SHIPPED = sorted((ROOT / "r2vpo_jax" / "assets" / "models").iterdir())
TRANSFORMERS_4 = ("transformers==4.57.6", "jinja2")
TEXTS = ["4785", "Let $x = 1$.", "<s>a</s>"]
MESSAGES = [{"role": "user", "content": "1+1?"}]
GENERATION = {"eos_token_id": [2, 257], "do_sample": True, "temperature": 0.6, "top_p": 0.95}

# Prints, for each directory, what a server takes from it.
OPEN = """
import json, sys
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

texts, messages = json.loads(sys.argv[1])
for path in sys.argv[2:]:
    config, generation = AutoConfig.from_pretrained(path), GenerationConfig.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with safe_open(path + "/model.safetensors", "np") as file:
        names = list(file.keys())
    chat = None
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    print(json.dumps({
        "tokens": tokenizer(texts, add_special_tokens=False)["input_ids"],
        "special": sorted(str(token) for token in tokenizer.all_special_tokens),
        "eos": tokenizer.eos_token, "pad": tokenizer.pad_token, "size": len(tokenizer), "chat": chat,
        "model": [config.model_type, config.architectures, config.vocab_size, config.num_hidden_layers, theta],
        "tied": config.tie_word_embeddings, "dtype": str(config.dtype).removeprefix("torch."),
        "ids": [config.eos_token_id, generation.eos_token_id, generation.pad_token_id],
        "sampling": [generation.do_sample, generation.temperature, generation.top_p],
        "tensors": len(names),
    }))
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory):
    """The interpreter of a new environment that has Transformers 4 and nothing of ours."""
    path = tmp_path_factory.mktemp("transformers_4")
    venv.create(path, with_pip=True)
    python = path / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--retries=0", "--timeout=30", *TRANSFORMERS_4]
    result = subprocess.run(install, capture_output=True, text=True, timeout=900)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr[-200:]]
        pytest.skip(f"pip cannot install {' and '.join(TRANSFORMERS_4)} here: {errors[0]}")
    return python


def export(base, path):
    """As at the end of a run."""
    model, params = models.from_pretrained(base)
    tokenizer, _ = load_tokenizer(base)
    models.save_pretrained(path, model, params, tokenizer, base=base, eos_ids=(2, tokenizer.eos_token_id))
    return path


def write_base(case, path, **settings):
    """A golden checkpoint of 258 tokens, with a tokenizer whose tokenizer_config.json has these fields."""
    copy(case, path)
    model, params = models.from_pretrained(path)
    tokenizer = byte_tokenizer()
    for name in ("embed", "lm_head"):
        if name in params:
            axis = 0 if name == "embed" else 1
            params[name] = np.resize(params[name], [258 if i == axis else n for i, n in enumerate(params[name].shape)])
    config = dataclasses.replace(model.config, vocab_size=258)
    models.save_pretrained(path, models.Decoder(config), params, tokenizer)
    (path / "generation_config.json").write_text(json.dumps(GENERATION))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """name -> directory: what ships, exports of it, and exports of bases as others have written them."""
    root = tmp_path_factory.mktemp("directories")
    found = {path.name: path for path in (*SHIPPED, TINY_BASE)}
    for name in ("word_problems_base", "arithmetic_base"):
        found[f"{name}_exported"] = export(found[name], root / name)
    bases = {
        "qwen_of_version_4": ("kv1_tied_rope_theta", "Qwen2Tokenizer", {"additional_special_tokens": ["<s>"]}),
        "qwen_of_version_5": ("kv1_tied_rope_theta", "Qwen2Tokenizer", {"extra_special_tokens": ["<s>"]}),
        "any_of_version_5": ("qwen3_tied", "TokenizersBackend", {"extra_special_tokens": ["<s>"], "is_local": True}),
        "llama_of_version_5": ("llama_llama3_untied", "TokenizersBackend", {"backend": "tokenizers"}),
        "mistral_of_version_5": ("mistral_untied", "TokenizersBackend", {}),
        "pangu_with_code": ("pangu_untied", "Mine", {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}),
    }
    assert {case for case, *_ in bases.values()} <= set(CASES)
    for name, (case, tokenizer_class, settings) in bases.items():
        base = write_base(case, root / f"{name}_base", tokenizer_class=tokenizer_class, **settings)
        found[name] = export(base, root / name)
    return found


def opened(python, directories):
    """name -> what `OPEN` says of the directory in that interpreter."""
    command = [python, "-c", OPEN, json.dumps([TEXTS, MESSAGES]), *map(str, directories.values())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=directories["tiny_base"])
    assert not result.returncode, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return dict(zip(directories, rows, strict=True))


def check(found, directories):
    """That it is what is meant."""
    for name, row in found.items():
        tokenizer, _ = load_tokenizer(directories[name])
        config = models.read_config(directories[name])
        # The classes differ in what they do with characters that a tokenizer does not know: of the tiny ones, digits.
        known = TEXTS if len(tokenizer) > 32 else TEXTS[:1]
        assert row["tokens"][: len(known)] == tokenizer(known, add_special_tokens=False)["input_ids"], name
        assert row["model"][2:] == [config.vocab_size, config.num_layers, config.rope_theta], name
        assert (row["eos"], row["pad"]) == (tokenizer.eos_token, tokenizer.pad_token), name
        assert row["dtype"] == models.stored_dtype(directories[name]).name, name
        assert row["tied"] == config.tie_word_embeddings, name
        if "version" in name or "code" in name:
            assert row["ids"] == [[2, 257], [2, 257], 257], name
            assert row["sampling"] == [True, 0.6, 0.95], name
            assert ("<s>" in row["special"]) == (
                name not in ("llama_of_version_5", "mistral_of_version_5", "pangu_with_code")
            )
            assert row["chat"] == "<user>1+1?</user><assistant>", name


@pytest.mark.slow
def test_exports_open_in_transformers_4(transformers_4, directories):
    check(opened(transformers_4, directories), directories)


@pytest.mark.slow
def test_exports_open_in_the_transformers_that_is_installed(directories):
    check(opened(sys.executable, directories), directories)
