"""scripts/benchmarks: the workloads' arrays and least work, the lengths that weights draw, tables, refusals."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from r2vpo_jax import models
from r2vpo_jax.training.learner import Learner
from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "scripts"))

import benchmark
from benchmarks import programs, report, subjects, workloads
from references import environments

CEILINGS = {"flops_per_second": 1e12, "bytes_per_second": 1e9}


def test_every_workload_is_one_that_the_configuration_takes():
    for platform in ("cpu", "gpu"):
        for name in workloads.NAMES:
            for tiny in (False, True):
                if platform == "cpu" and name in workloads.LARGE and not tiny:
                    continue
                workload = workloads.get(name, platform, tiny=tiny)
                ours = programs.Programs(workload, Learner)
                if tiny:
                    continue
                total = sum(x.size for x in jax.tree.leaves(models.abstract_params(ours.model)))
                tables = workload.vocab_size * workload.hidden_size * (1 if workload.tie_word_embeddings else 2)
                counted = workload.layer_parameters + tables + workload.hidden_size
                assert total == counted, (platform, name, tiny)


def test_large_workloads_are_refused_on_a_cpu():
    for name in workloads.LARGE:
        with pytest.raises(ValueError, match=f"{name} needs an accelerator.*--tiny"):
            workloads.get(name, "cpu")
    with pytest.raises(ValueError, match="no workload '3b'; cpu-reference"):
        workloads.get("3b", "gpu")


def test_lengths_are_log_normal_with_a_mean_of_a_quarter():
    workload = workloads.get("long-tail", "gpu")
    probabilities = workloads.length_probabilities(workload)
    lengths = np.arange(1, workload.response_size + 1)
    assert probabilities.sum() == pytest.approx(1)
    below = probabilities[:-1].sum()
    assert 0.98 < below < 0.99  # the rest is cut at the maximum
    draws = np.random.default_rng(0).lognormal(
        np.log(workload.response_size / 4) - workloads.SIGMA**2 / 2, workloads.SIGMA, 10**6
    )
    assert draws.mean() == pytest.approx(workload.response_size / 4, rel=0.01)
    cut = np.clip(np.round(draws), 1, workload.response_size)
    assert np.sum(probabilities * lengths) == pytest.approx(cut.mean(), rel=0.005)
    found = np.bincount(cut.astype(int), minlength=workload.response_size + 1)[1:] / len(draws)
    assert np.abs(np.cumsum(found) - np.cumsum(probabilities)).max() < 0.003


def test_weights_draw_the_lengths():
    workload = workloads.get("long-tail", "cpu", tiny=True)
    workload = dataclasses.replace(workload, num_prompts=64, prompts_at_once=64, num_layers=1)
    ours = programs.Programs(workload, Learner)
    rollout = ours._generate(ours._params())
    assert not rollout.truncated.any()
    for length, tokens in zip(rollout.response_length, rollout.response_tokens, strict=True):
        assert tokens[:length].tolist() == list(range(length - 1, -1, -1))
    expected = 512 * workloads.length_probabilities(workload)
    counts = np.bincount(rollout.response_length, minlength=workload.response_size + 1)[1:]
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    assert np.sum((counts - expected) ** 2 / expected) < 35  # chi squared with 10 degrees of freedom: p = 1e-4


def test_the_length_of_segments_reaches_the_sampler(monkeypatch):
    given = []
    monkeypatch.setattr(programs.sampler, "generate", lambda *_, **options: given.append(options["segment_length"]))
    ours = programs.Programs(workloads.get("long-tail", "cpu", tiny=True), Learner, [("sampler.segment_length", 16)])
    ours._generate({})
    assert given == [ours.describe()["sampler.segment_length"]] == [16]


def test_least_work_of_full_and_of_ragged_rows():
    workload = workloads.get("1.5b", "gpu")
    rows = np.full(workload.update_rows, workload.response_size)
    layers, width = 28, 12 * 128
    tokens, responses = 64 * 768, 64 * 512
    expected = (
        2 * tokens * workload.layer_parameters + 2 * responses * 151_936 * 1536 + 2 * layers * width * 64 * 768**2
    )
    assert workloads.forward_flops(workload, 256, rows) == pytest.approx(expected)
    assert workloads.forward_flops(workload, 256, rows[:32]) == pytest.approx(expected / 2)
    # A step reads 3.1 GB of weights and, filled by half, 2.1 GB of keys and values: 1.97 ms at 2,646 GB/s.
    full = workloads.rollout_bytes(workload, np.full(256, 512))
    assert full / 512 / 2.646e12 == pytest.approx(1.97e-3, rel=0.01)
    # Half of the rows at half of the length: as many steps, fewer keys and values.
    short = np.where(np.arange(256) % 2, 512, 256)
    assert 0.5 < workloads.rollout_bytes(workload, short) / full < 1


def test_lines_tables_and_files(tmp_path):
    workload, path = workloads.get("cpu-reference", "cpu"), tmp_path / "results.json"
    facts = {"tokens": 8192, "lengths": [64] * 128, "first_seconds": 5.0, "peak_bytes": None}
    ours = report.record(workload, "rollout", subjects.OURS, facts, [2.0, 1.0, 9.0], CEILINGS)
    assert (ours["seconds"], ours["tokens_per_second"], ours["ms_per_step"]) == (2.0, 4096.0, 31.25)
    assert ours["compile_seconds"] == 3.0
    assert ours["bandwidth_share"] == workloads.rollout_bytes(workload, facts["lengths"]) / 1e9 / 2
    # Another one that took twice as long for half of the tokens.
    theirs = report.record(workload, "rollout", "other", facts | {"tokens": 4096}, [4.0, 4.0, 4.0], CEILINGS)
    results = report.Report({"workload": workload.name}, str(path), str(tmp_path / "results.md"))
    results.add([ours, theirs])
    stored = json.loads(path.read_text())["results"]
    assert [line["speed"] for line in stored] == [1.0, 0.25]
    assert stored[1]["speed_by_round"] == [0.25, 0.125, 1.125]
    update = report.record(workload, "update", subjects.OURS, facts | {"compile_seconds": 7.0}, [2.0], CEILINGS)
    assert update["mfu"] == 3 * workloads.forward_flops(workload, 32, facts["lengths"]) / 1e12 / 2
    assert (update["compile_seconds"], update["bandwidth_share"]) == (7.0, None)
    results.add([update])
    assert len(results.markdown().splitlines()) == 5
    assert (tmp_path / "results.md").read_text() == results.markdown() + "\n"
    assert {line.count("|") for line in results.markdown().splitlines()} == {len(report.COLUMNS) + 1}


def refused(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    for of_the_process in ("share_memory", "forget_compiled"):  # they would outlast the test
        monkeypatch.setattr(subjects, of_the_process, lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    return str(stopped.value)


def test_refusals_come_before_any_work(capsys, monkeypatch):
    tiny = ("cpu-reference", "--tiny")
    for arguments, message in {
        ("0.5b",): "0.5b needs an accelerator (JAX finds a CPU only); --tiny runs the same programs in small",
        (*tiny, "--programs=rollout,sampling"): "--programs: sampling is none of rollout, scoring, update, iteration",
        (
            *tiny,
            "--json=/no/such/folder/x.json",
        ): "cannot write results: [Errno 2] No such file or directory: '/no/such/folder/x.json.part'",
        (*tiny, "--rounds=0"): "--rounds=0 must be at least 1",
        (*tiny, "--set=trainer.speed=2"): "the configuration has no field trainer.speed",
        (*tiny, "--set=trainer.micro_batch_size"): "--set=trainer.micro_batch_size must be NAME=VALUE",
        (*tiny, "--against=no-such-revision"): "--against=no-such-revision: fatal: invalid reference: no-such-revision",
    }.items():
        assert refused(capsys, monkeypatch, *arguments) == message


def test_a_worker_that_fails_says_why():
    command = [sys.executable, "-c", "import sys; input(); sys.exit('no such device')"]
    worker = subjects.Worker("other", command, environments.clean_environment(), ("rollout",))
    assert worker.can("rollout")
    assert not worker.can("scoring")
    with pytest.raises(environments.EnvironmentFailedError, match="^other, prepare rollout: no such device$"):
        worker.prepare("rollout")
    worker.close()
