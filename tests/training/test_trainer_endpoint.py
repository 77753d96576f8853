"""Runs whose rollouts are sampled by a server: our own sampler, through loopback."""

import json
import threading

import jax
import numpy as np
import pytest

from r2vpo_jax.errors import EngineError, UsageError
from r2vpo_jax.training import overlapped
from r2vpo_jax.training.trainer import train
from tests.helpers import processes
from tests.helpers.engines import MODELS, served, stub
from tests.helpers.runs import rows, train_rows, undocumented

QUICK = {
    "num_iterations": 3,
    "eval_every": 9,
    "checkpoint_every": 9,
    "eval_problems": 4,
    "eval_samples": 4,
    "test_problems": 4,
    "test_samples": 4,
}
# With Adam's own epsilon the gradient of a minibatch without advantages, which is rounding, becomes steps of full size.
CALM = {"epsilon": 1e-2}


@pytest.fixture(scope="module")
def configure(tiny_config):
    def make(server=None, *, trainer=None, optimizer=None, objective=None, replay=None, policy=None, **endpoint):
        there = (
            {}
            if server is None
            else {"engine": "endpoint", "endpoint": {"url": server.url, "patience": 2.0} | endpoint}
        )
        return tiny_config(
            trainer=QUICK | (trainer or {}), optimizer=CALM | (optimizer or {}), evaluation={"batch_size": 64},
            sampler=there, objective=objective or {}, replay=replay or {}, model=policy or {},
        )  # fmt: skip

    return make


@pytest.fixture
def server(tiny_checkpoint):
    with served(tiny_checkpoint) as made:
        yield made


class Watched:
    """What each iteration has sampled, and its parameters."""

    def __init__(self):
        self.batches, self.params = [], None

    def __call__(self, iteration):
        self.batches.append(iteration.batch)
        self.params = jax.device_get(iteration.state.params)


def watched(config, workdir, **settings):
    seen, said = Watched(), []
    train(config, workdir, on_iteration=seen, say=said.append, **settings)
    return seen, said


