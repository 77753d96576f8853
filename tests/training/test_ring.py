"""The ring: the same replay as the buffer on the host, inside of compiled programs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.training import replay_rules, ring
from r2vpo_jax.training.replay import ReplayBuffer, ReplayError
from tests.helpers.compilations import compilations
from tests.helpers.rollouts import GROUP, GROUPS, KEY, RESPONSE, ROWS, assert_equal, groups_of, make

ITERATIONS, AGE = 8, 3  # updates an iteration

CONFIGS = {
    "one batch": {"capacity": 1},
    "twice": {"batches_per_iteration": 2},
    "lag": {"lag": 2},
    "lag and newest of some": {"lag": 1, "capacity": 3, "max_age": 4},
    "uses of the newest": {"max_uses": 2, "batches_per_iteration": 2},
    "too few uses of the newest": {"lag": 1, "capacity": 2, "max_uses": 1, "batches_per_iteration": 2},
    **{
        f"{draw}, {name}": {"draw": draw} | options
        for draw in ("uniform", "mixed", "priority")
        for name, options in {
            "3, twice": {"capacity": 3, "batches_per_iteration": 2},
            "lag": {"capacity": 2, "lag": 3},
            "age": {"capacity": 4, "lag": 1, "max_age": 7, "batches_per_iteration": 3},
            "too few uses": {"capacity": 2, "max_uses": 1, "batches_per_iteration": 3},
            "all limits": {"capacity": 5, "lag": 2, "max_age": 10, "max_uses": 2, "batches_per_iteration": 2},
        }.items()
    },
    "mixed, mostly old": {"draw": "mixed", "capacity": 4, "stale_fraction": 0.8},
    "mixed, all new": {"draw": "mixed", "capacity": 4, "stale_fraction": 0.0, "batches_per_iteration": 2},
}


def batches(run=0):
    """Of 8 iterations, each of 3 updates; group i of each 4th iteration has no advantage."""
    magnitude = np.abs(np.random.default_rng(run).standard_normal((ITERATIONS, GROUPS)))
    magnitude[np.arange(ITERATIONS), np.arange(ITERATIONS) % GROUPS] = 0
    return [make(i, version=AGE * i, magnitude=m) for i, m in enumerate(magnitude)]


def on_host(directory, config, rollouts, key=KEY, num_groups=GROUPS):
    """[(iteration, number of the draw, batch or None if refused, statistics after it)], without those of the fill."""
    buffer, result = ReplayBuffer(directory, config, GROUP), []
    for i, rollout in enumerate(rollouts):
        buffer.add(i, rollout, version=AGE * i)
        for number in range(config.batches_per_iteration if i >= config.lag else 0):
            try:
                batch = buffer.draw(i, num_groups, version=AGE * i, key=key, number=number)
            except ReplayError:
                batch = None
            result.append((i, number, batch, buffer.statistics(batch, AGE * i)))
    return result


@functools.cache
def program(config):
    """All iterations of all runs: `(rollouts, keys) -> (batches, enough, statistics)`.

    rollouts: [runs, iterations, ...]; keys: [runs]; what comes out: [runs, iterations, draws, ...].
    """

    def draw(state, key, iteration, number):
        version = AGE * iteration
        state, drawn, enough = ring.draw(state, config, iteration, GROUPS, version=version, key=key, number=number)
        return state, (drawn, enough, ring.statistics(state, drawn, version))

    @jax.jit
    def run(rollouts, keys):
        def iterate(rings, x):
            iteration, batch = x
            rings = jax.vmap(ring.add, in_axes=(0, None, 0))(rings, iteration, batch)
            outputs = []
            for number in range(config.batches_per_iteration):
                rings, output = jax.vmap(draw, in_axes=(0, 0, None, None))(rings, keys, iteration, number)
                outputs.append(output)
            return rings, jax.tree.map(lambda *x: jnp.stack(x, axis=1), *outputs)

        empty = ring.init(jax.tree.map(lambda x: x[0, 0], rollouts), config, GROUP)
        rings = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(keys), *x.shape)), empty)
        by_iteration = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rollouts)
        _, outputs = jax.lax.scan(iterate, rings, (jnp.arange(ITERATIONS), by_iteration))
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs)

    return lambda rollouts, keys: jax.tree.map(np.asarray, run(rollouts, keys))


def stack(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


@pytest.mark.parametrize("name", CONFIGS)
def test_ring_and_buffer_draw_the_same(name, tmp_path):
    config, rollouts = ReplayConfig(**CONFIGS[name]), batches()
    drawn, enough, statistics = program(config)(stack([stack(rollouts)]), KEY[None])
    assert not enough[0, : config.lag].any()
    refused = 0
    for i, number, batch, numbers in on_host(tmp_path, config, rollouts):
        assert enough[0, i, number] == (batch is not None), (i, number)
        refused += batch is None
        if batch is None:
            continue
        found = jax.tree.map(lambda x, i=i, number=number: x[0, i, number], drawn)
        assert_equal(found, batch)
        groups = groups_of(found)
        assert len(set(groups)) == GROUPS
        for statistic, value in statistics.items():
            np.testing.assert_allclose(value[0, i, number], numbers[statistic], rtol=1e-6, err_msg=statistic)
        assert {*statistics, "replay/bytes"} == set(numbers)
    assert (refused > 0) == ("too few" in name)


@pytest.mark.parametrize(
    "config",
    [{"lag": 2}, *({"draw": d, "capacity": 3, "lag": 1, "max_uses": 3} for d in ("uniform", "mixed", "priority"))],
)
def test_runs_side_by_side_draw_what_each_draws_alone(config):
    config, rollouts, keys = ReplayConfig(**config), [stack(batches(run)) for run in range(3)], jax.random.split(KEY, 3)
    together = program(config)(stack(rollouts), keys)
    for run in range(3):
        alone = program(config)(stack(rollouts[run : run + 1]), keys[run : run + 1])
        jax.tree.map(lambda x, y, run=run: np.testing.assert_array_equal(x[run], y[0]), together, alone)
    if config.draw != "newest":
        ids = together[0].rollout_id
        assert (ids[0] != ids[1]).any()
        assert (ids[1] != ids[2]).any()


@pytest.mark.parametrize("draw", ["newest", "uniform", "mixed", "priority"])
def test_more_groups_than_there_are(draw, tmp_path):
    """Of 2 batches of 4 groups, `newest` counts 4 and the others 8; and no use is counted for what is refused."""
    config, most = ReplayConfig(draw=draw, capacity=2), GROUPS if draw == "newest" else 2 * GROUPS
    rollouts = batches()[:2]
    state = functools.reduce(lambda s, x: ring.add(s, *x), enumerate(rollouts), ring.init(rollouts[0], config, GROUP))
    draw_some = jax.jit(functools.partial(ring.draw, config=config), static_argnames="num_groups")
    for num_groups, fits in ((most, True), (most + 1, False), (3 * GROUPS, False)):
        after, batch, enough = draw_some(state, iteration=1, num_groups=num_groups, version=AGE, key=KEY)
        assert enough == fits
        assert batch.tokens.shape[0] == num_groups * GROUP
        assert after.uses.sum() == (num_groups if fits else 0)
        (_, _, expected, _) = on_host(tmp_path / str(num_groups), config, rollouts, num_groups=num_groups)[-1]
        assert (expected is not None) == fits
    buffer = ReplayBuffer(tmp_path / "one", config, GROUP)
    for i, rollout in enumerate(rollouts):
        buffer.add(i, rollout, version=AGE)
    with pytest.raises(ReplayError, match=f"only {most} of {most + 1} groups are within"):
        buffer.draw(1, most + 1, version=AGE, key=KEY)


@pytest.mark.parametrize("fields", [{}, {"advantage": (ROWS, RESPONSE), "value": (ROWS, RESPONSE)}])
def test_fields_stay_what_they_are(fields):
    fields = {
        name: np.random.default_rng(0).standard_normal(shape).astype(np.float32) for name, shape in fields.items()
    }
    rollout, config = make(0, **fields), ReplayConfig(draw="priority", capacity=2)
    state = ring.init(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, rollout)), config, GROUP)
    state = ring.add(state, 0, rollout)
    _, batch, enough = jax.jit(functools.partial(ring.draw, config=config, num_groups=GROUPS))(
        state, iteration=0, version=0, key=KEY
    )
    assert enough
    assert_equal(batch, rollout)


def test_what_a_ring_refuses():
    assert ring.refusal(ReplayConfig(capacity=4)) is None
    limited = ReplayConfig(capacity=4, capacity_bytes=100)
    assert "capacity_bytes" in ring.refusal(limited)
    with pytest.raises(ValueError, match="capacity_bytes"):
        ring.init(make(0), limited, GROUP)
    with pytest.raises(ValueError, match="8 rows is not made of whole groups of 3"):
        ring.init(make(0), ReplayConfig(capacity=4), 3)


def test_the_newest_batch_is_a_slice():
    """Compiled for two runs side by side, it reads and writes one slot; the general way gathers and sorts."""

    def operations(**config):
        config, rollout = ReplayConfig(**config), make(0)
        state = ring.init(rollout, config, GROUP)
        states, rollouts = (jax.tree.map(lambda x: jnp.stack([x, x]), tree) for tree in (state, rollout))

        def step(state, rollout, iteration):
            state = ring.add(state, iteration, rollout)
            return ring.draw(state, config, iteration, GROUPS, version=0, key=KEY)

        text = jax.jit(jax.vmap(step, in_axes=(0, 0, None))).lower(states, rollouts, 3).compile().as_text()
        names = ("gather", "sort", "dynamic-slice", "dynamic-update-slice")
        return {name for name in names if f" {name}(" in text}

    slices = {"dynamic-slice", "dynamic-update-slice"}
    assert operations(lag=2) == operations(lag=2, capacity=3, max_age=1) == slices
    assert {"gather", "sort"} <= operations(lag=2, max_uses=1)


def test_the_buffer_compiles_once_while_it_fills(tmp_path):
    config = ReplayConfig(draw="priority", capacity=5, lag=1, max_age=4)
    with compilations() as compiled:
        on_host(tmp_path, config, batches())
    assert compiled.count("jit(choose)") == 1, "no other test has this capacity"
    assert all(compiled.count(name) <= 1 for name in ("jit(priorities)", "jit(draw_key)"))


# ---- the laws ----


def choose(config, num_groups, weights=None, fresh=0, tries=2000):
    """int [tries, num_groups]: draws from 2 batches of 4 groups without limits; the latter one is fresh."""
    zeros = jnp.zeros((2, GROUPS), jnp.int32)
    draw = functools.partial(
        replay_rules.choose,
        config,
        exposed=zeros == 0,
        is_fresh=jnp.array([[False], [True]]) | (zeros > 0),
        age=zeros,
        uses=zeros,
        priority=None if weights is None else jnp.asarray(weights, jnp.float32).reshape(2, GROUPS),
        num_groups=num_groups,
    )
    chosen, found = jax.jit(jax.vmap(draw))(jax.random.split(KEY, tries))
    assert (found == num_groups).all()
    return np.asarray(chosen)


def test_priority_without_replacement_follows_the_law_of_one_after_another():
    """P(first i, then j) = w_i / W * w_j / (W - w_i). The standard deviation of a share is below 0.011."""
    weights = np.array([1, 2, 0, 5, 0.5, 4, 0, 3])
    chosen = choose(ReplayConfig(draw="priority", capacity=2), 2, weights)
    expected = np.zeros((8, 8))
    for i, j in itertools.permutations(range(8), 2):
        low, high = sorted((i, j))
        expected[low, high] += weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i])
    shares = np.zeros((8, 8))
    np.add.at(shares, (chosen[:, 0], chosen[:, 1]), 1 / len(chosen))
    np.testing.assert_allclose(expected.sum(), 1)
    np.testing.assert_allclose(shares, expected, atol=0.04)
    np.testing.assert_array_equal(shares[expected == 0], 0)


def test_uniform_takes_every_pair_alike():
    """28 pairs in 2000 tries: 71 each, with a standard deviation of 8.3."""
    chosen = choose(ReplayConfig(draw="uniform", capacity=2), 2)
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(counts) == 28
    assert counts.min() > 71 - 40
    assert counts.max() < 71 + 40


@pytest.mark.parametrize(("fraction", "old"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_mixed_takes_its_share_of_each(fraction, old):
    """4 of 8: the old ones first, each alike: `old` / 4 of 2000 tries, with a standard deviation of at most 22."""
    chosen = choose(ReplayConfig(draw="mixed", capacity=2, stale_fraction=fraction), GROUPS)
    assert (chosen[:, :old] < GROUPS).all()
    assert (chosen[:, old:] >= GROUPS).all()
    assert (np.diff(chosen, axis=1) > 0).all()
    expected = np.repeat([old / GROUPS, 1 - old / GROUPS], GROUPS) * len(chosen)
    np.testing.assert_allclose(np.bincount(chosen.ravel(), minlength=8), expected, atol=110)


def test_keys_of_draws_are_those_of_nothing_else():
    """Not of sampling (run, iteration), nor of a shuffle (run, iteration, 1 + number), for 3 iterations of 3 draws."""
    draws = {
        tuple(jax.random.key_data(replay_rules.draw_key(KEY, i, n)).tolist())
        for i, n in itertools.product(range(3), range(3))
    }
    iteration = [jax.random.fold_in(KEY, i) for i in range(3)]
    others = iteration + [jax.random.fold_in(key, n) for key in iteration for n in range(4)]
    assert len(draws) == 9
    assert not draws & {tuple(jax.random.key_data(key).tolist()) for key in others}
