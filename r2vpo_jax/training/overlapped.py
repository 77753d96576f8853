"""Sampling beside learning, in lock step: the numbers of a run with a lag, in less time.

With a lag of K an iteration learns from what was sampled K iterations ago, and what it samples takes the parameters from
before its updates. Neither needs the other, so a thread samples and verifies while the loop learns. The iteration ends
when both are done. So whatever happens between iterations finds the run as it would be if the two had taken turns:
validation, checkpoints, a request to stop. Nothing is in flight then, and nothing depends on which of the two was faster:
such a run is the same function of (config, seed, code, devices).
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from r2vpo_jax.config import Config
from r2vpo_jax.errors import UsageError
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.rows import rows_on_both
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.training.iteration import Made
from r2vpo_jax.training.update import RolloutReport


class Steps(Protocol):
    """What such an iteration consists of; `iteration.Steps` in smaller pieces."""

    def make_room(self) -> None:
        """Give the batch that is sampled next a place in the replay buffer."""

    def collection(self) -> Callable[[], Any]:
        """What samples and verifies the next responses with the parameters as they are now; it may run in any thread."""

    def choose(self) -> list[Rollout]:
        """The batches to train on now, as if the one that is being sampled were in the replay buffer already."""

    def learn(self, rollout: Rollout, number: int) -> RolloutReport:
        """Updates on the drawn batch of that number."""

    def counted(self, collected: Any) -> Any:
        """The same, once it is counted as sampled."""

    def prepare(self, collected: Any) -> Rollout:
        """Turn rewards into advantages."""

    def keep(self, batch: Rollout) -> None:
        """Put the batch into the replay buffer."""


def check(config: Config, mesh: Mesh, sampler_mesh: Mesh) -> None:
    """Refuse what would let processes wait for each other: two threads of each give out work, in an order of their own.

    Args:
      config: the run's.
      mesh, sampler_mesh: from `sampler_mesh.make_meshes`.

    Raises:
      ValueError: several processes sample beside learning on devices, or over connections, that the two would share.
    """
    processes = jax.process_count()
    if not config.replay.overlap or processes == 1:
        return
    if config.sampler.engine != "own":
        raise ValueError(
            f"replay.overlap with sampler.engine={config.sampler.engine} is for one process, and there are {processes}: what the "
            "others are told of rollouts goes over the devices that learn"
        )
    if sampler_mesh is mesh:
        raise ValueError(
            "replay.overlap on several processes needs devices that sample only: set mesh.sampler_devices, a multiple of the "
            f"{processes} processes"
        )
    rows, _ = rows_on_both(sampler_mesh, mesh, config.trainer.prompts_per_rollout, config.sampler.group_size)
    if config.task.name == "text" and rows.is_all:
        raise ValueError(
            "replay.overlap on several processes with task.name=text needs rollouts that are spread over the processes: else "
            f"process 0 sends its verdicts to the others over all devices, those that learn too. {rows.why_all()}"
        )
    # XLA's client for processors runs programs on several devices of a process one after the other.
    if mesh.devices.flat[0].platform == "cpu" and min(len(mesh.local_devices), len(sampler_mesh.local_devices)) > 1:
        raise ValueError(
            f"replay.overlap on {processes} processes of processors needs one device that learns, or one that samples, in each "
            f"process: there are {len(mesh.local_devices)} and {len(sampler_mesh.local_devices)}"
        )


def notices(config: Config) -> list[str]:
    """What a user should know of devices that idle."""
    if not config.mesh.sampler_devices or config.replay.overlap:
        return []
    return [
        f"note: {config.mesh.sampler_devices} devices sample and the others learn, in turns, so that half of them wait at any "
        "time; --config.replay.lag=1 --config.replay.overlap=True lets them work at the same time"
    ]


def iterate(steps: Steps, beside: "Beside", what: str) -> Made:
    """One iteration.

    Args:
      steps: of a run with a lag.
      beside: where the sampling goes.
      what: is being sampled, for messages.
    """
    steps.make_room()
    beside.start(steps.collection(), what)
    drawn = steps.choose()
    reports = [steps.learn(rollout, number) for number, rollout in enumerate(drawn)]
    collected = steps.counted(beside.result())
    batch = steps.prepare(collected)
    steps.keep(batch)
    return Made(collected, batch, drawn, reports)


class Beside:
    """One piece of work at a time, in a thread beside the caller's.

    Leave it, as a context manager, when the caller can go on no more: it waits for the thread, so that nothing computes
    any longer when what the work needs is closed. It does not wait when it was too late already, or for a
    KeyboardInterrupt.
    """

    def __init__(self, limit: float, timers: Timers, say: Callable[[str], None]):
        """Nothing runs yet.

        Args:
          limit: seconds that `result` waits.
          timers: of the work; "wait" is timed here.
          say: where lines for people go.
        """
        self._limit, self._timers, self._say = limit, timers, say
        self._thread: threading.Thread | None = None
        self._what, self._started, self._late = "", 0.0, False

    def start(self, work: Callable[[], Any], what: str) -> None:
        """Begin.

        Args:
          work: without arguments.
          what: it makes, for messages.
        """
        if self._thread is not None:
            raise RuntimeError(f"{self._what} have not been asked for yet")
        self._value, self._error = None, None
        self._what, self._started = what, time.perf_counter()
        # As a daemon, so that a process whose work never ends can end.
        self._thread = threading.Thread(target=self._run, args=(work,), name="rollouts", daemon=True)
        self._thread.start()

    def _run(self, work) -> None:
        try:
            self._value = work()
        except BaseException as error:  # handed to the thread that waits, by result()
            self._error = error

    def result(self) -> Any:
        """What the work returned.

        Raises:
          UsageError: it did not end in time. The message says who waits for what.
          Exception: whatever the work raised.
        """
        thread = self._thread
        with self._timers("wait"):
            thread.join(self._limit)
        if thread.is_alive():
            self._late = True
            raise UsageError(
                f"learning has waited {self._limit:g} s for {self._what}: {self._doing()}. The last checkpoint is intact; see "
                "what holds sampling up, or raise replay.wait_limit"
            )
        self._thread = None
        value, error, self._value, self._error = self._value, self._error, None, None
        if error is not None:
            raise error
        return value

    def _doing(self) -> str:
        phases = {"rollout": "they are being sampled", "verify": "they are being verified"}
        doing = phases.get(self._timers.phase_of(self._thread.ident), "they are on their way")
        return f"{doing}, {time.perf_counter() - self._started:.0f} s after they were begun"

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        thread = self._thread
        if thread is None or self._late or (kind is not None and issubclass(kind, KeyboardInterrupt)):
            return
        thread.join(min(self._limit, 1.0))
        if thread.is_alive():
            self._say(f"the end waits, {self._limit:g} s at most, for {self._what}: {self._doing()}")
            thread.join(self._limit)
