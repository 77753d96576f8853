"""The programs of examples/: each does what its first lines say."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from examples import nnx_language_model, own_reward, tunix_grpo
from r2vpo_jax import config
from r2vpo_jax.config import grid
from tests.helpers.paths import ROOT
from tests.helpers.trees import merged

EXAMPLES = ROOT / "examples"


def test_the_reward_of_the_language_model_by_hand():
    """Prompts end with 3, 3, 3 and 6: the answers are 4 5 6 0, three times, and 0."""
    prompts = jnp.array([[1, 3], [6, 3], [2, 3], [1, 6]])
    responses = jnp.array([[4, 5, 6, 0, 1, 1], [4, 0, 6, 0, 1, 1], [4, 5, 1, 6, 1, 2], [1, 0, 0, 0, 0, 0]])
    # Right: 4 of 4; 1 of 4 (it ends after two); 2 of 6 (it does not end); 0 of 2.
    np.testing.assert_allclose(nnx_language_model.reward(prompts, responses), [1, 1 / 4, 2 / 6, 0])
    mask = nnx_language_model.response_mask(responses)
    assert mask.sum(axis=1).tolist() == [4, 2, 6, 2]


@pytest.mark.slow
def test_the_language_model_learns(capsys):
    """A few batches, by the adaptive multiplier; the whole of it is what examples/README.md says."""
    rewards = nnx_language_model.train(iterations=20)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5])
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"iteration  20  reward 0\.\d{3}  V 0\.\d{4}  lambda \d\.\d\d", line)


@pytest.mark.slow
def test_the_step_of_tunix_and_its_stand_in():
    """One update of the whole batch is four micro-batches, each a quarter of it; with tunix installed, its own step is the same."""
    rewards = tunix_grpo.train(iterations=3, stand_in=True)
    assert len(rewards) == 3
    assert all(map(math.isfinite, rewards))


@pytest.mark.slow
def test_the_real_tunix_comes_to_the_same():
    pytest.importorskip("tunix", reason="pip install google-tunix==0.1.7; it is in no extra")
    from tunix.rl import function_registry

    assert tunix_grpo.train(iterations=3) == pytest.approx(tunix_grpo.train(iterations=3, stand_in=True), rel=1e-5)
    assert function_registry.get_policy_loss_fn("r2vpo") is tunix_grpo.policy_loss


def test_brevity_by_hand():
    assert own_reward.brevity(None, ["so 3", "3"], None, [14, 7]) == [0.75, 0.875]


@pytest.mark.slow
def test_the_run_with_ones_own_reward(tmp_path):
    """The configuration as it is, but for its length: the part of the function is in the metrics."""
    from r2vpo_jax.training.trainer import train

    values = own_reward.get_config()
    values.trainer.update(
        num_iterations=2, eval_every=2, eval_problems=8, test_problems=8, test_samples=2, checkpoint_every=2
    )
    settings = config.from_flags(values)
    assert settings.task.reward.function_weight == 0.5
    train(settings, tmp_path / "run", say=lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = [row["reward/function"] for row in rows if row["kind"] == "train"]
    assert len(parts) == 2
    assert all(0 < part < 0.5 for part in parts)


# ---- a sweep with pandas ----


def test_a_table_of_a_sweep_by_hand(tmp_path, capsys):
    """Two cells, two seeds, one run that failed; the last test counts, and differences are of equal seeds."""
    pd = pytest.importorskip("pandas", reason="pip install 'r2vpo_jax[examples]'")
    from examples import sweep_with_pandas

    def scored(cell, seed, before, after):
        rows = [(0, "test", before), (2, "validation", 0.99), (2, "test", after)]
        return [(f"{cell}_seed={seed}", cell, seed, "finished", *row) for row in rows]

    names = ["run", "cell", "seed", "status", "iteration", "split", "pass_at_1"]
    rows = [*scored("a", 0, 0.1, 0.2), *scored("b", 0, 0.1, 0.5), *scored("a", 1, 0.1, 0.4), *scored("b", 1, 0.1, 0.5)]
    rows.append(("b_seed=2", "b", 2, "failed", None, None, None))
    pd.DataFrame(rows, columns=names).to_parquet(tmp_path / "results.parquet")
    curves = [
        (f"{cell}_seed={seed}", cell, seed, i, i * 0.1 + seed) for cell in "ab" for seed in (0, 1) for i in (1, 2)
    ]
    pd.DataFrame(curves, columns=["run", "cell", "seed", "iteration", "ratio/variance"]).to_parquet(
        tmp_path / "curves.parquet"
    )
    table = sweep_with_pandas.main(str(tmp_path), reference="a")
    assert table.index.tolist() == ["b", "a"]
    # b: 0.5, 0.5. Differences 0.3 and 0.1: mean 0.2, standard error 0.1. a: 0.2, 0.4: mean 0.3, standard error 0.1.
    np.testing.assert_allclose(table.to_numpy(), [[0.5, 0, 0.2, 0.1, 2], [0.3, 0.1, 0, 0, 2]], atol=1e-12)
    out = capsys.readouterr().out
    assert out.startswith("5 runs: 4 finished, 1 failed")
    np.testing.assert_allclose(
        sweep_with_pandas.curve(pd.read_parquet(tmp_path / "curves.parquet"), "ratio/variance"),
        [[0.6, 0.6], [0.7, 0.7]],
    )


@pytest.mark.slow
def test_the_table_of_a_real_sweep(tiny_sections, tmp_path):
    pytest.importorskip("pandas", reason="pip install 'r2vpo_jax[examples]'")
    from examples import sweep_with_pandas
    from r2vpo_jax.sweeps.sweep import run_sweep

    sections = merged(tiny_sections, {"trainer": {"num_iterations": 1, "eval_every": 1}})
    sweep = config.SweepConfig(cells=grid.values("objective.name", "r2vpo_fixed", "ppo_clip"), seeds=(0, 1))
    run_sweep(config.make(**sections).to_dict(), sweep, tmp_path, say=lambda _: None)
    table = sweep_with_pandas.main(str(tmp_path))
    assert sorted(table.index) == ["ppo_clip", "r2vpo_fixed"]
    assert table["seeds"].tolist() == [2, 2]


# ---- the notebook, and the index ----


def notebook():
    return json.loads((EXAMPLES / "quickstart.ipynb").read_text())


def outputs(cells):
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_the_notebook_is_as_it_was_run():
    """All of its cells in their order, without an error, nothing of the machine that ran it, and small."""
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 300_000
    cells = notebook()["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    found = outputs(cells)
    assert not [output for output in found if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in found) == 1
    shown = json.dumps([output.get("text", output.get("data", {}).get("text/plain", "")) for output in found])
    assert not re.findall(r"/(?:tmp|home|root|work|Users|usr)/", shown)
    assert "before" in shown


@pytest.mark.slow
def test_the_notebook_runs():
    """Anew, by a kernel of its own: the same kinds of outputs, and a model that is better than before."""
    client = pytest.importorskip("nbclient", reason="pip install 'r2vpo_jax[examples]'")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    nb = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    client.NotebookClient(
        nb, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()

    def kinds(cells):  # how often a stream was interrupted is the machine's
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [
            {output["output_type"] for output in cell["outputs"] if output.get("name") != "stderr"} for cell in code
        ]

    assert kinds(nb.cells) == kinds(notebook()["cells"])
    before, after = map(float, re.search(r"pass@1: (\S+) before, (\S+) after", outputs(nb.cells)[-1]["text"]).groups())
    assert after > before


def test_every_example_is_in_the_index():
    text = (EXAMPLES / "README.md").read_text()
    for file in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")):
        if file.name != "__init__.py":
            assert f"]({file.name})" in text, file.name
            assert (
                file.suffix == ".ipynb"
                or file.stem.startswith("continuous")
                or len(file.read_text().splitlines()) < 150
            )
