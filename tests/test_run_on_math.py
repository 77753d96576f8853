"""docs/run_on_math.md, followed to the letter with a 2-layer random checkpoint."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.configs import math_reasoning
from r2vpo_jax.run import files

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "run_on_math.md"


def blocks():
    """(tag, commands) of each block of commands: tag is "", "real run" or "rehearsal"."""
    found = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    tags = [re.match(r"# (real run|rehearsal)", text) for text in found]
    return [(tag[1] if tag else "", text) for tag, text in zip(tags, found, strict=True)]


def test_blocks_are_tagged_with_what_the_page_explains():
    tags = [tag for tag, _ in blocks()]
    assert set(tags) == {"", "real run", "rehearsal"}
    assert tags.count("") >= 5
    # Steps 2 and 3 have both: whoever follows one kind misses nothing of the other.
    assert tags[1:5] == ["real run", "rehearsal", "real run", "rehearsal"]


def test_the_page_names_every_model_of_the_table():
    assert set(re.findall(r"`((?:deepseek|openpangu|qwen3)_\w+)`", PAGE.read_text())) == set(math_reasoning.MODELS)


@pytest.mark.slow
def test_the_page_works_to_the_end(tmp_path):
    for name in ("r2vpo_jax", "experiments", "scripts", "tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    # The packages are those of this test run: installing needs a network.
    commands = [text for tag, text in blocks() if tag != "real run" and "pip install" not in text]
    script = "set -euo pipefail\n" + "\n".join(commands)
    binaries = pathlib.Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    for name in ("r2vpo_on", "stopped", "r2vpo_off", "grpo", "dapo"):
        run = tmp_path / "runs" / name
        assert (run / "report" / "report.html").is_file(), name
        assert (run / "hf" / "model.safetensors").is_file(), name
        trained = [row for row in files.read_jsonl(run / "metrics.jsonl") if row["kind"] == "train"]
        assert len(trained) == 2, name
    # Stopped and continued is the same run.
    first, second = ((tmp_path / "runs" / name / "samples.jsonl").read_text() for name in ("r2vpo_on", "stopped"))
    assert first == second
    table = (tmp_path / "runs" / "evaluation_r2vpo_on" / "evaluation.md").read_text()
    for name in ("aime24", "aime25", "amc23", "math500"):
        assert name in table
    assert table in result.stdout
