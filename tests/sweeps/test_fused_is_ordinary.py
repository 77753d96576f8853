"""A fused run is the ordinary one: the same draws, the same numbers, the same names.

Batches are large enough that each minibatch has groups whose rewards differ. Without them the gradient is rounding noise
on fresh data, which Adam makes full steps of, and two programs need not agree on noise.
"""

import jax
import pytest

from r2vpo_jax.sweeps.sharing import families
from tests.helpers.fused import assert_same, forget, ordinary, side_by_side
from tests.helpers.trees import merged

SECTIONS = {
    "trainer": {
        "prompts_per_rollout": 16,
        "micro_batch_size": 32,
        "eval_samples": 4,
        "test_samples": 8,
        "checkpoint_every": 100,
    },
    "sampler": {"group_size": 8},
    "optimizer": {"learning_rate": 3e-4},
    "evaluation": {"batch_size": 32},  # several calls of the sampler
}
REFERENCE = {"name": "grpo", "kl": {"coef": 0.05}}
SHORT = {
    "adaptive on stale data": {
        "replay": {"lag": 2},
        "optimizer": {"learning_rate": 5e-4},
        "sampler": {"temperature": 0.9},
    },
    "reference": {"objective": REFERENCE},
}
SHARED = {
    "adaptive": {"objective": {"name": "r2vpo"}},
    "fixed": {"objective": {"name": "r2vpo_fixed"}},
    "ppo_clip": {"objective": {"name": "ppo_clip"}},
    "cispo": {"objective": {"name": "cispo"}},
}
LONG = {
    "reference": {"objective": REFERENCE},
    "lag 2": {"replay": {"lag": 2}},
    "replay": {"replay": {"capacity": 3, "draw": "mixed", "batches_per_iteration": 2}},
    "critic": {"objective": {"name": "ppo"}},
    "old rule": {"objective": {"name": "r2vpo_before"}},
}
WHERE = ("kind", "iteration", "rollouts")


@pytest.fixture(scope="module")
def pair(tiny_config, tmp_path_factory):
    """(fused, ordinary) run of a configuration; the fused one is beside another that is given first."""

    def make(num_iterations, eval_every, seed=1, lockstep=False, both=(), **sections):
        length = {"trainer": {"num_iterations": num_iterations, "eval_every": eval_every}}
        length = merged(length, dict(both))
        structure = {name: fields for name, fields in sections.items() if name in ("objective", "replay")}
        configs = {
            "other": tiny_config(**merged(merged(SECTIONS, length), structure)),
            "this": tiny_config(seed=seed, **merged(merged(SECTIONS, length), sections)),
        }
        workdir = tmp_path_factory.mktemp("pair")
        return side_by_side(configs, workdir, lockstep=lockstep)["this"], ordinary(
            configs["this"], workdir / "ordinary"
        )

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


def test_a_few_iterations_in_lockstep(pair):
    """As on an accelerator: here in batches of small products, which the compiler multiplies in another way."""
    ours, theirs = pair(6, 3, lockstep=True, **SHORT["adaptive on stale data"])
    assert_same(ours, theirs)
    same_names(ours, theirs)


def test_rollouts_of_rounded_weights(pair):
    """Both sample with them, and neither validates with them."""
    both = {"sampler": {"weights": "int8"}, "trainer": {"max_noise_floor": 1e9}}
    ours, theirs = pair(3, 3, both=both)
    assert_same(ours, theirs)
    assert all(row["ratio/variance_first"] > 1e-6 for row in ours.trained)
    assert ours.summary["noise_floor_ratio_second_moment"] == ours.trained[0]["ratio/variance_first"]


@pytest.fixture
def once():
    """Programs that no other test needs are neither written to the disk nor kept."""
    written = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", written)
    forget()


@pytest.fixture(scope="module")
def shared(tiny_config, tmp_path_factory):
    """(workdir, configurations, fused runs) of several objectives in one program."""
    length = {"trainer": {"num_iterations": 20, "eval_every": 5}}
    configs = {name: tiny_config(**merged(merged(SECTIONS, length), own)) for name, own in SHARED.items()}
    assert len(families(configs)) == 1
    workdir = tmp_path_factory.mktemp("shared")
    yield workdir, configs, side_by_side(configs, workdir)
    forget()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_twenty_iterations_beside_other_objectives(shared, name):
    workdir, configs, runs = shared
    theirs = ordinary(configs[name], workdir / f"ordinary {name}")
    assert_same(runs[name], theirs)
    same_names(runs[name], theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("name", LONG)
def test_twenty_iterations(pair, name):
    ours, theirs = pair(20, 5, seed=0, **LONG[name])
    assert_same(ours, theirs)
    same_names(ours, theirs)
