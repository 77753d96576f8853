"""docs/reuse.md: its programs run and do what the page says of them; scripts/plot_objectives.py draws every objective."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from r2vpo_jax import corrections, kl, losses

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reuse.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def run(program):
    """The numbers of each printed line."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return [[float(x) for x in re.findall(r"(?<![\w^])\d+\.?\d*(?![\w^])", x)] for x in done.stdout.splitlines()]


def test_there_are_three_short_programs():
    assert len(PROGRAMS) == 3
    for program in PROGRAMS:
        assert len([x for x in program.splitlines() if x.strip()]) <= 48


def test_jax_alone():
    program = PROGRAMS[0]
    assert not re.search(r"flax|optax", program)
    budget = float(re.search(r"BUDGET = .*, ([\d.]+) ", program)[1])
    _, *rows = run(program)
    _, reward, variance, coef = np.array(rows).T
    assert reward[-1] > reward[0] + 0.4
    # Of other keys it is 0.8 to 2 times the budget, and without the multiplier more than 10 times.
    assert np.all((variance > budget / 3) & (variance < 3 * budget))
    assert np.all(coef > 0.2)  # the constraint binds


def test_jax_alone_without_the_multiplier():
    assert PROGRAMS[0].count("max_coef=50.0") == 1
    _, (_, reward, variance, coef), *_ = run(PROGRAMS[0].replace("max_coef=50.0", "max_coef=0.0"))
    assert variance > 0.1  # ten times the budget
    assert coef == 0
    assert reward > 0.2


def test_nnx_and_micro_batches():
    (clip_norm, clip_first, clip_last), (norm, first, last) = run(PROGRAMS[1])
    assert norm == pytest.approx(clip_norm, abs=2e-6)
    assert norm > 0.01
    assert first == clip_first
    assert clip_last > clip_first + 0.5
    assert last > first + 0.5


def test_vmap_over_the_coefficient():
    title, *rows = run(PROGRAMS[2])
    coef, variance, theory, reward = np.array(rows).T
    assert len(coef) >= 5
    assert np.all(np.diff(coef) > 0)
    assert np.all(np.diff(variance) < 0)
    assert np.all(np.diff(reward) < 0)
    assert np.all(reward > title[-1])  # better than before training
    np.testing.assert_allclose(variance[1:], theory[1:], rtol=0.02, atol=1e-5)


def test_fragments():
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    fragments = [textwrap.dedent(x) for x in re.findall(r"(?:^    .*\n)+", prose, flags=re.MULTILINE)]
    assert len(fragments) == 4
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array([[5], [3], [1], [0]])
    names = ("logp", "behavior_logp", "proximal_logp", "reference_logp", "scored_logp")
    arrays = {x: np.where(mask, rng.normal(-2, 0.5, mask.shape), np.nan).astype(np.float32) for x in names}
    arrays |= {"mask": mask, "advantages": np.float32([1, -1, 1, -1])}
    for fragment in fragments:

        def loss_fn(logp, fragment=fragment):
            space = {"losses": losses, "kl": kl, "corrections": corrections} | arrays | {"logp": logp}
            space |= {"name": "ppo_clip", "reduction": "token_mean", "hyper": {"clip_low": 0.1}}
            exec(fragment, space)
            assert all(len(pair) == 2 for pair in space["stats"].values())
            return space["loss"]

        loss, grads = jax.jit(jax.value_and_grad(loss_fn))(jnp.asarray(arrays["logp"]))
        assert np.isfinite(loss)
        assert np.all(np.isfinite(grads))
        assert np.any(grads != 0)


def test_default_reductions_are_as_the_page_says():
    page = " ".join(PAGE.split())
    named = re.search(r"`sequence_mean` for (.*?), `token_mean` for the others", page)[1]
    defaults = {x: losses.get(x).__kwdefaults__["reduction"] for x in losses.names()}
    assert set(re.findall(r"`(\w+)`", named)) == {
        x for x, reduction in defaults.items() if reduction == "sequence_mean"
    }
    assert set(defaults.values()) == {"sequence_mean", "token_mean"}


@pytest.fixture(scope="module")
def plot_objectives():
    spec = importlib.util.spec_from_file_location("plot_objectives", ROOT / "scripts" / "plot_objectives.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_coefficients(plot_objectives):
    ratios = np.array([0.5, 1.0, 1.3, 3.0])
    sizes = np.array([[1.0], [-3.0]])
    g = {x: plot_objectives.coefficients(x, ratios, sizes[:, 0]) for x in ("r2vpo", "ppo_clip", "luspo")}
    np.testing.assert_allclose(g["r2vpo"], ratios * (sizes - 5 * (ratios - 1)), rtol=1e-4, atol=1e-5)
    clipped = [[0.5, 1, 0, 0], [0, -3, -3.9, -9]]
    np.testing.assert_allclose(g["ppo_clip"], clipped, rtol=1e-4)
    np.testing.assert_allclose(g["luspo"], clipped, rtol=1e-4)


def test_picture_has_every_objective(plot_objectives, tmp_path, monkeypatch):
    figures = []
    draw = plot_objectives.draw
    monkeypatch.setattr(plot_objectives, "draw", lambda: figures.append(draw()) or figures[0])
    plot_objectives.main(["--output", str(tmp_path / "g.png")])
    panels = {ax.get_title(loc="left"): ax for ax in figures[0].axes if ax.axison}
    assert tuple(panels) == losses.names()
    for ax in panels.values():
        drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}
        curves = [y for label, y in drawn.items() if label.startswith("A = ")]
        assert len(curves) == 4
        assert all(np.all(np.isfinite(y)) and np.any(y != 0) for y in curves)
    with Image.open(tmp_path / "g.png") as drawn, Image.open(plot_objectives.OUTPUT) as shipped:
        assert drawn.size[0] == 1200
        assert drawn.size == shipped.size  # a new objective needs a new picture
