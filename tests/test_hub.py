"""Names on the Hub, by the real huggingface_hub and a Hub on the loopback."""

import json
import pathlib

import pytest

from r2vpo_jax import data, hub, waits
from r2vpo_jax.config import ModelConfig, SweepConfig
from r2vpo_jax.config.lora import LoraConfig
from r2vpo_jax.errors import UsageError
from r2vpo_jax.evaluation import model_source
from r2vpo_jax.models import base as base_model
from r2vpo_jax.run import directory
from r2vpo_jax.sweeps import runs, sweep
from tests.helpers import hub as hubs
from tests.helpers.paths import TINY_BASE

NEVER = {
    "pytorch_model.bin": b"x",
    "modeling.py": b"raise SystemExit",
    "README.md": b"x",
    "onnx/model.safetensors": b"x",
}
TINY = {path.name: path.read_bytes() for path in TINY_BASE.iterdir()}
ROWS = b'{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": "3"}\n'


@pytest.fixture(scope="module")
def served():
    with hubs.serve() as there:
        yield there


@pytest.fixture
def there(served, tmp_path, monkeypatch):
    """A Hub with one model and one data set, and an empty cache."""
    served.asked.clear()
    served._repositories.clear()
    served.repository("me/tiny").commit(TINY | NEVER)
    served.repository("datasets/me/sums").commit({"data/train.jsonl": ROWS, "data/test.jsonl": ROWS, "load.py": b"x"})
    with hubs.used(served, tmp_path, monkeypatch):
        yield served


def opened(name):
    return base_model.open_base_model(ModelConfig(path=name))


def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_model_is_the_one_on_the_disk_and_only_what_is_read_is_fetched(there):
    with hub.resolving() as resolved:
        fetched = opened("hf://me/tiny")
    assert fetched.identity() == opened(str(TINY_BASE)).identity()
    assert there.fetched() == sorted(TINY)
    (key, found), commit = resolved.found.popitem(), there.repository("me/tiny").refs["main"]
    assert (key, found["commit"]) == ("hf://me/tiny", commit)
    assert {path: kind.partition(":")[0] for path, kind in found["files"].items()} == {
        name: "sha256" if name.endswith(".safetensors") else "sha1" for name in TINY
    }
    # Again, and by the commit: from the cache, for which the branch alone is asked.
    there.asked.clear()
    opened("hf://me/tiny@main")
    opened(f"hf://models/me/tiny@{commit}")
    assert there.asked == [("GET", "/api/models/me/tiny/revision/main")]


def test_weights_are_left_out_where_they_are_not_wanted_and_an_index_names_them(there):
    weights = TINY["model.safetensors"]
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    split = {name: content for name, content in TINY.items() if name != "model.safetensors"}
    split |= {
        "model.safetensors.index.json": index,
        "model-1.safetensors": weights,
        "model-2.safetensors": weights[:-1],
    }
    there.repository("me/split").commit(
        {f"deep/{name}": content for name, content in split.items()} | {"consolidated.safetensors": b"x"}
    )
    base_model.open_base_model(ModelConfig(path="hf://me/split/deep"), weights=False)
    assert there.fetched() == sorted(set(split) - {"model-1.safetensors", "model-2.safetensors"})
    opened("hf://me/split/deep")
    assert there.fetched() == sorted(split)
    assert model_source.find("hf://me/split/deep").directory == "hf://me/split/deep"
    there.repository("me/pickled").commit({name: split[name] for name in ("config.json", "tokenizer.json")} | NEVER)
    with pytest.raises(UsageError, match=r"lacks the weight files .* \(only safetensors are read\)"):
        opened("hf://me/pickled").load_params()


def test_revisions_are_branches_tags_and_commits(there):
    repository = there.repository("datasets/me/sums")
    first = repository.refs["main"]
    repository.refs["v1"], repository.refs["refs/convert/parquet"] = first, first
    second = repository.commit({"data/train.jsonl": ROWS[:35]})
    for revision, size in {
        "": 1,
        "@main": 1,
        f"@{second}": 1,
        "@v1": 2,
        f"@{first}": 2,
        "@refs/convert/parquet": 2,
    }.items():
        assert data.load(f"hf://datasets/me/sums{revision}/data/train.jsonl", "train").num_examples == size


