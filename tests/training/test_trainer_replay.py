"""Training from the replay buffer."""

import jax
import numpy as np
import pytest

from r2vpo_jax.run import files
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.trainer import train
from tests.helpers.runs import rows, undocumented

UPDATES, BATCH = 4, 16  # of the tiny run: updates a batch, rollouts a batch
QUICK = {
    "eval_every": 9,
    "checkpoint_every": 9,
    # The same shapes as training batches: one sampler is compiled for all three splits.
    "eval_problems": 4,
    "eval_samples": 4,
    "test_problems": 4,
    "test_samples": 4,
}
SCORES = {"batch_size": 64}
BEFORE = {"name": "r2vpo_before"}  # what the multiplier is given can be read off the row
DRAWS = ("uniform", "mixed", "priority")


class Run:
    """A tiny run: its rows by kind, and every batch that the learner was given.

    `noise` is added to the log-probabilities of the sampler that the learner is given.
    """

    def __init__(self, workdir, config, noise=0.0):
        self.batches, learn = [], Learner.train_on_rollout

        def spy(learner, state, rollout, key):
            now = int(state.version)
            self.batches.append((now, jax.tree.map(np.asarray, rollout)))
            return learn(learner, state, rollout.replace(behavior_logp=rollout.behavior_logp + noise), key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "train_on_rollout", spy)
            self.summary = train(config, workdir)
        self.workdir, self.config = workdir, config
        self.by_iteration = [row for row in rows(workdir) if row["kind"] != "evaluation"]
        self.trained = [row for row in self.by_iteration if row["kind"] == "train"]

    def ids(self):
        return [batch.rollout_id for _, batch in self.batches]


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """Makes runs, each once: `run(iterations, objective, **replay)`."""
    made = {}

    def get(num_iterations, objective=None, noise=0.0, **replay):
        key = repr((num_iterations, objective, noise, replay))
        if key not in made:
            trainer = QUICK | {"num_iterations": num_iterations}
            config = tiny_config(trainer=trainer, evaluation=SCORES, replay=replay, objective=objective or {})
            made[key] = Run(tmp_path_factory.mktemp("run") / "run", config, noise)
        return made[key]

    return get


def test_train_with_lag_fills_the_queue_first(run):
    """Lag 2 in 6 iterations: 1 and 2 train nothing, 3 to 6 train on what 1 to 4 sampled."""
    lagged = run(6, lag=2)
    assert [row["kind"] for row in lagged.by_iteration] == ["fill"] * 2 + ["train"] * 4
    assert [row["iteration"] for row in lagged.by_iteration] == [1, 2, 3, 4, 5, 6]
    assert [row["rollouts"] for row in lagged.by_iteration] == [BATCH * i for i in range(1, 7)]
    assert [row["version"] for row in lagged.by_iteration] == [0, 0, 4, 8, 12, 16]
    np.testing.assert_array_equal(lagged.ids(), np.arange(4 * BATCH).reshape(4, BATCH))
    assert lagged.summary["num_updates"] == 4 * UPDATES
    assert lagged.summary["num_rollouts"] == 6 * BATCH


def test_train_with_lag_counts_ages_in_updates(run):
    """1 to 3 were sampled at version 0, 4 at 4; they are trained on at 0, 4, 8, 12: ages 0, 4, 8 = 2 * 4, and 8 again."""
    lagged = run(6, lag=2)
    assert [row["replay/age_mean"] for row in lagged.trained] == [0, 4, 8, 8]
    assert [row["replay/age_max"] for row in lagged.trained] == [0, 4, 8, 8]
    assert [(now, set((now - batch.version).tolist())) for now, batch in lagged.batches] == [
        (0, {0}), (4, {4}), (8, {8}), (12, {8})
    ]  # fmt: skip
    assert [row["replay/batches"] for row in lagged.by_iteration] == [1, 2, 3, 3, 3, 3]
    assert [row["replay/evicted"] for row in lagged.by_iteration] == [0, 0, 0, 1, 2, 3]
    # Two epochs over each batch; all that was sampled so far.
    tokens = np.cumsum([2 * batch.response_length.sum() for _, batch in lagged.batches])
    sampled = np.array([row["rollout_tokens"] for row in lagged.trained])
    np.testing.assert_allclose([row["replay/ratio"] for row in lagged.trained], tokens / sampled)
    assert [row["replay/ratio"] for row in lagged.by_iteration[:2]] == [0, 0]


