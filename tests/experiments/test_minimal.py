"""The algorithm on one page does what the trainer does."""

import numpy as np
import pytest

from experiments import minimal
from experiments.configs import arithmetic
from r2vpo_jax import config
from r2vpo_jax.run import files
from r2vpo_jax.training import trainer
from tests.helpers.paths import ROOT


def test_it_fits_on_a_page():
    assert len((ROOT / "experiments" / "minimal.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_it_trains_to_the_numbers_of_the_trainer(tmp_path, monkeypatch):
    """Fewer prompts and samples, to save time; everything else is the shipped run."""
    monkeypatch.setattr(minimal, "PROMPTS", 8)
    monkeypatch.setattr(minimal, "GROUP", 4)
    values = arithmetic.get_config()
    values.sampler.group_size = 4
    values.trainer.update(prompts_per_rollout=8, num_iterations=2, eval_problems=1, test_problems=1, test_samples=1)
    trainer.train(config.from_flags(values), tmp_path / "run", say=lambda _: None)
    rows = [row for row in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    history = minimal.main(num_iterations=2)
    for name in ("reward/mean", "ratio/variance", "dual/variance_coef"):
        # Two compiled programs: bitwise the same on the machines tried, but nothing promises it.
        np.testing.assert_allclose([row[name] for row in history], [row[name] for row in rows], rtol=1e-4)
