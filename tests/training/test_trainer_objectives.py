"""The training loop with objectives that need more of it: a critic, a reference, a KL that adapts, resampling."""

import math

import numpy as np
import pytest

from r2vpo_jax import models, sharding
from r2vpo_jax.tasks.arithmetic import SYMBOLS
from r2vpo_jax.tasks.base import Outcome, Verdicts
from r2vpo_jax.training import credit, trainer
from r2vpo_jax.training.collector import Collector
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.trainer import train
from tests.helpers.runs import assert_same_run, final_state, rows, stop, train_rows, undocumented

GROUP, PROMPTS = 4, 4  # of the tiny run
PRESETS = (
    "ppo",
    "dapo",
    "grpo",
    "rloo",
    "ppo_kl",
    *(pytest.param(p, marks=pytest.mark.slow) for p in ("gppo", "vcpo")),
)
KL = {"kl/mean", "kl/coef"}
CRITIC = {"critic/loss", "critic/explained_variance", "critic/clip_fraction", "critic/target_mean"}
CORRECTION = {"correction/weight_mean", "correction/effective_sample_size"}
STEPS = {"correction/step_scale", "correction/response_effective_sample_size"}


class Recorder:
    """Runs, and keeps what each iteration sampled and learned from."""

    def __init__(self, config, workdir):
        self.sampled, self.learned, self.last_kl = [], [], []
        self.kl_coef = [config.objective.kl.coef]  # before each iteration, and after the last
        self.workdir = workdir
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "Learner", self._learner)
            self.summary = train(config, workdir, on_iteration=self._on_iteration)

    def _on_iteration(self, iteration):
        self.sampled.append(iteration.collected.rollout)
        self.learned += iteration.drawn
        self.kl_coef.append(float(iteration.state.kl_coef))

    def _learner(self, *args, **kwargs):
        """One that keeps the KL of the last minibatch, which the multipliers are stepped on."""
        made = Learner(*args, **kwargs)
        step = made.step_multipliers

        def stepping(dual_state, kl_coef, all_stats, **measured):
            if "kl" in all_stats[-1].sums:
                self.last_kl.append(float(all_stats[-1].mean("kl")))
            return step(dual_state, kl_coef, all_stats, **measured)

        made.step_multipliers = stepping
        return made


@pytest.fixture(scope="module")
def configure(tiny_config):
    """The Config of two iterations of a preset with its own constants."""

    def make(name, **objective):
        return tiny_config(objective={"name": name, **objective}, trainer={"num_iterations": 2, "checkpoint_every": 1})

    return make


@pytest.fixture(scope="module")
def finished(configure, tmp_path_factory):
    """name -> (workdir, summary, Recorder) of a run from start to end, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = Recorder(configure(name), tmp_path_factory.mktemp(name) / "run")
        return made[name].workdir, made[name].summary, made[name]

    return make


# ---- every one of them trains ----


@pytest.mark.parametrize("name", PRESETS)
def test_it_trains_and_leaves_a_model(name, finished, configure, tiny_model, mesh):
    workdir, summary, recorder = finished(name)
    assert summary["objective"] == name
    assert summary["num_updates"] == 8
    assert summary["num_rollouts"] == sum(len(sampled.reward) for sampled in recorder.sampled)
    assert [row["version"] for row in train_rows(workdir)] == [4, 8]
    assert all(row["optimizer/nonfinite_updates"] == 0 < row["optimizer/grad_norm"] for row in train_rows(workdir))
    model, params = models.from_pretrained(workdir / "hf", num_tokens=len(SYMBOLS))
    assert model.config == tiny_model[0].config
    state, _ = final_state(workdir, configure(name), tiny_model, mesh)
    for leaf, trained, base in zip(
        *(sorted(flat(tree).items()) for tree in (params, state.params, tiny_model[1])), strict=True
    ):
        np.testing.assert_array_equal(leaf[1], trained[1], err_msg=leaf[0])
        assert np.any(leaf[1] != base[1]), leaf[0]


def flat(tree, prefix=""):
    """Leaves of a nested dictionary by their path."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in flat(value, f"{prefix}/{key}").items()}


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("ppo", CRITIC),
        ("dapo", set()),
        ("grpo", KL),
        ("rloo", KL),
        ("ppo_kl", KL),
        pytest.param("gppo", {"loss/imitation"}, marks=pytest.mark.slow),
        pytest.param("vcpo", CORRECTION | STEPS, marks=pytest.mark.slow),
    ],
)
def test_metrics_are_there_documented_and_numbers(name, extra, finished):
    """Those that exist only for what the objective switches on, and no others of their kind."""
    workdir, _, _ = finished(name)
    first, second = train_rows(workdir)
    assert list(first) == list(second)
    kinds = ("kl/", "critic/", "correction/", "loss/imitation")
    assert {metric for metric in first if metric.startswith(kinds)} == extra
    assert {metric for metric in first if metric not in extra} == set(train_rows(finished("dapo")[0])[0])
    assert undocumented(first) == []
    for row in (first, second):
        for metric, value in row.items():
            empty = value == "nan" and metric.startswith(("keeps/retained", "keeps/restoring"))
            assert metric == "kind" or empty or (isinstance(value, (int, float)) and math.isfinite(value)), metric