def test_train_metrics_of_replay_are_documented(run):
    lagged = run(6, lag=2)
    fill, trained = set(lagged.by_iteration[0]), set(lagged.trained[0])
    assert fill < trained
    names = {name for name in trained if name.startswith("replay/")}
    assert names <= fill
    assert len(names) == 8
    assert not undocumented(names)
    assert len({tuple(row) for row in lagged.trained}) == 1


def test_train_dual_signal_is_what_the_updates_added(run):
    """On stale data V of the last minibatch less V of the first; on fresh data V of the last."""
    lagged = run(6, BEFORE, lag=2)
    budget = lagged.config.objective.dual.budget
    coef = lagged.config.objective.dual.coef
    for row in lagged.trained:
        last, first = np.float32(row["ratio/variance"]), np.float32(row["ratio/variance_first"])
        assert row["dual/signal"] == last - first
        assert row["dual/constraint_violation"] == row["dual/signal"] - budget
        # c = 0.1; one move is at most 1, and lambda stays within its cap.
        coef = max(coef + 0.1 * (row["dual/signal"] / budget - 1), 0.0)
        np.testing.assert_allclose(row["dual/variance_coef"], coef, rtol=1e-5)
    assert lagged.trained[0]["ratio/variance_first"] < 1e-6, "the first batch is as old as the learner"
    for row in lagged.trained[1:]:
        assert row["ratio/variance_first"] > 1e-4
    # V of the first minibatch is that of noise of 0.01: large enough that subtracting it would show.
    fresh = run(1, BEFORE, noise=0.01)
    assert [row["dual/signal"] for row in fresh.trained] == [row["ratio/variance"] for row in fresh.trained]
    np.testing.assert_allclose(fresh.trained[0]["ratio/variance_first"], 1e-4, rtol=0.05)
    assert not any(name.startswith("replay/") for name in fresh.trained[0])
    assert not (fresh.workdir / "replay").exists()


def test_train_dual_signal_can_be_absolute_on_stale_data(run):
    absolute = run(4, BEFORE | {"dual": {"signal": "absolute"}}, lag=2)
    assert [row["dual/signal"] for row in absolute.trained] == [row["ratio/variance"] for row in absolute.trained]
    assert absolute.trained[1]["ratio/variance_first"] > 1e-4


def test_train_decoupled_starts_each_batch_at_a_ratio_of_1(run):
    """The correction moves the ratio's denominator to the learner's policy before its first update on the batch."""
    corrected, direct = run(4, {"correction": {"mode": "truncate"}}, lag=2), run(6, lag=2)
    old = corrected.trained[1]
    assert old["replay/age_mean"] == direct.trained[1]["replay/age_mean"] == 4
    assert old["ratio/variance_first"] < 1e-6
    assert direct.trained[1]["ratio/variance_first"] > 1e-4
    assert corrected.trained[0]["correction/effective_sample_size"] > 1 - 1e-6 > old["correction/effective_sample_size"]


@pytest.mark.parametrize("objective", ["ppo_clip", "policy_gradient"])
def test_train_replay_serves_other_objectives_alike(objective, run):
    """The same problems and, until the first update, the same responses; the draws differ in nothing."""
    replay = {"lag": 1, "capacity": 2, "draw": "mixed"}
    other, ours = (run(4, {"name": name}, **replay) for name in (objective, "r2vpo"))
    np.testing.assert_array_equal(other.ids(), ours.ids())
    assert [row["kind"] for row in other.by_iteration] == ["fill"] + ["train"] * 3
    assert other.trained[1]["replay/age_max"] == ours.trained[1]["replay/age_max"] > 0
    assert not any(name.startswith("dual/") for row in other.trained for name in row)
    assert all(np.isfinite(row["loss/total"]) for row in other.trained)
    assert other.trained[2]["loss/total"] != ours.trained[2]["loss/total"]


