"""A run from start to end, watched."""

import pytest

from r2vpo_jax.training import noise_floor, trainer
from r2vpo_jax.training.collector import Collector
from tests.helpers.compilations import compilations


class Watched:
    """Names what is compiled in each iteration while it is entered; keeps the noise floors."""

    def __init__(self):
        self.by_iteration, self.floors = [], []

    def __enter__(self):
        self._patch, self._seen = pytest.MonkeyPatch(), 0
        self._counting = compilations()
        self._compiled = self._counting.__enter__()
        measure, collect = noise_floor.measure, Collector.collect

        def collecting(*args, **kwargs):
            self._seen = len(self._compiled)  # an iteration begins
            return collect(*args, **kwargs)

        def measured(*args):
            self.floors.append(measure(*args)[0])
            return measure(*args)

        self._patch.setattr(noise_floor, "measure", measured)
        self._patch.setattr(Collector, "collect", collecting)
        return self

    def on_iteration(self, _):
        self.by_iteration.append(self._compiled[self._seen :])

    def __exit__(self, *problem):
        self._patch.undo()
        self._counting.__exit__(*problem)


@pytest.fixture(scope="package")
def finished_run(tiny_config, tmp_path_factory):
    """(workdir, summary, Watched) of the tiny run from start to end."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with Watched() as watched:
        summary = trainer.train(tiny_config(), workdir, on_iteration=watched.on_iteration)
    return workdir, summary, watched
