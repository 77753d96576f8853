"""The identity of a base model: what is part of it, and what is not."""

import json
import shutil

import jax
import numpy as np
import pytest

from r2vpo_jax import models
from r2vpo_jax.config import ModelConfig
from r2vpo_jax.models import identity
from r2vpo_jax.models.base import open_base_model


def opened(path):
    return open_base_model(ModelConfig(path=str(path)))


@pytest.fixture
def directory(tmp_path):
    shutil.copytree(open_base_model(ModelConfig(path="word_problems_base")).path, tmp_path / "base")
    return tmp_path / "base"


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_weights(path):
    model, params = models.from_pretrained(path)
    changed = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.001), params)
    models.save_pretrained(path, model, changed, opened(path).tokenizer, eos_ids=(2, 0))


def other_template(path):
    file = path / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant", "bot"))


def other_tokens(path):
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace('"<|im_start|>"', '"<|im_begin|>"'))


def another_end(path):
    rewrite(path / "generation_config.json", eos_token_id=[2, 0, 5])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (other_weights, {"weights"}),
        (other_template, {"chat template"}),
        (other_tokens, {"tokenizer"}),
        (another_end, {"ends of text"}),
        (lambda path: rewrite(path / "config.json", rms_norm_eps=1e-5), {"architecture"}),
        (lambda path: (path / "README.md").write_text("notes"), set()),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"of somebody else"), set()),
        (lambda path: (path / "tekken.json").write_text("{}"), {"tokenizer"}),
        (lambda path: rewrite(path / "generation_config.json", temperature=0.6), set()),
    ],
)
def test_each_part_is_told_apart(directory, change, parts):
    before = opened(directory).identity()
    assert len(set(before.values())) == len(before) == 5
    change(directory)
    now = opened(directory).identity()
    found = set(identity.differing(before, now))
    assert found - ({"architecture", "tokenizer"} if change is other_weights else set()) == parts  # it writes all files
    assert (identity.digest(before) == identity.digest(now)) == (not parts)


def test_links_and_copies_are_the_same(directory, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    shutil.copytree(directory, tmp_path / "run" / "hf")
    (tmp_path / "snapshot").mkdir()
    for file in directory.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    for other in ("link", "run/hf", "snapshot"):
        assert opened(tmp_path / other).identity() == opened(directory).identity(), other


def test_large_files_are_digested_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(identity, "_BLOCK_BYTES", 10)
    monkeypatch.setattr(identity, "_BLOCKS", 5)
    file = tmp_path / "weights"
    file.write_bytes(bytes(1000))
    digest = identity._content(file)
    for position, seen in {0: True, 9: True, 500: True, 999: True, 100: False}.items():
        content = bytearray(1000)
        content[position] = 1
        file.write_bytes(content)
        assert (identity._content(file) != digest) == seen
    file.write_bytes(bytes(1001))
    assert identity._content(file) != digest