def test_the_check_of_the_documentation_can_fail():
    assert undocumented(["kind", "kl/mean", "kl/median"]) == ["kl/median"]


# ---- a critic ----


def test_ppo_discounts_the_outcome_before_its_critic_knows_anything(finished):
    """V = 0 at first, so A_t = 0.95^(tokens after t) R, which is the target too; then it is whitened."""
    _, _, recorder = finished("ppo")
    learned = recorder.learned[0]
    mask = np.asarray(learned.response_mask)
    np.testing.assert_array_equal(learned.value, np.zeros(mask.shape))
    after = learned.response_length[:, None] - 1 - np.arange(mask.shape[1])
    target = np.where(mask, 0.95**after * learned.reward[:, None], 0.0)
    assert 0 < learned.reward.mean() < 1
    np.testing.assert_allclose(learned.value_target, target, rtol=1e-5, atol=1e-7)
    whitened = np.where(mask, (target - target[mask].mean()) / target[mask].std(ddof=1), 0.0)
    np.testing.assert_allclose(learned.advantage, whitened, rtol=1e-4, atol=1e-5)


def test_ppo_learns_values_and_uses_them(finished, configure, tiny_model, mesh):
    workdir, _, recorder = finished("ppo")
    state, _ = final_state(workdir, configure("ppo"), tiny_model, mesh)
    assert np.all(state.critic.kernel != 0)
    assert state.critic.bias != 0
    learned = recorder.learned[1]
    mask = np.asarray(learned.response_mask)
    assert np.all(learned.value[mask] != 0)
    assert np.abs(learned.value[mask]).mean() > 1e-3
    # One value before the last token of each response, and the target there is the reward.
    rows_, last = np.arange(len(mask)), learned.response_length - 1
    np.testing.assert_allclose(learned.value_target[rows_, last], learned.reward, atol=1e-6)
    first, second = train_rows(workdir)
    assert first["critic/target_mean"] > 0
    assert first["critic/loss"] > 0
    np.testing.assert_allclose(second["critic/target_mean"], learned.value_target[mask].mean(), rtol=1e-4)
    # Samples show one number for a response: the mean of its tokens' advantages.
    written = [row for row in rows(workdir, "samples") if row["iteration"] == 2]
    expected = [learned.advantage[i][mask[i]].mean() for i in range(2)]
    np.testing.assert_allclose([row["advantage"] for row in written], expected, rtol=1e-4, atol=1e-6)


# ---- a reference ----


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_the_reference_is_the_base_model(name, finished, configure, tiny_model, mesh):
    workdir, _, recorder = finished(name)
    first, second = recorder.learned
    # The policy that sampled first is the base model; the second has learned.
    gaps = [np.abs(x.reference_logp - x.behavior_logp)[np.asarray(x.response_mask)].max() for x in (first, second)]
    assert gaps[0] < 5e-5
    assert gaps[1] > 1e-3
    learner = Learner(tiny_model[0], configure(name), mesh)
    base = learner.init_state(tiny_model[1]).params
    scored = np.asarray(learner.score(base, sharding.put_batch(second, mesh)))
    np.testing.assert_array_equal(scored, second.reference_logp)
    coefs = [row["kl/coef"] for row in train_rows(workdir)]
    np.testing.assert_allclose(coefs, {"grpo": 0.04, "rloo": 0.05}[name], rtol=1e-6)


def test_grpo_keeps_the_divergence_out_of_the_reward(finished):
    workdir, _, recorder = finished("grpo")
    first, second = train_rows(workdir)
    assert second["kl/mean"] > first["kl/mean"] > 0  # k3 is never negative, and the policy leaves
    for learned in recorder.learned:
        groups = learned.reward.reshape(-1, GROUP)
        deviation = np.where(groups.std(axis=1) == 0, 1.0, groups.std(axis=1, ddof=1))
        expected = (groups - groups.mean(axis=1, keepdims=True)) / deviation[:, None]
        np.testing.assert_allclose(learned.advantage, expected.reshape(-1), rtol=1e-4, atol=1e-6)


