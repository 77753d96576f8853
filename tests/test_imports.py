"""The arithmetic parts import little: other projects reuse them."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "r2vpo_jax"
HEAVY = ("flax", "orbax", "transformers")


def _loaded_after(code):
    """Which of HEAVY a fresh interpreter has loaded after running `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=120
    )
    loaded = result.stdout.split()
    assert "jax" in loaded
    return [name for name in HEAVY if name in loaded]


def test_losses_and_advantages_load_no_framework():
    assert _loaded_after("import r2vpo_jax.losses, r2vpo_jax.advantages, r2vpo_jax.corrections, r2vpo_jax.kl") == []


def test_the_check_would_see_each():
    # Stand-ins of those names: importing the real ones takes seconds.
    code = f"import sys, types, r2vpo_jax.losses\nfor name in {HEAVY}: sys.modules[name] = types.ModuleType(name)"
    assert _loaded_after(code) == list(HEAVY)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("losses/core", set()),
        ("losses/clipped", set()),
        ("losses/penalized", set()),
        ("losses/sequence", set()),
        ("losses/soft", set()),
        ("advantages", set()),
        ("corrections", set()),
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
    third_party = names - set(sys.stdlib_module_names) - ({"r2vpo_jax"} if module.startswith("losses/") else set())
    assert third_party <= {"jax", "chex", "jaxtyping", "numpy"} | allowed
    assert "jax" in third_party
