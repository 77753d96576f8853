"""Runs of the trainer on several processes of one mesh of four devices, and what each of them held. Run by test_rows.py:

    XLA_FLAGS=--xla_force_host_platform_device_count=<4 / N> python -m tests.run_on_processes N ID PORT BASE OUTPUT [CHECK ...]

Writes to OUTPUT, for each case, the run directory and what process ID saw (`CASE.ID.npz`); prints one line of JSON:
{"check": null, or what went wrong}. In OUTPUT/elastic there may be runs that others began; they are continued.
"""

import functools
import json
import pathlib
import shutil
import sys

import jax
import numpy as np

from r2vpo_jax import config, rows, sharding
from r2vpo_jax.errors import Stopped
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.training import trainer
from tests.helpers.attempts import attempt
from tests.helpers.paths import TASK
from tests.helpers.trees import merged

GROUPS, GROUP = 8, 4
SHARED = {
    "trainer": {
        "num_iterations": 2,
        "prompts_per_rollout": GROUPS,
        "num_minibatches": 2,
        "num_epochs": 1,
        "micro_batch_size": 4,
        "eval_problems": 8,
        "eval_samples": 1,
        "eval_every": 9,
        "test_problems": 8,
        "test_samples": 1,
        "checkpoint_every": 2,
        "samples_per_iteration": 11,
        "max_noise_floor": 1e-3,
    },
    "sampler": {"group_size": GROUP},
    "optimizer": {"learning_rate": 1e-3, "warmup_updates": 1},
    "task": {"arithmetic": TASK},
    "evaluation": {"batch_size": 64},
    "mesh": {"data": 2, "fsdp": 2},
}
# Rows that move between processes, and whatever is taken over the whole batch.
CASES = {
    "mixed": {
        "replay": {"capacity": 3, "draw": "mixed", "stale_fraction": 0.6, "batches_per_iteration": 2},
        "trainer": {"num_iterations": 4, "packing": True},
        "sampler": {"segment_length": 3, "batch_size": 4},
    },
    "resample": {
        "objective": {
            "name": "m2po",
            "advantage": {"estimator": "group_relative", "scale": "batch"},
            "groups": {"zero_variance": "resample", "max_resamples": 2},
        },
        "replay": {"capacity": 2, "draw": "priority"},
        "trainer": {"num_iterations": 3},
    },
    "critic": {"objective": {"name": "ppo", "kl": {"coef": 0.05, "where": "reward"}}},
}
PLAIN = {"mesh": {"data": 1, "fsdp": 4}}  # what an elastic run goes on with


class Seen:
    """What one process was given of each iteration, by the numbers of rows."""

    def __init__(self):
        self.arrays = {}

    def __call__(self, made):
        for name, rollouts in {"sampled": made.collected.parts, "drawn": made.drawn}.items():
            for number, rollout in enumerate(rollouts):
                for field, value in vars(rollout).items():
                    if value is not None:
                        self.arrays[f"{made.number}/{name}/{number}/{field}"] = value
        signals = [report.dual_signal for report in made.reports]
        self.arrays[f"{made.number}/signal"] = np.asarray(signals, np.float32)


def configure(base, **changes):
    return config.from_flags(config.make(**merged(merged(SHARED, {"model": {"path": base}}), changes)))


def run(case, base, output):
    seen = Seen()
    trainer.train(configure(base, **CASES[case]), output / case, say=lambda _: None, on_iteration=seen)
    np.savez(output / f"{case}.{jax.process_index()}.npz", **seen.arrays)


def stopped_and_continued(base, output):
    """Bit for bit what the run without a stop was."""
    settings, seen = configure(base, **CASES["mixed"]), Seen()
    try:
        trainer.train(settings, output / "again", say=lambda _: None, on_iteration=seen, stop_after_iteration=2)
    except Stopped:
        if jax.process_index() == 0:
            shutil.copytree(output / "again", output / "stopped")  # for others to go on with
        trainer.train(settings, output / "again", say=lambda _: None, on_iteration=seen)
    with np.load(output / f"mixed.{jax.process_index()}.npz") as expected:
        assert seen.arrays.keys() == set(expected.files)
        for name, value in seen.arrays.items():
            np.testing.assert_array_equal(value, expected[name], name)


def begun_elsewhere(base, output):
    """Goes on with the runs of other processes, and says so."""
    for workdir in sorted((output / "elastic").glob("*")):
        said, seen = [], Seen()
        trainer.train(configure(base, **merged(CASES["mixed"], PLAIN)), workdir, say=said.append, on_iteration=seen)
        np.savez(output / f"elastic.{workdir.name}.{jax.process_index()}.npz", **seen.arrays)
        if jax.process_index() == 0:
            text = "\n".join(said)
            assert "mesh.data: 2 there, 1 here" in text, text
            assert "mesh.fsdp: 2 there, 4 here" in text, text
            assert f"processes {workdir.name} there, {jax.process_count()} here" in text, text


