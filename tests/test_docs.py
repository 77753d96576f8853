"""What the documents promise: the snippet runs, links lead somewhere, flags and metrics exist."""

import pathlib
import re
import subprocess
import sys

import pytest

from r2vpo_jax import config

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "BUILD.md", *(ROOT / "docs").rglob("*.md")])


def test_readme_snippet_runs_as_printed():
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippet.strip().splitlines()) <= 18
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loss, coefficient = (float(x) for x in done.stdout.split())
    # r = 1.2, 0.75, 0.8; A = 1, 1, -1: mean of rA = 1.15 / 3; mean (r-1)^2 = (0.04 + 0.0625 + 0.04) / 3 = 0.0475.
    assert loss == pytest.approx(-1.15 / 3 + 2.5 * 0.0475, rel=1e-5)
    assert coefficient == pytest.approx(2.5 + 12.5 * (0.0475 - 0.04), rel=1e-5)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_flags_exist(page):
    known = config.make()
    for flag in re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)+)", page.read_text()):
        section = known
        for name in flag.split("."):
            assert name in section, f"{page.name} names --config.{flag}"
            section = section[name]
