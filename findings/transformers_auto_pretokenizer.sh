#!/usr/bin/env bash
# Transformers 5.23.0: AutoTokenizer replaces the pre-tokenizer that a directory's own tokenizer.json has.
#
# Expected by most: a directory with a tokenizer.json is read with that file's rules for cutting text.
# Seen: the class that the directory names (Qwen2Tokenizer) takes vocabulary and merges from the file and cuts by rules of its
# own: a tokenizer that was trained with numbers in groups of three digits gets them digit by digit. Nothing is said.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.23.0
venv/bin/python -I - <<'PYTHON'
import json
import pathlib

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = pathlib.Path("model")
folder.mkdir()
symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "<end>"]
own = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [("1", "2"), ("12", "3")]))
own.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
own.decoder = decoders.ByteLevel()
own.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<end>"}))
(folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))

auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
print("seen: tokenizer.json cuts 123 into", own.encode("123").tokens)
print("seen:", type(auto).__name__, "cuts it into", auto.tokenize("123"))
assert own.encode("123").tokens == ["123"]
assert auto.tokenize("123") == ["1", "2", "3"]
PYTHON