def rows_have_homes(*_):
    """Shares are whole groups, and arrays come back from the devices as they went there."""
    spread = rows.rows_of(sharding.make_mesh((2, 2, 1)), GROUPS, GROUP)
    number = jax.process_count()
    assert len(spread.shares) == number
    assert len(spread.index) == GROUPS * GROUP // number
    everything = np.arange(GROUPS * GROUP * 3, dtype=np.float32).reshape(-1, 3)
    placed = spread.put(everything[spread.index])
    np.testing.assert_array_equal(sharding.to_host(placed), everything)
    np.testing.assert_array_equal(spread.fetch(placed), everything[spread.index])
    np.testing.assert_array_equal(spread.fetch(jax.jit(lambda x: x[::-1])(placed)), everything[::-1][spread.index])
    np.testing.assert_array_equal(spread.whole(spread.index.astype(np.int32)), np.arange(GROUPS * GROUP))
    assert spread.exchange({"é": jax.process_index()}) == [{"é": i} for i in range(number)]
    # Each process has a part of three batches, and gets its places of one made of them.
    batches = [
        {"x": everything + 100 * i, "row": 100 * i + np.arange(len(everything), dtype=np.int32)} for i in range(3)
    ]
    mine = [jax.tree.map(lambda x: x[spread.index], batch) for batch in batches]
    for seed in range(3):
        flat = np.random.default_rng(seed).permutation(3 * GROUPS)[:GROUPS] if seed else np.arange(GROUPS) // GROUPS
        chosen = np.stack(np.divmod(flat, GROUPS), axis=1)
        expected = rows.taken(batches, chosen.tolist(), GROUP)
        jax.tree.map(
            np.testing.assert_array_equal,
            spread.bring(mine, chosen),
            jax.tree.map(lambda x: x[spread.index], expected),
        )


def tensor_spans_processes(*_):
    """Processes that hold the same rows: the first of them says what is so."""
    number = jax.process_count()
    for shape, size in (((2, 1, 2), max(number // 2, 1)), ((1, 1, 4), 1)):
        spread = rows.rows_of(sharding.make_mesh(shape), GROUPS, GROUP)
        assert len(spread.shares) == (2 if shape[0] == 2 and number > 1 else 1), spread.shares
        if spread.is_all:
            continue
        assert all(len(processes) == size for processes in spread.holders)
        told = spread.of_leader(np.float32([jax.process_index()]))
        assert told == spread.holders[spread.mine][0]
        assert spread.exchange(jax.process_index()) == [processes[0] for processes in spread.holders]
        x = np.arange(GROUPS * GROUP, dtype=np.int32)
        np.testing.assert_array_equal(spread.fetch(spread.put(x[spread.index])), x[spread.index])
        np.testing.assert_array_equal(spread.whole(x[spread.index]), x)


def torn_groups_are_held_by_all(*_):
    """Six groups of two rows over four devices: a device has one and a half."""
    spread = rows.rows_of(sharding.make_mesh((2, 2, 1)), 6, 2)
    assert spread.is_all == (jax.process_count() != 2)
    if spread.is_all:
        assert spread.told(np.float32([jax.process_index()])) == 0, "what process 0 says"
    if jax.process_count() == 4:
        assert "6 groups of 2 rows are not spread over the 4 processes" in spread.why_all()


def outlines_take_no_memory(*_):
    spread = rows.rows_of(sharding.make_mesh((2, 2, 1)), GROUPS, GROUP)
    number = len(spread.index)
    fields = {name: np.zeros(number, np.float32) for name in Rollout.__dataclass_fields__}
    fields |= {"tokens": np.ones((number, 9), np.int32), "behavior_logp": np.ones((number, 5), np.float32)}
    batch = Rollout(**fields | {"rollout_id": spread.index.astype(np.int32)})
    outline = rows.joined([spread.outline(batch), spread.outline(batch)])
    np.testing.assert_array_equal(outline.rollout_id, np.tile(np.arange(GROUPS * GROUP), 2))
    assert outline.tokens.shape == (2 * GROUPS * GROUP, 9)
    assert outline.response_size == 5
    if not spread.is_all:
        assert not any(outline.tokens.strides)


CHECKS = (rows_have_homes, tensor_spans_processes, torn_groups_are_held_by_all, outlines_take_no_memory)
AFTERWARDS = (stopped_and_continued, begun_elsewhere)


def main():
    number, process, port, base, output, *wanted = sys.argv[1:]
    output = pathlib.Path(output)
    if number != "1":
        jax.distributed.initialize(f"127.0.0.1:{port}", int(number), int(process))
    assert jax.device_count() == 4, jax.devices()
    trainer.Learner = functools.cache(trainer.Learner)  # runs of one configuration compile once
    checks = {check.__name__: functools.partial(check, base, output) for check in CHECKS}
    checks |= {case: functools.partial(run, case, base, output) for case in CASES}
    checks |= {check.__name__: functools.partial(check, base, output) for check in AFTERWARDS}
    print(json.dumps({name: attempt(check) for name, check in checks.items() if not wanted or name in wanted}))


if __name__ == "__main__":
    main()
