"""A fused run is the ordinary one: the same draws, the same numbers, the same names."""

import pytest

from tests.helpers.fused import STEADY, assert_same, ordinary, side_by_side
from tests.helpers.trees import merged

TRAINER = {"eval_samples": 4, "test_samples": 8, "checkpoint_every": 100}
REFERENCE = {"name": "grpo", "kl": {"coef": 0.05}}
SHORT = {
    "adaptive on stale data": {
        "objective": {"dual": {"measure": "after"}},
        "replay": {"lag": 2},
        "optimizer": {"learning_rate": 2e-3},
        "sampler": {"temperature": 0.9},
    },
    "reference": {"objective": REFERENCE},
}
LONG = {
    "adaptive": {},
    "fixed": {"objective": {"name": "r2vpo_fixed"}},
    "ppo_clip": {"objective": {"name": "ppo_clip"}},
    "reference": {"objective": REFERENCE},
    "cispo": {"objective": {"name": "cispo"}},
    "lag 2": {"replay": {"lag": 2}},
    "replay": {"replay": {"capacity": 3, "draw": "mixed", "batches_per_iteration": 2}},
    "critic": {"objective": {"name": "ppo"}},
    "after": {"objective": {"dual": {"measure": "after"}}},
}
WHERE = ("kind", "iteration", "rollouts")


@pytest.fixture(scope="module")
def pair(tiny_config, tmp_path_factory):
    """(fused, ordinary) run of a configuration; the fused one is beside another that is given first."""

    def make(num_iterations, eval_every, seed=1, **sections):
        trainer = TRAINER | {"num_iterations": num_iterations, "eval_every": eval_every}
        beside = {name: fields for name, fields in sections.items() if name in ("objective", "replay")}
        configs = {
            "other": tiny_config(trainer=trainer, **merged(STEADY, beside)),
            "this": tiny_config(trainer=trainer, seed=seed, **merged(STEADY, sections)),
        }
        workdir = tmp_path_factory.mktemp("pair")
        return side_by_side(configs, workdir)["this"], ordinary(configs["this"], workdir / "ordinary")

    return make


def same_names(ours, theirs):
    for row, other in zip(ours.rows, theirs.rows, strict=True):
        # How many bytes of memory the batches take is the host's to say.
        assert row.keys() == other.keys() - {"replay/bytes"}, row["iteration"]
        assert [row[name] for name in WHERE] == [other[name] for name in WHERE]
    assert list(ours.summary) == list(theirs.summary)
    assert ours.failure is theirs.failure is None


@pytest.mark.parametrize("name", SHORT)
def test_a_few_iterations(pair, name):
    ours, theirs = pair(6, 3, **SHORT[name])
    assert_same(ours, theirs)
    same_names(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_twenty_iterations(pair, name):
    ours, theirs = pair(20, 5, seed=0, **LONG[name])
    assert_same(ours, theirs)
    same_names(ours, theirs)
