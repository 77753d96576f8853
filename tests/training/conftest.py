"""A run from start to end, watched."""

import jax
import pytest

from r2vpo_jax.training import noise_floor, trainer
from r2vpo_jax.training.collector import Collector
from r2vpo_jax.training.learner import Learner


class Watched:
    """Counts compilations in each iteration while it is entered; keeps the learner and the noise floors."""

    def __init__(self):
        self.by_iteration, self.floors, self.learner = [], [], None

    def __enter__(self):
        self._patch, self._count, self._seen = pytest.MonkeyPatch(), 0, 0
        measure, collect = noise_floor.measure, Collector.collect

        def listener(event, _, **__):
            self._count += event == "/jax/core/compile/backend_compile_duration"

        def collecting(*args, **kwargs):
            self._seen = self._count  # an iteration begins
            return collect(*args, **kwargs)

        def measured(*args):
            self.floors.append(measure(*args)[0])
            return measure(*args)

        def learner(*args, **kwargs):
            self.learner = Learner(*args, **kwargs)
            return self.learner

        jax.monitoring.register_event_duration_secs_listener(listener)
        self._patch.setattr(noise_floor, "measure", measured)
        self._patch.setattr(trainer, "Learner", learner)
        self._patch.setattr(Collector, "collect", collecting)
        return self

    def on_iteration(self, _):
        self.by_iteration.append(self._count - self._seen)

    def __exit__(self, *_):
        self._patch.undo()


@pytest.fixture(scope="package")
def finished_run(tiny_config, tmp_path_factory):
    """(workdir, summary, Watched) of the tiny run from start to end."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with Watched() as watched:
        summary = trainer.train(tiny_config(), workdir, on_iteration=watched.on_iteration)
    return workdir, summary, watched
