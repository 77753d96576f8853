"""The replay's files where each process has its own rows: whoever wrote them, any number of others reads them."""

import concurrent.futures
import json
import threading

import jax
import numpy as np
import pytest

from r2vpo_jax.config import ReplayConfig
from r2vpo_jax.rows import Rows, rows_of_groups
from r2vpo_jax.training.replay import ReplayBuffer, ReplayError
from tests.helpers.rollouts import GROUP, GROUPS, KEY, assert_equal, make


class Together(Rows):
    """Shares of threads, which meet where processes would."""

    def exchange(self, value):
        barrier, said = MEETINGS[len(self.shares)]
        said[self.mine] = json.loads(json.dumps(value))
        barrier.wait(timeout=60)
        heard = list(said)
        barrier.wait(timeout=60)
        return heard


MEETINGS = {number: (threading.Barrier(number), [None] * number) for number in (2, 4)}


def buffers(folder, number, mesh):
    """One for each of so many shares, every other group of the batch in another."""
    groups = [np.arange(GROUPS)[i::number] for i in range(number)]
    spread = [Together(mesh, GROUP, tuple(groups), ((0,),) * number, i) for i in range(number)]
    config = ReplayConfig(capacity=3, draw="newest")
    return [ReplayBuffer(folder, config, GROUP, write=not i, rows=each) for i, each in enumerate(spread)]


def of_all(number, function):
    """What each of so many threads says."""
    with concurrent.futures.ThreadPoolExecutor(number) as threads:
        return list(threads.map(function, range(number)))


def own(batch, i, number):
    return jax.tree.map(lambda x: x[rows_of_groups(np.arange(GROUPS)[i::number], GROUP)], batch)


def written(folder, number, mesh):
    made = buffers(folder, number, mesh)
    for iteration in range(2):
        of_all(number, lambda i: made[i].add(iteration, own(make(iteration), i, number), version=iteration))  # noqa: B023
    of_all(number, lambda i: made[i].draw(1, GROUPS, version=1, key=KEY))
    listings = [buffer.listing() for buffer in made]
    assert all(listing == listings[0] for listing in listings)
    return made, json.loads(json.dumps(listings[0]))


@pytest.mark.parametrize(("number", "others"), [(1, 4), (4, 2), (2, 1), (4, 4)])
def test_any_number_reads_the_files_of_any_other(number, others, mesh, tmp_path):
    made, listing = written(tmp_path, number, mesh)
    size = len(list(tmp_path.iterdir()))
    assert size == 2 * number
    restored = buffers(tmp_path, others, mesh)
    of_all(others, lambda i: restored[i].restore(listing))
    for i, buffer in enumerate(restored):
        assert buffer.listing() == listing
        assert buffer.statistics(None, 1) == made[0].statistics(None, 1)
        assert_equal(buffer.draw(1, GROUPS, version=1, key=KEY), own(make(1), i, others))
    # What nobody lists goes, whatever its number of parts.
    restored[0].collect_garbage([])
    assert len(list(tmp_path.iterdir())) == size
    of_all(others, lambda i: restored[i].restore({"evicted": 0, "batches": listing["batches"][1:]}))
    restored[0].collect_garbage([])
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"rollout_00000001"}


def test_bytes_are_those_of_one_file(mesh, tmp_path):
    sizes = [written(tmp_path / str(n), n, mesh)[0][0].statistics(None, 1)["replay/bytes"] for n in (1, 2, 4)]
    assert len(set(sizes)) == 1


def test_a_file_that_one_finds_damaged_is_damaged_for_all(mesh, tmp_path):
    _, listing = written(tmp_path, 4, mesh)
    restored, file = buffers(tmp_path, 4, mesh), tmp_path / "rollout_00000001.p2-of-4.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"!")

    def refusal(i):
        with pytest.raises(ReplayError) as refused:
            restored[i].restore(listing)
        return str(refused.value)

    assert all("p2-of-4.npz is damaged" in text for text in of_all(4, refusal))