def test_data_are_those_on_the_disk_and_only_the_split_is_fetched(there, tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(ROWS)
    here = data.load(f"{tmp_path}/mine.jsonl", "train")
    for name in (
        "hf://datasets/me/sums",
        "hf://datasets/me/sums/data",
        "hf://datasets/me/sums/data/train.jsonl?rows=:9",
    ):
        assert data.load(name, "train").digest == here.digest
    assert there.fetched() == ["train.jsonl"]
    assert data.load("hf://datasets/me/sums?split=train&rows=:1 + hf://datasets/me/sums", "test").num_examples == 3
    for name, message in {
        "hf://datasets/me/sums": "no validation data there, but data/test.jsonl, data/train.jsonl; name a file",
        "hf://me/tiny": "names a model",
        "hf://datasets/me/sums/none.jsonl": "there is no none.jsonl in hf://datasets/me/sums",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data.load(name, "validation")


def test_what_cannot_be_fetched_is_one_line_that_says_what_to_do(there, monkeypatch):
    there.repository("me/gated").commit(TINY)
    there.repository("me/gated").gated = True
    refusals = {
        "hf://tiny": "is no name on the Hub .* names are hf://OWNER/NAME",
        "hf://spaces/me/tiny": "names a space, and only models and data sets are read",
        "hf://me/none": f"there is no model me/none at {there.url}, or it may not be seen; .*hf auth login",
        "hf://me/tiny@v9": "me/tiny has no branch, tag or commit v9",
        f"hf://me/tiny@{'1' * 40}": f"me/tiny has no branch, tag or commit {'1' * 40}",
        "hf://me/gated": f"is gated: accept its conditions at {there.url}/me/gated, and log in by `hf auth login`, or set HF_TOKEN",
        "hf://datasets/me/sums": "neither|no config.json",
    }
    offline_refusals = {
        "hf://me/tiny": "not in the cache .*, and HF_HUB_OFFLINE is set; run `hf download me/tiny`.*or give the path of a folder",
        f"hf://me/tiny@{'0' * 40}": f"run `hf download me/tiny --revision {'0' * 40}` where there is a network",
    }

    def check(refusals):
        for name, message in refusals.items():
            with pytest.raises(UsageError, match=message) as refused:
                opened(name)
            assert "\n" not in str(refused.value)

    check(refusals)
    offline(monkeypatch)
    check(offline_refusals)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set; run `hf download me/sums --repo-type dataset`"):
        data.load("hf://datasets/me/sums", "train")


def test_a_hub_that_does_not_answer_is_said_and_the_cache_goes_on(there, monkeypatch):
    from huggingface_hub import constants

    opened("hf://me/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"http://127.0.0.1:9 cannot be reached \(.+\); run `hf download me/other`"):
        opened("hf://me/other")
    before = len(there.asked)
    assert opened("hf://me/tiny").identity() == opened(str(TINY_BASE)).identity()
    offline(monkeypatch)
    opened("hf://me/tiny")
    assert len(there.asked) == before


def test_contents_that_are_not_what_the_hub_states_are_refused_and_fetched_again(there):
    repository = there.repository("me/tiny")
    for path in ("config.json", "model.safetensors"):
        repository.says[path] = TINY[path][:-1] + b"!"
        with pytest.raises(UsageError, match=rf"{path} is damaged: its digest is .*the same command fetches it again"):
            opened("hf://me/tiny")
        del repository.says[path]
    good = opened("hf://me/tiny")
    # In the cache too, if the file is another one since it was compared.
    weights = (good.path / "model.safetensors").resolve()
    weights.write_bytes(TINY["model.safetensors"][:-1] + b"!!")
    with pytest.raises(UsageError, match="model.safetensors is damaged"):
        opened("hf://me/tiny")
    assert opened("hf://me/tiny").identity() == good.identity()


def test_a_download_that_breaks_goes_on(there, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    there.repository("me/tiny").cuts["model.safetensors"] = 1000
    assert opened("hf://me/tiny").identity() == opened(str(TINY_BASE)).identity()
    assert there.fetched().count("model.safetensors") == 2
    assert not list(pathlib.Path(file_download.constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_what_was_begun_stays_what_it_was(there, tmp_path, monkeypatch):
    repository, said = there.repository("me/tiny"), []
    first = repository.refs["main"]
    with directory.resolving(tmp_path / "run"):
        opened("hf://me/tiny")
        (tmp_path / "run").mkdir()
        directory.record_names(tmp_path / "run", said.append)
    assert said[0].startswith(f"hf://me/tiny: commit {first}, {len(TINY)} files of digest ")
    repository.commit(TINY | {"config.json": b"{}"})
    with directory.resolving(tmp_path / "run"):
        assert first in str(opened("hf://me/tiny").path)
        with directory.resolving(tmp_path / "evaluation"):  # of that run
            assert first in str(opened("hf://me/tiny").path)
            directory.record_names(tmp_path / "run", said.append)
    with directory.resolving(tmp_path / "evaluation", tmp_path / "run", "hf://me/tiny", None):
        assert first in str(opened("hf://me/tiny").path)
    with pytest.raises(UsageError):
        opened("hf://me/tiny")
    # With an empty cache: fetched again by the commit; refused where its files are others, or it is gone.
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    with directory.resolving(tmp_path / "run"):
        opened("hf://me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "third"))
    repository.commits[first] = TINY | {"generation_config.json": b'{"eos_token_id": 1}\n\n'}
    with (
        directory.resolving(tmp_path / "run"),
        pytest.raises(UsageError, match="generation_config.json is not the file"),
    ):
        opened("hf://me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fourth"))
    del repository.commits[first]
    with directory.resolving(tmp_path / "run"), pytest.raises(UsageError, match=f"no longer has the commit {first}"):
        opened("hf://me/tiny")


def test_adapters_name_the_model_under_them_as_everybody_can_find_it(there, tmp_path):
    base = base_model.open_base_model(ModelConfig(path="hf://me/tiny", lora=LoraConfig(rank=1)))
    base.export_adapters(tmp_path / "adapters", base.load_params())
    written = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    commit = there.repository("me/tiny").refs["main"]
    assert (written["base_model_name_or_path"], written["revision"]) == ("me/tiny", commit)


def test_the_bytes_of_a_download_are_counted(there, monkeypatch):
    begun = []
    monkeypatch.setattr(waits, "start", lambda wait: begun.append(wait) or (lambda done=True: None))
    opened("hf://me/tiny")
    settings, weights = (wait for wait in begun if wait.what == "downloading hf://me/tiny")
    size = len(TINY["model.safetensors"])
    assert weights.total == weights._done == size
    assert settings.total == settings._done == sum(map(len, TINY.values())) - size


def test_the_runs_of_a_sweep_begin_at_one_commit(there, tmp_path):
    base = {"model": {"path": "hf://me/tiny"}}
    cells = ({"optimizer.learning_rate": 1e-3}, {"model.path": "hf://me/tiny@v1"})
    plan = runs.plan(base, SweepConfig(cells=cells))
    first = there.repository("me/tiny").refs["main"]
    there.repository("me/tiny").refs["v1"] = first
    with directory.resolving(tmp_path):
        sweep._resolve_names(plan)
        directory.record_names(tmp_path, lambda _: None)
    there.repository("me/tiny").commit(TINY | {"README.md": b"newer"})
    (tmp_path / "runs" / "a_seed=0").mkdir(parents=True)
    with directory.resolving(tmp_path), directory.resolving(tmp_path / "runs" / "a_seed=0"):
        assert opened("hf://me/tiny").path.name == opened("hf://me/tiny@v1").path.name == first


def test_process_0_says_the_commit(there):
    other = there.repository("me/tiny").refs["main"]
    there.repository("me/tiny").commit(TINY | {"README.md": b"newer"})
    asked = []

    def share(question, value):
        asked.append(question)
        return other

    with hub.resolving({}, share):
        assert other in str(opened("hf://me/tiny").path)
    assert asked == ["the commit of hf://me/tiny"]


def test_a_cache_without_links_is_read(there, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    with hub.resolving() as resolved:
        assert opened("hf://me/tiny").identity() == opened(str(TINY_BASE)).identity()
    assert {digest.partition(":")[0] for digest in resolved.found["hf://me/tiny"]["files"].values()} == {"sha256"}
