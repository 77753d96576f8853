"""The training loop, through the real train(): what it leaves behind."""

import json
import math

import jax
import numpy as np
from transformers import AutoTokenizer

from r2vpo_jax import models
from r2vpo_jax.evaluation import exports
from r2vpo_jax.run import files
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.tasks.arithmetic import SYMBOLS
from r2vpo_jax.training.collector import Collector
from tests.helpers.runs import final_state, rows, stop, undocumented

NUM_ITERATIONS, ROWS, UPDATES = 4, 16, 4  # of the tiny run


def test_the_summary_has_what_comparisons_need(finished_run, tiny_config):
    workdir, summary, watched = finished_run
    assert json.loads((workdir / "report" / "summary.json").read_text()) == summary
    expected = {
        "objective": "r2vpo",
        "seed": 0,
        "num_eval_problems": 16,
        "num_rollouts": NUM_ITERATIONS * ROWS,
        "num_updates": NUM_ITERATIONS * UPDATES,
        "variance_budget": tiny_config().objective.dual.budget,
    }
    assert expected.items() <= summary.items()
    scores = ["base_pass_at_1", "final_pass_at_1", "best_pass_at_1", "final_validation_pass_at_1"]
    scores += ["base_pass_at_16", "final_pass_at_16"]
    assert all(0 <= summary[name] <= 1 for name in scores)
    for which in ("base", "final"):
        low, high = summary[f"{which}_pass_at_1_interval"]
        assert low <= summary[f"{which}_pass_at_1"] <= high
    for name in ("train_seconds", "rollout_tokens_per_second", "update_tokens_per_second", "final_variance_coef"):
        assert summary[name] > 0
    assert [summary["noise_floor_ratio_second_moment"]] == watched.floors
    assert watched.floors[0] < 1e-6  # 0 where sampling and scoring round alike
    assert summary["ratio_variance_second_half"] > 1e-5
    train_rows = [row for row in rows(workdir) if row["kind"] == "train"]
    mean = np.mean([row["ratio/variance_after"] for row in train_rows[2:]])
    np.testing.assert_allclose(summary["ratio_variance_second_half"], mean)
    assert summary["final_variance_coef"] == train_rows[-1]["dual/variance_coef"]
    assert summary["num_rollout_tokens"] == train_rows[-1]["rollout_tokens"]
    assert summary["best_pass_at_1"] >= summary["final_validation_pass_at_1"]


def test_the_directory_holds_nothing_else(finished_run):
    names = {path.name for path in finished_run[0].iterdir()}
    assert names == {"config.json", "metrics.jsonl", "events.jsonl", "samples.jsonl", "checkpoints", "report", "hf"}
    assert [row["event"] for row in rows(finished_run[0], "events")] == ["start"]


def test_rows_come_one_an_iteration_and_one_an_evaluation(finished_run):
    order = [(row["kind"], row["iteration"], row.get("split")) for row in rows(finished_run[0])]
    assert order == [
        ("evaluation", 0, "test"),
        ("evaluation", 0, "validation"),
        ("train", 1, None),
        ("train", 2, None),
        ("evaluation", 2, "validation"),
        ("train", 3, None),
        ("train", 4, None),
        ("evaluation", 4, "validation"),
        ("evaluation", 4, "test"),
    ]


def test_metrics_have_fixed_names_and_are_numbers(finished_run):
    train_rows = [row for row in files.read_jsonl(finished_run[0] / "metrics.jsonl") if row["kind"] == "train"]
    assert len({tuple(row) for row in train_rows}) == 1
    for row in train_rows:
        for name, value in row.items():
            # Where a clip would cut nothing, there is no share of it to retain.
            assert name == "kind" or isinstance(value, (int, float)) or (name.startswith("keeps/re") and value == "nan")
            assert value in ("train", "nan") or math.isfinite(value), (name, value)
    assert [row["version"] for row in train_rows] == [UPDATES * i for i in range(1, NUM_ITERATIONS + 1)]
    assert [row["rollouts"] for row in train_rows] == [ROWS * i for i in range(1, NUM_ITERATIONS + 1)]
    # The first minibatch of each iteration is on-policy, up to the noise floor; the last is not.
    assert all(row["ratio/variance_first"] < 1e-6 < row["ratio/variance"] for row in train_rows)
    assert len({row["dual/variance_coef"] for row in train_rows}) == NUM_ITERATIONS, "the multiplier moves"
    for row in train_rows:
        assert row["dual/signal"] == row["ratio/variance_after"] != row["ratio/variance"]
        assert row["dual/constraint_violation"] == row["dual/signal"] - 0.01


