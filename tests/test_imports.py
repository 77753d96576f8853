"""The arithmetic parts import little: other projects reuse them."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "r2vpo_jax"
HEAVY = ("flax", "orbax", "transformers")


def _imported(module):
    """Which of HEAVY a fresh interpreter has loaded after importing `module`."""
    code = f"import sys, {module}; print(*sorted({{m.partition('.')[0] for m in sys.modules}} & {set(HEAVY)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.split()


def test_losses_and_advantages_load_no_framework():
    assert _imported("r2vpo_jax.losses, r2vpo_jax.advantages, r2vpo_jax.kl") == []


@pytest.mark.parametrize("heavy", HEAVY)
def test_the_check_would_see(heavy):
    # A stand-in of that name, so that the check is quick and does not depend on what is installed.
    code = f"types, sys; sys.modules['{heavy}.core'] = types.ModuleType('{heavy}.core'); import r2vpo_jax.losses"
    assert _imported(code) == [heavy]


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("losses", set()),
        ("advantages", set()),
        ("kl", set()),
        ("dual", {"flax"}),
        ("ratio_stats", {"flax"}),
    ],
)
def test_direct_imports(module, allowed):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("r2vpo_jax" if node.level else node.module.partition(".")[0])
    third_party = names - set(sys.stdlib_module_names)
    assert third_party <= {"jax", "chex", "jaxtyping", "numpy"} | allowed
    assert "jax" in third_party
