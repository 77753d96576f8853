"""The arithmetic parts import little: other projects reuse them."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "r2vpo_jax"
HEAVY = ("flax", "orbax", "transformers")
MATHEMATICS = (
    *sorted(f"losses/{path.stem}" for path in (PACKAGE / "losses").glob("*.py")),
    *("advantages", "corrections", "dual", "kl", "ratio_stats", "train_stats"),
)


def _loaded_after(code):
    """Which of HEAVY a fresh interpreter has loaded after running `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=120
    )
    loaded = result.stdout.split()
    assert "jax" in loaded
    return [name for name in HEAVY if name in loaded]


def test_the_mathematics_loads_no_framework():
    assert (
        _loaded_after("from r2vpo_jax import losses, " + ", ".join(name for name in MATHEMATICS if "/" not in name))
        == []
    )


def test_the_check_would_see_each():
    # Stand-ins of those names: importing the real ones takes seconds.
    code = f"import sys, types, r2vpo_jax.losses\nfor name in {HEAVY}: sys.modules[name] = types.ModuleType(name)"
    assert _loaded_after(code) == list(HEAVY)


@pytest.mark.parametrize("module", MATHEMATICS)
def test_the_mathematics_imports_nothing_of_ours_outside_itself(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    ours = {name for name in names if name.partition(".")[0] == "r2vpo_jax"}
    assert {name.partition(".")[2].replace(".", "/") for name in ours} <= {*MATHEMATICS, "losses"}
    others = {name.partition(".")[0] for name in names - ours} - set(sys.stdlib_module_names)
    assert others <= {"jax", "chex", "jaxtyping", "numpy"}
    if module != "losses/__init__":
        assert "jax" in others