@pytest.mark.parametrize("draw", DRAWS)
def test_train_from_replay_twice_an_iteration(draw, run):
    """Two batches of 4 groups an iteration, each of 4 updates; the second is counted 4 updates older."""
    replayed = run(3, capacity=3, draw=draw, batches_per_iteration=2)
    assert [row["version"] for row in replayed.trained] == [8, 16, 24]
    assert replayed.summary["num_updates"] == 24
    assert [now for now, _ in replayed.batches] == [0, 4, 8, 12, 16, 20]
    for i, (_, batch) in enumerate(replayed.batches):
        ids = batch.rollout_id.reshape(4, 4)
        np.testing.assert_array_equal(ids, ids[:, :1] + np.arange(4))
        assert len(np.unique(ids)) == BATCH
        assert ids.max() < BATCH * (i // 2 + 1)
        np.testing.assert_array_equal(batch.version, 8 * (batch.rollout_id // BATCH))
    counts = np.bincount(np.concatenate(replayed.ids())[::4] // 4, minlength=12)  # uses of each of the 3 * 4 groups
    assert counts.sum() == 24
    assert replayed.trained[-1]["replay/uses_mean"] == 2
    assert replayed.trained[-1]["replay/uses_max"] == counts.max()
    # The last batch, at the beginning of its iteration, at version 16.
    age = 16 - replayed.batches[-1][1].version
    assert (replayed.trained[-1]["replay/age_mean"], replayed.trained[-1]["replay/age_max"]) == (age.mean(), age.max())
    if draw == "uniform":  # two draws of an iteration differ
        assert set(replayed.ids()[4].tolist()) != set(replayed.ids()[5].tolist())
    if draw == "mixed":  # 2 old groups and 2 fresh ones, which two draws share out
        fresh = [ids // 4 for ids in map(lambda b: b[::4], replayed.ids()[4:])]
        assert sorted(g for groups in fresh for g in groups if g >= 8) == [8, 9, 10, 11]
    if draw == "priority":  # of the groups to be had, none without advantage before all those with one are drawn
        for number, (_, batch) in enumerate(replayed.batches):
            seen = [b for _, b in replayed.batches[: number + 1]]
            flat = [np.all(b.advantage.reshape(4, 4) == 0, axis=1) for b in seen]
            if flat[-1].any():
                drawn = set((batch.rollout_id[::4] // 4).tolist())
                for b, without in zip(seen, flat, strict=True):
                    assert set((b.rollout_id[::4] // 4)[~without].tolist()) <= drawn


def test_train_writes_a_file_an_iteration_and_deletes_what_is_not_needed(run):
    lagged = run(6, lag=2)
    names = sorted(path.name for path in (lagged.workdir / "replay").iterdir())
    assert names == [f"rollout_{i:08d}.npz" for i in (3, 4, 5)]
    with np.load(lagged.workdir / "replay" / names[0]) as arrays:
        batch = next(b for _, b in lagged.batches if b.rollout_id[0] == 3 * BATCH)
        np.testing.assert_array_equal(arrays["behavior_logp"], batch.behavior_logp)
        np.testing.assert_array_equal(arrays["advantage"], batch.advantage)


def test_train_rate_of_rollouts_counts_the_fill(run):
    """Tokens over the seconds that they took, those of iterations that trained nothing too."""
    lagged = run(6, lag=2)
    seconds = sum(r["time/rollout"] for r in files.read_jsonl(lagged.workdir / "metrics.jsonl") if "time/rollout" in r)
    expected = lagged.summary["num_rollout_tokens"] / seconds
    np.testing.assert_allclose(lagged.summary["rollout_tokens_per_second"], expected, rtol=1e-6)