def test_samples_are_readable(finished_run, task):
    written = rows(finished_run[0], "samples")
    assert [row["iteration"] for row in written] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [row["version"] for row in written] == [0, 0, 4, 4, 8, 8, 12, 12]
    for half in (written[::2], written[1::2]):
        problems = task.problems("train", np.array([row["problem"] for row in half]))
        prompts = [task.decode(tokens[-n:]) for tokens, n in zip(problems.tokens, problems.length, strict=True)]
        assert [row["prompt"] for row in half] == prompts
    for row in written:
        assert set(row["response"].removesuffix("<eos>")) <= set("0123456789+=c-;<pad>")
        assert row["reward"] == (row["outcome"] == "right")


def test_the_exported_directory_opens(finished_run, tiny_config, tiny_model, mesh):
    path = finished_run[0] / "hf"
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert len(tokenizer) == len(SYMBOLS)
    assert tokenizer("12+3=", add_special_tokens=False)["input_ids"] == [3, 4, 12, 5, 13]
    model, params = models.from_pretrained(path, num_tokens=len(tokenizer))
    assert model.config == tiny_model[0].config
    state, _ = final_state(finished_run[0], tiny_config(), tiny_model, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert np.any(params["embed"] != tiny_model[1]["embed"]), "nothing was learned"


def test_the_last_checkpoint_exports_to_the_same_directory(finished_run, tmp_path):
    workdir, summary, _ = finished_run
    exports.export(str(workdir), "last", tmp_path / "hf", say=lambda _: None)
    ours, theirs = ({f.name: f.read_bytes() for f in path.iterdir()} for path in (tmp_path / "hf", workdir / "hf"))
    assert ours == theirs
    assert 0 <= summary["unchanged_weights"] < 0.5


def test_nothing_compiles_after_the_first_iteration(finished_run):
    """Prompts and responses are ragged, the shapes are not."""
    workdir, _, watched = finished_run
    lengths = {row["response/length"] for row in rows(workdir) if row["kind"] == "train"}
    assert len(lengths) > 1
    assert watched.by_iteration[0], "the count does not count"
    assert watched.by_iteration[1:] == [[]] * (NUM_ITERATIONS - 1)


def test_an_observer_sees_each_iteration(tiny_config, tiny_model, tmp_path):
    """Everything that one iteration has made, before the next begins."""
    seen = []

    def observe(iteration):
        assert rows(tmp_path / "run")[-1]["iteration"] == iteration.number
        seen.append(iteration)
        versions.append(int(iteration.state.version))

    versions = []
    stop(tiny_config(), tmp_path / "run", 2, on_iteration=observe)
    assert [iteration.number for iteration in seen] == [1, 2]
    assert versions == [UPDATES, 2 * UPDATES]
    train_lines = [row for row in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    for iteration, line in zip(seen, train_lines, strict=True):
        assert {k: "nan" if v != v else v for k, v in iteration.row.items()} == line
        assert iteration.collected.num_problems == ROWS // 4
        np.testing.assert_array_equal(iteration.batch.rollout_id, iteration.collected.rollout.rollout_id)
        assert iteration.drawn == [iteration.batch]
        (report,) = iteration.reports
        assert float(report.variance_last) == line["ratio/variance"]
        assert float(report.variance_first) == line["ratio/variance_first"]
        np.testing.assert_array_equal(report.skipped, np.zeros(UPDATES))


# ---- the order of the problems ----


def test_problems_are_a_function_of_seed_and_position(tiny_config, tiny_model, task, mesh):
    def index(position, seed=0):
        return Collector(tiny_config(seed=seed), task, tiny_model[0], mesh, Timers()).problem_index(position)

    seen = np.concatenate([index(i) for i in range(0, 20, 4)])
    np.testing.assert_array_equal(seen, np.arange(20))
    others = [index(4 * i, seed) for seed in (1, 2, 1023) for i in (0, 1, 10**6)]
    assert len(np.unique(np.concatenate([seen, *others]))) == 20 + 9 * 4
    assert max(o.max() for o in others) < 2**30, "indices fit into int32"


def test_every_metric_is_documented(finished_run):
    assert not undocumented(name for row in files.read_jsonl(finished_run[0] / "metrics.jsonl") for name in row)