@pytest.fixture(scope="module")
def own(configure, tmp_path_factory):
    """(run directory, Watched) of a run that samples itself."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    return workdir, watched(configure(), workdir)[0]


def assert_same_rollouts(found, expected):
    for number, (batch, other) in enumerate(zip(found.batches, expected.batches, strict=True)):
        for name in ("tokens", "response_length", "reward", "advantage", "group_id", "rollout_id", "version"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), err_msg=f"{number} {name}")
        np.testing.assert_allclose(batch.behavior_logp, other.behavior_logp, atol=1e-4)


@pytest.mark.slow
def test_a_run_through_a_server_samples_what_it_would_sample_itself(own, server, configure, tmp_path):
    """The same tokens in every iteration, so the server has had the weights of each; and the policy, to rounding."""
    found, said = watched(configure(server), tmp_path / "run")
    assert_same_rollouts(found, own[1])
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(own[1].params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert any(line == f"rollouts: sampled by policy at {server.url}; scores are sampled here" for line in said)
    trained = train_rows(tmp_path / "run")
    assert [row["engine/requests"] for row in trained] == [16] * 3
    assert [row["engine/weights_age"] for row in trained] == [0] * 3
    new = set(trained[0]) - set(train_rows(own[0])[0])
    assert {name.partition("/")[0] for name in new} == {"engine", "time", "throughput"}
    assert not undocumented(new)
    scores = [[row["pass_at_1"] for row in rows(path) if "pass_at_1" in row] for path in (tmp_path / "run", own[0])]
    assert scores[0] == scores[1]
    (published,) = (tmp_path / "run" / "published").iterdir()
    assert published.name == "version_00000008", "of the weights that the last rollouts are of, and no others are left"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sampler"]["endpoint"]["url"] == server.url


@pytest.mark.slow
def test_a_run_goes_on_with_a_server_that_has_forgotten_its_weights(own, tiny_checkpoint, configure, tmp_path):
    """One is killed in the middle: the run says so, is saved as it was, and goes on with another at another address."""
    workdir, seen = tmp_path / "run", Watched()
    with served(tiny_checkpoint) as first:

        def kill(iteration):
            seen(iteration)
            if iteration.number == 2:
                first.close()
                first.close = lambda: None

        with pytest.raises(
            EngineError, match="does not answer POST .* then the same command goes on from the last checkpoint"
        ):
            train(configure(first, patience=0.5), workdir, on_iteration=kill)
    assert (workdir / "checkpoints" / "2").is_dir(), "saved where it was, though no checkpoint was due"
    with served(tiny_checkpoint) as second:
        said = []
        train(configure(second), workdir, on_iteration=seen, say=said.append)
    assert f"continuing {workdir} from iteration 2" in said
    assert any(line.startswith("going on with other settings: ") and "sampler.endpoint.url: " in line for line in said)
    assert_same_rollouts(seen, own[1])


@pytest.mark.slow
def test_a_server_may_sample_beside_learning(server, configure, tmp_path):
    replay = {"lag": 1}
    in_turns, _ = watched(configure(replay=replay), tmp_path / "own")
    threads, beside = set(), configure(server, replay=replay | {"overlap": True})
    found = Watched()

    def on_iteration(iteration):
        threads.update(thread.name for thread in threading.enumerate() if thread.name.startswith("engine_"))
        found(iteration)

    train(beside, tmp_path / "run", on_iteration=on_iteration)
    assert_same_rollouts(found, in_turns)
    assert not threads, "nothing is asked between two iterations"
    assert [row.get("replay/age_mean") for row in rows(tmp_path / "run")] == [
        row.get("replay/age_mean") for row in rows(tmp_path / "own")
    ]


@pytest.mark.slow
def test_old_weights_are_stamped_as_such(server, configure, tmp_path):
    """Every second iteration: what is sampled between is as old as it says. Adapters are published merged."""
    settings = {"trainer": {"num_iterations": 4}, "optimizer": {"learning_rate": 0.03}, "policy": {"lora": {"rank": 2}}}
    config = configure(server, publish_every=2, publish_dir=str(tmp_path / "shared"), **settings)
    (tmp_path / "shared" / "run_of_someone" / "version_00000004").mkdir(parents=True)
    found, _ = watched(config, tmp_path / "run")
    assert [set(batch.version.tolist()) for batch in found.batches] == [{0}, {0}, {8}, {8}]
    trained = train_rows(tmp_path / "run")
    assert [row["engine/weights_age"] for row in trained] == [0, 4, 0, 4]
    assert [row["version"] for row in trained] == [4, 8, 12, 16]
    first = [row["ratio/variance_first"] for row in trained]
    assert max(first[0], first[2]) < 1e-9 < 1e-6 < min(first[1], first[3])
    ours, other = sorted((tmp_path / "shared").iterdir(), key=lambda path: path.name == "run_of_someone")
    assert [path.name for path in ours.iterdir()] == ["version_00000008"]
    assert [path.name for path in other.iterdir()] == ["version_00000004"], "what is another's is left alone"
    assert not (tmp_path / "run" / "published").exists()


CORRECTED = {"correction": {"mode": "truncate", "max_weight": 1.5, "filter": "geometric"}}


@pytest.mark.slow
def test_the_mismatch_of_a_server_is_measured_refused_and_corrected(tiny_checkpoint, configure, tmp_path):
    with served(tiny_checkpoint, weights="int8") as server:
        with pytest.raises(UsageError) as refused:
            train(configure(server), tmp_path / "refused")
        text = str(refused.value)
        assert f"The engine at {server.url} computes otherwise than the learner" in text
        assert "--logprobs-mode processed_logprobs" in text
        config = configure(server, trainer={"max_noise_floor": 1.0, "num_iterations": 2}, objective=CORRECTED)
        train(config, tmp_path / "run")
    floor = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())["noise_floor_ratio_second_moment"]
    trained = train_rows(tmp_path / "run")
    assert floor > 1e-6
    for row in trained:
        assert row["correction/weight_mean"] != 1.0
        assert 0 < row["correction/effective_sample_size"] <= 1.0
        assert "correction/left_out" in row


@pytest.mark.slow
def test_processes_ask_for_their_own_rows(own, server, config_file, tmp_path):
    """Two processes: each response is asked for once, by one of them, and is the one that it is on one process."""
    fields = {f"trainer.{name}": value for name, value in QUICK.items()} | {"optimizer.epsilon": CALM["epsilon"]}
    fields |= {"evaluation.batch_size": 64, "mesh.data": 2, "sampler.engine": "endpoint"}
    asked, submit = [], server._engine.submit
    server._engine.submit = lambda request: (asked.append(request.seed), submit(request))[1]
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    ended = processes.run(
        config_file, tmp_path / "run", 2, *flags, f"--config.sampler.endpoint.url={server.url}", heartbeat=60
    )
    assert "rollouts: sampled by policy" in ended[0].output
    assert "rollouts: sampled by policy" not in ended[1].output
    # The noise floor is measured on the responses of the first iteration.
    assert sorted(asked) == sorted([*asked[:16], *set(asked)]), "once each"
    assert len(asked) == 16 * 4
    trained, expected = train_rows(tmp_path / "run"), train_rows(own[0])
    assert [row["engine/requests"] for row in trained] == [16] * 3
    for name in ("rollout_tokens", "reward/mean", "response/length", "response/length_max"):
        assert [row[name] for row in trained] == [row[name] for row in expected], name
    assert [path.name for path in (tmp_path / "run" / "published").iterdir()] == ["version_00000008"]


def test_what_cannot_work_is_refused_before_weights_are_read(configure, tmp_path, monkeypatch):
    def refusal(answer, workdir="run", **settings):
        with stub(answer) as server, pytest.raises((UsageError, EngineError)) as refused:
            train(configure(server, patience=0.2, **settings), tmp_path / workdir)
        assert not (tmp_path / "run").exists()
        return str(refused.value)

    monkeypatch.setattr("r2vpo_jax.models.base.BaseModel.load_params", lambda *_: pytest.fail("weights are read"))
    assert "does not serve sampler.endpoint.model=other" in refusal(lambda *_: (200, MODELS, {}), model="other")
    short = {"data": [MODELS["data"][0] | {"max_model_len": 10}]}
    assert "takes 10 tokens of prompt and response together" in refusal(lambda *_: (200, short, {}))
    assert "does not answer GET /v1/models" in refusal(lambda *_: (503, b"", {}))
    with_store = refusal(lambda *_: (200, MODELS, {}), publish_dir="gs://bucket/weights")
    assert "weights cannot be published in gs://bucket/weights" in with_store


def test_several_processes_do_not_sample_beside_learning_by_a_server(configure, mesh, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    class Nowhere:
        url = "http://127.0.0.1:1"

    with pytest.raises(
        ValueError, match="replay.overlap with sampler.engine=endpoint is for one process, and there are 2"
    ):
        overlapped.check(configure(Nowhere, replay={"lag": 1, "overlap": True}), mesh, mesh)
