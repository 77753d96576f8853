"""The life of a run on disk: claimed, continued, written to, saved and closed."""

import contextlib
import dataclasses
import math
import time

import jax

import r2vpo_jax
from r2vpo_jax import cluster, storage
from r2vpo_jax import config as config_lib
from r2vpo_jax.config import Config
from r2vpo_jax.errors import EngineError, UsageError, usage_errors
from r2vpo_jax.models.identity import refuse_others
from r2vpo_jax.rows import Rows
from r2vpo_jax.run import directory, files, instruments, report, trackers
from r2vpo_jax.run.alarms import Alarms
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.run.pages.history import History
from r2vpo_jax.run.pages.live import LivePage
from r2vpo_jax.run.pages.reader import Reader
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.learner_state import LearnerState, frozen_of, with_frozen, without_frozen
from r2vpo_jax.training.replay import ReplayBuffer, ReplayError


@dataclasses.dataclass(frozen=True)
class Counters:
    """What has happened so far in a run, as plain numbers: goes into every checkpoint."""

    code: str  # identity of the code that runs
    data: str  # identity of the problems
    model: dict[str, str] = dataclasses.field(default_factory=dict)  # identity of the base model, by its parts
    machine: dict | None = None  # what decides the last digits: `instruments.machine`
    iteration: int = 0
    problems: int = 0  # problems taken: the data position
    rollouts: int = 0  # responses sampled
    rollout_tokens: int = 0
    trained_tokens: int = 0
    nonfinite_in_a_row: int = 0
    seconds: float = 0.0  # before this process
    best_validation: float | None = None  # of those after an iteration; the base model's is none of them
    last_validation: float = 0.0
    validated: int | None = None  # iteration after which that was measured
    noise_floor: float | None = None
    base: dict | None = None  # test scores before training

    @property
    def own_score(self) -> float | None:
        """The validation score of the policy as it is now, where it was scored since it last changed; not the base's."""
        return self.last_validation if self.iteration > 0 and self.validated == self.iteration else None

    def after_validation(self, score: float) -> "Counters":
        """With the score of the policy as it is now."""
        now = dataclasses.replace(self, last_validation=score, validated=self.iteration)
        if now.own_score is None or not math.isfinite(score):
            return now
        best = self.best_validation
        return dataclasses.replace(now, best_validation=score if best is None else max(score, best))


def refuse_in_store(config: Config, workdir, profile_steps) -> None:
    """Raises UsageError for what can be written to a disk alone, where the run directory is in a store."""
    if not storage.is_store(workdir):
        return
    if "tensorboard" in config.trainer.trackers:
        raise UsageError(
            f"trainer.trackers=tensorboard needs a disk, and --workdir={workdir} is none; leave it out: metrics/ has the "
            "same numbers"
        )
    if profile_steps:
        raise UsageError(f"--profile_steps needs a disk, and --workdir={workdir} is none; profile a short run on one")


