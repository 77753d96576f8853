"""The report of a run: what the closing table and summary say of known rows."""

import json

import pytest
from matplotlib.figure import Figure

from r2vpo_jax import config, ratio_stats
from r2vpo_jax.run import figures, report
from r2vpo_jax.run import summary as run_summary


def rows_and_arguments():
    """The rows of a run of 4 iterations, and what `summary.summarize` is given besides."""
    names = (
        "policy/entropy", "ratio/max", "clip/fraction", "clip/gradient_share", "reward/mean", "optimizer/grad_norm",
        "ratio/variance_mean", "ratio/top_permille_share", "keeps/at_stake", "keeps/top_permille_gradient",
    )  # fmt: skip
    kept = [f"keeps/{name}_{split}" for name in ("retained", "restoring") for split in ratio_stats.SPLITS[1:]]
    rows = [
        {
            "kind": "train", "iteration": i + 1, "rollouts": 16 * (i + 1), "version": 4 * (i + 1), **dict.fromkeys(names, 0.5),
            # In the first two iterations there is nothing that a clip would cut.
            **dict.fromkeys(kept, "nan"), "keeps/retained": "nan" if i < 2 else 0.1 * i,
            "keeps/restoring": "nan" if i < 2 else 2.0,
            "ratio/variance": 0.01 * i, "dual/variance_coef": float(i), "time/rollout": 2.0, "time/verify": 0.0,
            "time/update": 4.0,
        }
        for i in range(4)
    ]  # fmt: skip
    rows.append({"kind": "evaluation", "split": "validation", "iteration": 4, "rollouts": 64, "pass_at_1": 0.75})
    scores = {
        "pass_at_1": 0.25, "pass_at_1_low": 0.2, "pass_at_1_high": 0.3, "k": 16, "pass_at_k": 0.9, "problems": 16, "average_at": 8,
        "by_level": {"2": 0.4}, "samples": [["1+2=", "3<eos>"]],
    }  # fmt: skip
    progress = {
        "rollouts": 64, "rollout_tokens": 800, "trained_tokens": 1600, "best_validation": 0.8,
        "last_validation": 0.75, "noise_floor": 1e-13,
    }  # fmt: skip
    others = {
        "base": scores, "final": scores | {"pass_at_1": 0.5}, "progress": progress, "train_seconds": 12.0,
        "phases": {"rollout": 8.0, "compile": 3.0}, "peak_memory_bytes": 2**20,
    }  # fmt: skip
    return rows, others


@pytest.fixture
def summary(tiny_config):
    rows, others = rows_and_arguments()
    return run_summary.summarize(tiny_config(), rows, **others), rows


def test_summary(summary):
    made, _ = summary
    # The second half are iterations 3 and 4: (0.02 + 0.03) / 2 and (2 + 3) / 2.
    assert made["ratio_variance_second_half"] == pytest.approx(0.025)
    assert made["second_half_variance_coef"] == pytest.approx(2.5)
    assert made["rollout_tokens_per_second"] == pytest.approx(800 / 8)
    assert made["update_tokens_per_second"] == pytest.approx(1600 / 16)
    assert (made["retained"], made["restoring"]) == (pytest.approx((0.2 + 0.3) / 2), 2.0)
    assert (made["adaptive"], made["variance_budget"], made["final_variance_coef"]) == (True, 0.01, 3.0)
    assert (made["base_pass_at_16"], made["final_pass_at_1"], made["num_updates"]) == (0.9, 0.5, 16)


@pytest.mark.parametrize(("name", "coef"), [("r2vpo_fixed", 3.0), ("ppo_clip", 0.0)])
def test_a_summary_has_a_budget_only_if_it_is_adaptive(name, coef, tiny_config, tmp_path):
    """An objective without a multiplier has none in its rows either."""
    rows, others = rows_and_arguments()
    if not coef:
        rows = [{key: value for key, value in row.items() if not key.startswith("dual/")} for row in rows]
    made = run_summary.summarize(tiny_config(objective={"name": name}), rows, **others)
    assert (made["adaptive"], made["variance_budget"], made["final_variance_coef"]) == (False, None, coef)
    assert "budget" not in run_summary.table(made)
    if not coef:  # drawn without the curve of a multiplier
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict(tiny_config(objective={"name": name}))))
        report.write(tmp_path, made, rows)
        assert report.read_summary(tmp_path) == made


def test_report_files_and_rewrite(summary, tiny_config, tmp_path):
    made, rows = summary
    with pytest.raises(ValueError, match="does not hold a finished run"):
        report.rewrite(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(tiny_config())))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report.write(tmp_path, made, rows)
    assert report.read_summary(tmp_path) == made
    text = run_summary.table(made)
    assert "0.500 [0.200, 0.300]" in text
    assert "1+2= | 3<eos> | 3<eos>" in text
    assert "25 % retained, restoring 200 %" in text
    assert "retained" not in run_summary.table(made | {"retained": None, "restoring": None})
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "3&lt;eos&gt;" in page, "model output is escaped"
    assert report.rewrite(tmp_path) == text


def drawn(made, rows, draw):
    figure = Figure(figsize=(8, 4), layout="constrained")
    draw(figure, made, rows)
    return figure.axes


def test_the_two_panels_say_what_they_show(summary):
    made, rows = summary
    left, right, second = drawn(made, rows, figures._draw_summary)
    assert (left.get_ylabel(), right.get_ylabel(), second.get_ylabel()) == ("pass@1", "V = E[(r − 1)²]", "multiplier λ")
    assert all(ax.get_title() and ax.get_xlabel() for ax in (left, right))
    curves = {line.get_label(): line.get_xydata() for ax in (left, right, second) for line in ax.get_lines()}
    assert curves["validation pass@1"].tolist() == [[0.064, 0.75]]
    assert curves["multiplier λ"].tolist() == [[1, 0], [2, 1], [3, 2], [4, 3]]
    assert curves["budget δ"][0, 1] == made["variance_budget"]
    # Four iterations are fewer than the ten of the running mean: one point, the mean of all.
    assert curves["V, mean of 4 iterations"][:, 1] == pytest.approx([0.015])


def test_a_figure_without_a_multiplier_has_neither_budget_nor_second_axis(summary):
    made, rows = summary
    rows = [{name: value for name, value in row.items() if not name.startswith("dual/")} for row in rows]
    _, right = drawn(made | {"variance_budget": None, "adaptive": False}, rows, figures._draw_summary)
    assert right.get_title() == "Ratio variance V"
    assert not [line for line in right.get_lines() if "budget" in line.get_label()]


def test_the_nine_panels_have_titles_and_axis_names(summary):
    axes = drawn(*summary, figures._draw_curves)
    assert len(axes) == 9
    assert all(ax.get_title() and ax.get_ylabel() for ax in axes)
    assert len([ax for ax in axes if ax.get_xlabel() == "iteration (rollout batch)"]) == 8, "one has bars"
    assert list(figures._KINDS_OF_TOKENS) == list(ratio_stats.SPLITS[1:])