def test_rloo_pays_for_the_divergence(finished):
    """R - 0.05 sum (log behavior - log reference), less the mean of the three others."""
    _, _, recorder = finished("rloo")
    learned = recorder.learned[1]
    k1 = np.where(learned.response_mask, learned.behavior_logp - learned.reference_logp, 0.0).sum(axis=1)
    returns = (learned.reward - 0.05 * k1).reshape(-1, GROUP)
    expected = returns - (returns.sum(axis=1, keepdims=True) - returns) / (GROUP - 1)
    np.testing.assert_allclose(learned.advantage, expected.reshape(-1), rtol=1e-4, atol=1e-6)
    plain = learned.reward.reshape(-1, GROUP)
    plain = plain - (plain.sum(axis=1, keepdims=True) - plain) / (GROUP - 1)
    assert np.abs(expected - plain).max() > 1e-4, "without the divergence it is another number"


# ---- a KL that adapts ----


def test_ppo_kl_adapts_its_weight_once_a_rollout(finished, configure, tiny_model, mesh):
    """From 1, by what the last minibatch measured: 2 above 1.5 times the target of 0.01, 1/2 below 2/3 of it."""
    workdir, _, recorder = finished("ppo_kl")
    expected = [1.0]
    for divergence in recorder.last_kl:
        assert divergence > 0
        expected.append(expected[-1] * (2.0 if divergence > 0.015 else 0.5 if divergence < 0.01 / 1.5 else 1.0))
    assert len(expected) == 3
    assert len(set(expected)) > 1, "a weight that moves"
    assert [row["kl/coef"] for row in train_rows(workdir)] == expected[1:]
    assert recorder.kl_coef == expected
    state, _ = final_state(workdir, configure("ppo_kl"), tiny_model, mesh)
    assert state.kl_coef == expected[2]
    assert recorder.learned[0].reference_logp is None, "the divergence is from the policy that sampled"


# ---- resampling ----


def assert_resampling_is_in_order(recorder, objective, workdir):
    """Whole rounds of the next problems, until enough groups differ or the rounds are used up."""
    position, most = 0, 1 + objective.groups.max_resamples
    for sampled, learned, row in zip(recorder.sampled, recorder.learned, train_rows(workdir), strict=True):
        rounds = len(sampled.reward) // (GROUP * PROMPTS)
        problems = position + np.arange(rounds * PROMPTS)
        np.testing.assert_array_equal(sampled.group_id, np.repeat(problems, GROUP))
        np.testing.assert_array_equal(sampled.rollout_id, GROUP * position + np.arange(len(sampled.reward)))
        position += rounds * PROMPTS
        assert row["rollouts"] == GROUP * position

        differ = credit.groups_differ(sampled, objective, GROUP)
        assert rounds == most or differ.sum() >= PROMPTS
        assert rounds == 1 or differ[:-PROMPTS].sum() < PROMPTS, "a round too many"
        np.testing.assert_allclose(row["reward/zero_variance_groups"], 1 - differ.mean())
        np.testing.assert_allclose(row["reward/mean"], sampled.reward.mean(), rtol=1e-6)

        assert len(learned.reward) == GROUP * PROMPTS
        trained = learned.group_id[::GROUP] - problems[0]
        expected = np.flatnonzero(differ)[:PROMPTS]
        np.testing.assert_array_equal(trained[differ[trained]], expected)
        np.testing.assert_array_equal(learned.keep, np.repeat(differ[trained], GROUP))
        np.testing.assert_allclose(row["reward/kept"], differ[trained].mean())
    return position


