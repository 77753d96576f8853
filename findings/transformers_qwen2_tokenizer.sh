#!/usr/bin/env bash
# Transformers 5.23.0: beside a Qwen2 model AutoTokenizer does not cut texts as tokenizer.json says.
#
# Expected by most: the pipeline of tokenizer.json is used as it is, all the more where tokenizer_config.json asks for
# PreTrainedTokenizerFast, the class without opinions; version 4.57.6 does so.
# Seen: with model_type qwen2 in config.json the class is Qwen2Tokenizer whatever tokenizer_config.json says, and it puts
# Qwen's own pre-tokenizer, which takes numbers apart, in the place of the file's. With llama or qwen3 the file counts.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    transformers==5.23.0 tokenizers==0.23.3
venv/bin/python -I - 2>/dev/null <<'PYTHON'
import json
import pathlib

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

directory = pathlib.Path("model")
directory.mkdir()
vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
vocabulary |= {"12": 256, "123": 257, "<eos>": 258}
tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("12", "3")]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.save(str(directory / "tokenizer.json"))
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
(directory / "tokenizer_config.json").write_text(json.dumps(settings))
expected = tokenizer.encode("123").ids
print(f"seen: tokenizer.json itself: 123 is {expected}")
cut = {}
for model_type in ("llama", "qwen3", "qwen2"):
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    opened = AutoTokenizer.from_pretrained(directory)
    cut[model_type] = opened("123")["input_ids"]
    print(f"seen: model_type {model_type}: {type(opened).__name__}, 123 is {cut[model_type]}")
assert cut["llama"] == cut["qwen3"] == expected == [257] and len(cut["qwen2"]) == 3
PYTHON
