"""Tokenizer files of an export: the base's own, readable for Transformers 4 and 5."""

import json
import shutil

import pytest

from r2vpo_jax.models import tokenizer_files
from r2vpo_jax.models.base import find_directory
from r2vpo_jax.models.tokenizer import load_tokenizer
from tests.helpers.paths import ROOT, TINY_BASE
from tests.helpers.tokenizers import CHAT, byte_tokenizer

SHIPPED = sorted((ROOT / "r2vpo_jax" / "assets" / "models").iterdir())
# As Transformers 4 has written it for years, and Qwen publishes it.
OLD = {
    "add_bos_token": False,
    "additional_special_tokens": ["<s>"],
    "chat_template": CHAT,
    "eos_token": "</s>",
    "pad_token": "</s>",
    "tokenizer_class": "Qwen2Tokenizer",
}


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base"
    byte_tokenizer().save_pretrained(path)
    (path / "chat_template.jinja").unlink()
    (path / "config.json").write_text('{"model_type": "qwen2"}')
    (path / "tokenizer_config.json").write_text(json.dumps(OLD, indent=4))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("x")
    return path


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in tokenizer_files.tokenizer_files(path)}


def test_files_are_copied_byte_for_byte(base, tmp_path):
    tokenizer_files.copy_tokenizer(base, base)  # its own place
    assert len(contents(base)) == 4
    out = tmp_path / "out"
    out.mkdir()
    (out / "chat_template.jinja").write_text("of an earlier export")
    (out / "notes.txt").write_text("mine")
    tokenizer_files.copy_tokenizer(base, out)
    assert contents(out) == contents(base)
    assert json.loads((out / "tokenizer_config.json").read_text()) == OLD
    assert {file.name for file in out.iterdir()} == {*(str(p.parts[0]) for p in contents(base)), "notes.txt"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
        ({"is_local": True, "local_files_only": True}, {}),
        (
            {"extra_special_tokens": ["<a>", "<s>"], "additional_special_tokens": None},
            {"additional_special_tokens": ["<a>", "<s>"]},
        ),
        ({"extra_special_tokens": ["<a>", "<s>"]}, {"additional_special_tokens": ["<s>", "<a>"]}),
        ({"extra_special_tokens": {"image_token": "<a>"}}, {"extra_special_tokens": {"image_token": "<a>"}}),
        ({"model_specific_special_tokens": {"image_token": "<a>"}}, {"extra_special_tokens": {"image_token": "<a>"}}),
        (
            {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
    ],
)
def test_what_only_transformers_5_reads_is_spelled_for_both(changes, expected, base, tmp_path):
    (base / "tokenizer_config.json").write_text(json.dumps(OLD | changes))
    tokenizer_files.copy_tokenizer(base, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == OLD | expected
    assert json.loads((base / "tokenizer_config.json").read_text()) == OLD | changes
    before, after = (load_tokenizer(path)[0] for path in (base, shutil.copytree(tmp_path, tmp_path / "copy")))
    assert after("a b</s>")["input_ids"] == before("a b</s>")["input_ids"]


@pytest.mark.parametrize("path", [*SHIPPED, TINY_BASE], ids=lambda path: path.name)
def test_models_that_ship_are_spelled_for_both(path, tmp_path):
    tokenizer_files.copy_tokenizer(path, tmp_path)
    assert contents(tmp_path) == contents(path)
    assert json.loads((path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tokenizer_that_was_made_here_is_too(tmp_path):
    path, _ = find_directory("word_problems_base")
    load_tokenizer(path)[0].save_pretrained(tmp_path)
    tokenizer_files.respell(tmp_path)
    assert contents(tmp_path).keys() == contents(path).keys()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings == json.loads((path / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"])
def test_a_git_lfs_pointer_is_named(name, base):
    (base / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(base)
