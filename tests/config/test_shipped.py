"""The configurations that ship, by their names."""

import pathlib

import pytest

from r2vpo_jax import config
from r2vpo_jax.config import shipped
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "experiments" / "configs"


def test_a_name_is_a_file_of_the_experiments():
    assert shipped.names() == tuple(sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__"))
    assert pathlib.Path(shipped.file_of("arithmetic")) == CONFIGS / "arithmetic.py"
    assert shipped.file_of("sweep_variance:smoke") == f"{CONFIGS / 'sweep_variance.py'}:smoke"
    for path in ("my_config.py", "configs/mine.py:a,b", "experiments/configs/arithmetic.py", "/tmp/what"):
        assert shipped.file_of(path) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "arithmetik",
            r"'arithmetik' \(did you mean arithmetic\?\); the names are arithmetic, .*, word_problems; a file of",
        ),
        ("zzz:smoke", "no configuration is called 'zzz'; the names are"),
        ("", "no configuration is called ''"),
        ("__init__", "no configuration is called '__init__'"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        shipped.file_of(name)


def test_a_named_configuration_is_new_at_each_call():
    first = config.named("arithmetic")
    first.trainer.num_iterations = 1
    assert config.named("arithmetic").trainer.num_iterations == 60
    assert config.named("arithmetic_stale").replay.lag == 16
    assert len(config.named("sweep_variance", "smoke").sweep.seeds) == 4
    with pytest.raises(ValueError, match="the sizes are full and smoke"):
        config.named("sweep_variance", "huge")
    with pytest.raises(ValueError, match="is no name"):
        config.named("experiments/configs/arithmetic.py")


def test_a_copy_of_the_library_alone_names_none(monkeypatch):
    monkeypatch.setattr(shipped, "_DIRECTORY", None)
    assert shipped.names() == ()
    with pytest.raises(ValueError, match="the names are none here; a file of yours ends in .py"):
        shipped.file_of("arithmetic")
