"""The arithmetic parts import little: other projects reuse them."""

import ast
import pathlib
import re
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


# From what others build on to what builds on it; docs/architecture.md has the same order. Importing goes to the left only.
LAYERS = (
    ("losses", "train_stats"),
    ("advantages", "corrections", "dual", "kl", "ratio_stats"),
    ("errors", "rollout", "sharding", "waits"),
    ("rows", "scoring"),
    ("cluster",),
    ("storage",),
    ("hub",),
    ("config",),
    ("models", "verifiers"),
    ("sampler", "data"),
    ("tasks",),
    ("run",),
    ("evaluation",),
    ("training",),
    ("sweeps",),
    ("cli",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def _modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def _imports():
    """(module, module that it imports), below r2vpo_jax; imports inside functions and for typing count too."""
    there = dict(_modules())
    for name, file in there.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file} imports relatively"
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                if target.partition(".")[0] == "r2vpo_jax":
                    inner = target.partition(".")[2]
                    while inner not in there:  # a name in a module
                        inner = inner.rpartition(".")[0]
                    yield name, inner


def test_imports_go_one_way():
    upward = [
        f"{source} imports {target}"
        for source, target in _imports()
        if source and target and LAYER_OF[target.split(".")[0]] > LAYER_OF[source.split(".")[0]]
    ]
    assert not upward
    within_a_layer = {
        (source.split(".")[0], target.split(".")[0])
        for source, target in _imports()
        if source and target and LAYER_OF[target.split(".")[0]] == LAYER_OF[source.split(".")[0]]
    }
    assert all(source == target for source, target in within_a_layer)


def test_no_module_imports_itself_in_a_circle():
    graph = {}
    for source, target in _imports():
        graph.setdefault(source, set()).add(target)
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        # A package's face imports its modules; they import each other directly, never through the face.
        for target in graph.get(name, ()):
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name, _ in _modules() if name} == set(LAYER_OF)


@pytest.mark.parametrize("package", ["verifiers", "data"])
def test_verifiers_and_data_load_no_jax(package):
    code = f"import r2vpo_jax.{package}, sys; print(sorted({{'jax', 'flax', 'numpy'}} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=120
    )
    assert "jax" not in result.stdout
    assert "flax" not in result.stdout


def test_the_experiments_do_not_count_on_their_folder_being_a_package():
    """Where the package is installed, experiments/ is a part of it (setup.py)."""
    for file in (PACKAGE.parent / "experiments").rglob("*.py"):
        assert not re.findall(r"^\s*(?:from|import) experiments\b", file.read_text(encoding="utf-8"), re.MULTILINE), (
            file
        )