def test_dapo_trains_on_groups_that_differ(finished, configure, tiny_model, mesh):
    workdir, _, recorder = finished("dapo")
    config = configure("dapo")
    position = assert_resampling_is_in_order(recorder, config.objective, workdir)
    _, progress = final_state(workdir, config, tiny_model, mesh)
    assert progress["problems"] == position
    assert progress["rollouts"] == GROUP * position
    for sampled, learned, row in zip(recorder.sampled, recorder.learned, train_rows(workdir), strict=True):
        # The penalty: nothing up to 11.2 of 14 tokens, 0.5 for 14.
        penalty = 0.5 * np.clip((sampled.response_length - 11.2) / 2.8, 0, 1)
        assert penalty.max() > 0
        np.testing.assert_allclose(row["reward/learned"], (sampled.reward - penalty).mean(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(learned.reward, sampled.reward[learned.rollout_id - sampled.rollout_id[0]])


def test_resampling_stops_when_enough_groups_differ_or_the_rounds_are_used_up(configure, tmp_path, monkeypatch):
    """With a verifier by script: of problems 0 to 3 two differ, of 4 to 7 three; of 8 to 19 three in all."""
    differing = np.array([0, 2, 4, 5, 7, 9, 14, 15])

    def verify(collector, index, rollout):
        problem = np.repeat(index, GROUP)
        first = np.arange(len(problem)) % GROUP == 0
        # One in four is right where it should differ; else all are, or none.
        right = np.where(np.isin(problem, differing), first, problem % 2 == 0)
        outcome = np.where(right, int(Outcome.RIGHT), int(Outcome.WRONG)).astype(np.int32)
        verdicts = Verdicts(right.astype(np.float32), outcome)
        return rollout.replace(reward=verdicts.reward, outcome=outcome), verdicts

    monkeypatch.setattr(Collector, "verify", verify)
    config = configure("dapo", groups={"overlong_penalty": 0.0, "max_resamples": 2})
    recorder = Recorder(config, tmp_path / "run")
    assert assert_resampling_is_in_order(recorder, config.objective, tmp_path / "run") == 20
    assert [len(sampled.reward) for sampled in recorder.sampled] == [32, 48]
    assert recorder.summary["num_rollouts"] == 80
    groups = [learned.group_id[::GROUP].tolist() for learned in recorder.learned]
    # Five differ: the first four of them. Three differ: 8 fills up, and takes no part.
    assert groups == [[0, 2, 4, 5], [8, 9, 14, 15]]
    assert [row["reward/kept"] for row in train_rows(tmp_path / "run")] == [1.0, 0.75]
    # 1 - mean of 1, 0, 0, 0 over its unbiased deviation 1/2, whatever the others of the batch are.
    for learned in recorder.learned:
        advantage = learned.advantage.reshape(-1, GROUP)[learned.keep.reshape(-1, GROUP)[:, 0]]
        np.testing.assert_allclose(advantage, [[1.5, -0.5, -0.5, -0.5]] * len(advantage), rtol=1e-4)
    np.testing.assert_array_equal(recorder.learned[1].advantage[:GROUP], np.zeros(GROUP))


# ---- interruptions ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective", "extra"),
    [
        # Everything that has a state: value head, its optimizer, an adaptive weight, corrections of none.
        (
            "ppo",
            {"kl": {"coef": 0.25, "target": 1e-4, "corrected": True}, "correction": {"mode": "truncate"}},
            CRITIC | KL | CORRECTION,
        ),
        ("dapo", {"groups": {"max_resamples": 2, "overlong_penalty": 0.0}}, set()),
        ("ppo_kl", {"kl": {"target": 1e-5}}, KL),
    ],
)
def test_a_run_goes_on_where_it_stopped(name, objective, extra, configure, tiny_model, mesh, tmp_path):
    """Two iterations at a stretch, or one and one: bit for bit the same, wherever the clock has no part."""
    config, whole, parts = configure(name, **objective), tmp_path / "whole", tmp_path / "parts"
    recorder = Recorder(config, whole)
    stop(config, parts, 1)
    stopped, progress = final_state(parts, config, tiny_model, mesh)
    assert progress["problems"] == len(recorder.sampled[0].group_id) // GROUP
    train(config, parts)
    assert_same_run(parts, whole, config, tiny_model, mesh)
    state, progress = final_state(parts, config, tiny_model, mesh)
    assert progress["problems"] == sum(len(sampled.group_id) for sampled in recorder.sampled) // GROUP

    written = train_rows(parts)
    assert {m for m in written[0] if m.startswith(("kl/", "critic/", "correction/"))} == extra
    assert undocumented(written[0]) == []
    if name == "dapo":
        assert progress["problems"] > 2 * PROMPTS, "nothing was sampled again"
    else:
        # What the second half needed of the first: a weight that had moved, and a head that had.
        assert stopped.kl_coef not in (config.objective.kl.coef, state.kl_coef)
    if name == "ppo":
        assert np.any(stopped.critic.kernel != 0)
        assert np.any(stopped.critic.kernel != state.critic.kernel)
        # Sampler and learner are the same code: on fresh data there is nothing to correct.
        for row in written:
            np.testing.assert_allclose(row["correction/weight_mean"], 1.0, atol=1e-4)
            np.testing.assert_allclose(row["correction/effective_sample_size"], 1.0, atol=1e-4)
