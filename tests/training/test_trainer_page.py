"""The page of a run and what it shows, through the real train(): written while it goes on, the same after a stop."""

import numpy as np
import pytest

from r2vpo_jax.run import files
from r2vpo_jax.run.pages import times
from r2vpo_jax.run.pages.reader import Reader
from r2vpo_jax.training.trainer import train
from tests.helpers.compilations import compilations
from tests.helpers.runs import assert_same_run, rows, stop, train_rows

TOKENS = ("token_texts", "log_ratios", "kept")
TRAINER = {"num_iterations": 5, "report_every": 2, "samples_per_iteration": 3}


@pytest.fixture(scope="module")
def stopped(tiny_config, tmp_path_factory):
    """(workdir, iterations as they were seen) of a run that was stopped after three, and whose page was kept after each."""
    workdir, seen, pages = tmp_path_factory.mktemp("page") / "run", [], {}
    page = workdir / "report" / "report.html"

    def observe(iteration):
        seen.append((iteration, float(iteration.state.dual.variance_coef)))
        pages[iteration.number] = page.read_text() if page.exists() else None

    stop(tiny_config(trainer=TRAINER), workdir, 3, on_iteration=observe)
    return workdir, seen, pages


def test_the_page_is_written_while_the_run_goes_on(stopped):
    """It is there after iterations 1 and 2, and at the stop; an observer sees that of the iteration before."""
    workdir, _, pages = stopped
    assert pages[1] is None
    assert "iteration 1 of 5" in pages[2]
    assert "iteration 2 of 5" in pages[3]
    assert "http-equiv='refresh'" in pages[3]
    last = (workdir / "report" / "report.html").read_text()
    assert "<b>stopped</b> after iteration 3 of 5" in last
    assert "http-equiv='refresh'" not in last
    for shown in ("Reward", "Ratio variance", "Where the time goes", "kept of the gradient", "keeps "):
        assert shown in last, shown
    assert not list((workdir / "report").glob("*.tmp"))


def test_samples_say_what_was_done_to_each_token(stopped, tiny_config, tiny_model, mesh):
    """Against R²VPO's formula, from the ratios; and the ratios of the noise-free first batch move with the updates."""
    workdir, seen, _ = stopped
    lines = rows(workdir, "samples")
    told = {i: [line for line in lines if line["iteration"] == i and "kept" in line] for i in (1, 2, 3)}
    assert {i: len(found) for i, found in told.items()} == {1: 3, 2: 3, 3: 0}, "the first iteration, then every second"
    assert [line["iteration"] for line in lines] == [1] * 3 + [2] * 3 + [3] * 3
    at_stake = 0
    for (iteration, coef), found in zip(seen, told.values(), strict=False):
        for line in found:
            assert "".join(line["token_texts"]) == line["response"]
            assert len({len(line[name]) for name in TOKENS}) == 1
            assert (line["age"], line["learned"]) == (4, True)
            (at,) = [
                i
                for i, row in enumerate(iteration.batch.advantage)
                if iteration.batch.group_id[i] == line["problem"]
                and row == np.float32(line["advantage"])
                and iteration.batch.response_length[i] == len(line["kept"])
            ][:1]
            assert np.abs(line["log_ratios"]).max() > 1e-4, "four updates were made on it"
            advantage = iteration.batch.advantage[at]
            if advantage == 0:
                assert set(line["kept"]) == {None}
                continue
            at_stake += 1
            expected = 1 - 2 * coef * np.expm1(line["log_ratios"]) / advantage
            np.testing.assert_allclose(line["kept"], expected, rtol=1e-4, atol=1e-5)
    assert at_stake, "some have a gradient"


def test_all_seconds_are_accounted_for(stopped):
    found = train_rows(stopped[0])
    for row in found:
        spent = times.of_loop(row)
        assert sum(spent.values()) == pytest.approx(row["time/iteration"])
        assert spent["rollout"] > 0
        assert spent["update"] > 0
    assert found[1]["time/report"] > 0, "the page after the first iteration"
    assert found[2]["time/evaluation"] > 0, "the validation after the second"
    assert found[2]["time/checkpoint"] > 0
    assert sum(row["time/iteration"] for row in found) < found[-1]["time/run"]


def test_it_goes_on_as_if_it_had_not_stopped(stopped, tiny_config, tiny_model, mesh, tmp_path):
    """Samples and their tokens too; nothing is compiled after the first iteration of a process, though a page is due then."""
    workdir, config, by_iteration = stopped[0], tiny_config(trainer=TRAINER), []
    with compilations() as compiled:
        train(config, workdir, on_iteration=lambda _: by_iteration.append(len(compiled)))
    assert by_iteration[1] == by_iteration[0]
    train(config, tmp_path / "whole")
    assert_same_run(workdir, tmp_path / "whole", config, tiny_model, mesh)
    page = (workdir / "report" / "report.html").read_text()
    assert "<b>finished</b> after iteration 5 of 5" in page
    assert page.count("data:image/png;base64,") == 2
    history = Reader(workdir).read()
    assert [i for i, _ in history.samples] == [4, 2, 1]
    assert [row["iteration"] for row in history.iterations] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_with_a_lag_what_was_learned_from_is_shown_too(tiny_config, tmp_path):
    """And it is as old as the lag makes it. The times of an overlapped run add up all the same."""
    lagged = {"lag": 2, "overlap": True}
    config = tiny_config(
        replay=lagged, trainer={"report_every": 1, "num_iterations": 4}, objective={"name": "ppo_clip"}
    )
    train(config, tmp_path)
    lines = rows(tmp_path, "samples")
    told = [line for line in lines if "kept" in line]
    assert [line["iteration"] for line in told] == [3, 3, 4, 4], "the queue fills for two iterations"
    # Sampled before any update, and after none of those of iteration 3; four updates an iteration.
    assert [line["age"] for line in told] == [4, 4, 8, 8]
    assert {x for line in told for x in line["kept"] if x is not None} <= {0.0, 1.0}
    assert len(lines) == len(told) + 8
    for row in files.read_jsonl(tmp_path / "metrics.jsonl"):
        if row["kind"] != "evaluation":
            assert row["time/beside"] > 0
            assert sum(times.of_loop(row).values()) == pytest.approx(row["time/iteration"])


def test_without_pages_there_is_only_the_last(tiny_config, tmp_path):
    stop(tiny_config(trainer={"report_every": 0}), tmp_path, 1)
    assert not (tmp_path / "report").exists()
    assert not [line for line in rows(tmp_path, "samples") if "kept" in line]