class Lifecycle:
    """The run directory of one run, and everything that is restored from it.

    Attributes:
      workdir: the directory.
      files: metrics, samples and events; there after `open`, as is
      live: the page that shows the run.
      replay, alarms: whose state goes into checkpoints.
    """

    def __init__(self, config: Config, workdir, rows: Rows, *, chief: bool, say, started: float):
        """Lock the directory, and claim it; `close` gives it back.

        Args:
          config: the run's.
          workdir: the run directory.
          rows: how rollouts are spread over processes.
          chief: whether this process writes.
          say: where lines for people go.
          started: when this process began to work on the run, by time.perf_counter().

        Raises:
          UsageError: the directory belongs to another run, is in use, or cannot be written.
        """
        self.workdir = directory.folder(workdir)
        self._config, self._chief, self._say, self._started = config, chief, say, started
        self._positions, self._notices, self._check_held = {}, [], lambda: None
        with contextlib.ExitStack() as stack:
            if chief:
                self._check_held = stack.enter_context(directory.lock(workdir, say=say))
            self._changes = directory.claim(workdir, config, write=chief)
            if chief:
                directory.record_names(workdir, say)
            self._checkpointer = Checkpointer(
                self.workdir / "checkpoints", max_to_keep=config.trainer.max_checkpoints, write=chief
            )
            self.replay = ReplayBuffer(
                self.workdir / "replay", config.replay, config.sampler.group_size, write=chief, rows=rows
            )
            self.alarms = Alarms(config.alarms)
            self._held = stack.pop_all()

    def close(self) -> None:
        """Others may work in the directory again."""
        self._held.close()

    @property
    def resumed(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        return bool(self._positions)

    def resume(
        self, state: LearnerState, learner: Learner, data: str, model: dict[str, str]
    ) -> tuple[LearnerState, Counters]:
        """State and counters of the last checkpoint that is intact, its replay files too; what is not is said.

        Args:
          state: the one to start with if there is no checkpoint.
          learner: for the shape and place of a state.
          data: identity of the problems.
          model: identity of the base model.

        Raises:
          UsageError: the run was started with other problems, or from another base model; or it has ended, and nothing is
            left to go on from.
        """
        code, machine = instruments.code_identity(), instruments.machine()
        counters = Counters(code=code, data=data, model=model, machine=machine)
        for iteration in self._checkpointer.steps():
            problem = self._checkpointer.problem(iteration)
            restored = (
                None
                if problem
                else self._checkpointer.restore(
                    iteration, *map(without_frozen, (learner.abstract_state, learner.state_shardings))
                )
            )
            if restored is not None:
                state, saved = with_frozen(restored[0], frozen_of(state)), restored[1]
                try:
                    self.replay.restore(saved.pop("replay"))
                except ReplayError as error:
                    problem = str(error)
            if problem is None:
                self._positions, self.alarms.state = saved.pop("positions"), saved.pop("alarms")
                counters = Counters(**saved)
                self._say(f"continuing {self.workdir} from iteration {iteration}")
                cluster.where.saved = iteration
                break
            self._notices.append({"name": "torn", "iteration": iteration, "message": problem})
            self._say(f"checkpoint {iteration} is torn ({problem}); falling back to the one before")
        if counters.data != data:
            raise UsageError(
                f"the problems are not those that {self.workdir} was started with; put the data sets back as they were, "
                "or choose another --workdir"
            )
        refuse_others(counters.model, model, self.workdir)
        if report.is_finished(self.workdir) and not self.resumed:
            raise UsageError(
                f"{self.workdir} holds a finished run without an intact checkpoint: it cannot go on; start again in a "
                "new --workdir"
            )
        self._checkpointer.discard_after(counters.iteration if self.resumed else None)
        self._compare("code_changed", counters, counters.code, code, instruments.CODE_CHANGED.format("run"))
        self._compare(
            "machine_changed",
            counters,
            counters.machine,
            machine,
            instruments.machine_changed(counters.machine, machine),
        )
        return state, dataclasses.replace(counters, code=code, machine=machine)

    def _compare(self, name: str, counters: Counters, before, now, line: str) -> None:
        """A notice, and a line for people, where something is not as it was."""
        if before != now:
            self._notices.append({"name": name, "iteration": counters.iteration, "before": before, "now": now})
            self._say(line)

    def _go_on_with_changes(self, iteration: int) -> None:
        """Say and keep what the run was started without, but goes on with."""
        if not self._changes.accepted:
            return
        self._say(f"going on with other settings: {'; '.join(self._changes.accepted)}")
        if self._changes.rounding:
            self._say(
                f"note: {', '.join(text.partition(':')[0] for text in self._changes.rounding)} take the same sums in "
                "other pieces: from here on the last digits may differ from those of the run as it was started"
            )
        self.files.event("settings_changed", iteration, settings=list(self._changes.accepted))
        if self._chief:
            if self._changes.longer:
                report.withdraw(self.workdir)
            directory.record(self.workdir, self._config)

    @contextlib.contextmanager
    def open(self, iteration: int):
        """Around the run: its line files are open, and closed at the end; a disk that fails is one clear line."""
        told = trackers.Trackers(self._config, self.workdir, resumed=self.resumed, say=self._say)
        with usage_errors():  # a file may be gone, or shorter than the checkpoint says
            self.files = files.RunFiles(
                self.workdir, self._positions, write=self._chief, trackers=told if self._chief else None
            )
        history = Reader(self.workdir).read() if self._chief else History()
        self.files.follow(history)
        every = self._config.trainer.report_every
        self.live = LivePage(self.workdir, config_lib.to_dict(self._config), history, every=every, write=self._chief)
        for notice in self._notices:
            self.files.event(**notice)
        details = {"version": r2vpo_jax.__version__, "machine": instruments.machine()}
        self.files.event("resume" if self.resumed else "start", iteration, **details)
        with (
            files.disk_errors(self.workdir, "the last checkpoint"),
            contextlib.closing(self._checkpointer),
            self.files,
        ):
            self._go_on_with_changes(iteration)
            yield

    def save(self, state: LearnerState, counters: Counters) -> None:
        """Everything that the run needs to continue; written in the background.

        Raises:
          UsageError: another process has taken the directory over (run/lease.py).
        """
        self._check_held()
        with cluster.phase("waiting for the last checkpoint"):
            self._checkpointer.wait()
        self.replay.collect_garbage(self._checkpointer.replay_listings())
        self._positions = self.files.positions()
        saved = dataclasses.asdict(counters) | {
            "seconds": self.seconds(counters),
            "positions": self._positions,
            "replay": self.replay.listing(),
            "alarms": self.alarms.state,
        }
        with cluster.phase("saving"):
            self._checkpointer.save(counters.iteration, without_frozen(state), saved, score=counters.own_score)

    @contextlib.contextmanager
    def saving_if_the_engine_is_gone(self, state: LearnerState, counters: Counters):
        """Around what takes nothing from the state: if the engine that samples does not answer, the run is saved as it is.

        On several processes others may not know of it, and saving takes all of them.
        """
        try:
            yield
        except EngineError:
            if jax.process_count() == 1:
                self.save(state, counters)
                self.wait()
            raise

    def seconds(self, counters: Counters) -> float:
        """Seconds that the run has taken, over all processes that worked on it one after the other."""
        return counters.seconds + time.perf_counter() - self._started

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._checkpointer.wait()
