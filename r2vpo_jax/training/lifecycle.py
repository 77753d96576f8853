"""The life of a run on disk: claimed, continued, written to, saved and closed."""

import contextlib
import dataclasses
import time

import r2vpo_jax
from r2vpo_jax.config import Config
from r2vpo_jax.errors import UsageError, usage_errors
from r2vpo_jax.models.identity import refuse_others
from r2vpo_jax.run import directory, files, instruments
from r2vpo_jax.run.alarms import Alarms
from r2vpo_jax.run.checkpoints import Checkpointer
from r2vpo_jax.training.learner import Learner
from r2vpo_jax.training.replay import ReplayBuffer, ReplayError
from r2vpo_jax.training.update import LearnerState


@dataclasses.dataclass(frozen=True)
class Counters:
    """What has happened so far in a run, as plain numbers: goes into every checkpoint."""

    code: str  # identity of the code that runs
    data: str  # identity of the problems
    model: dict[str, str] = dataclasses.field(default_factory=dict)  # identity of the base model, by its parts
    iteration: int = 0
    problems: int = 0  # problems taken: the data position
    rollouts: int = 0  # responses sampled
    rollout_tokens: int = 0
    trained_tokens: int = 0
    nonfinite_in_a_row: int = 0
    seconds: float = 0.0  # before this process
    best_validation: float = 0.0
    last_validation: float = 0.0
    noise_floor: float | None = None
    base: dict | None = None  # test scores before training


class Lifecycle:
    """The run directory of one run, and everything that is restored from it.

    Attributes:
      workdir: the directory.
      files: metrics, samples and events; there after `open`.
      replay, alarms: whose state goes into checkpoints.
    """

    def __init__(self, config: Config, workdir, *, chief: bool, say, started: float):
        """Claim the directory.

        Args:
          config: the run's.
          workdir: the run directory.
          chief: whether this process writes.
          say: where lines for people go.
          started: when this process began to work on the run, by time.perf_counter().

        Raises:
          UsageError: the directory belongs to another run, or cannot be written.
        """
        self.workdir = directory.claim(workdir, config, write=chief)
        self._chief, self._say, self._started = chief, say, started
        self._tensorboard = config.trainer.tensorboard
        self._checkpointer = Checkpointer(
            self.workdir / "checkpoints", max_to_keep=config.trainer.max_checkpoints, write=chief
        )
        self.replay = ReplayBuffer(self.workdir / "replay", config.replay, config.sampler.group_size, write=chief)
        self.alarms = Alarms(config.alarms)
        self._positions, self._notices = {}, []

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
          UsageError: the run was started with other problems, or from another base model.
        """
        code = instruments.code_identity()
        counters = Counters(code=code, data=data, model=model)
        for iteration in self._checkpointer.steps():
            problem = self._checkpointer.problem(iteration)
            restored = (
                None
                if problem
                else self._checkpointer.restore(iteration, learner.abstract_state, learner.state_shardings)
            )
            if restored is not None:
                state, saved = restored
                try:
                    self.replay.restore(saved.pop("replay"))
                except ReplayError as error:
                    problem = str(error)
            if problem is None:
                self._positions, self.alarms.state = saved.pop("positions"), saved.pop("alarms")
                counters = Counters(**saved)
                self._say(f"continuing {self.workdir} from iteration {iteration}")
                break
            self._notices.append({"name": "torn", "iteration": iteration, "message": problem})
            self._say(f"checkpoint {iteration} is torn ({problem}); falling back to the one before")
        if counters.data != data:
            raise UsageError(
                f"the problems are not those that {self.workdir} was started with; put the data sets back as they were, "
                "or choose another --workdir"
            )
        refuse_others(counters.model, model, self.workdir)
        self._checkpointer.discard_after(counters.iteration if self.resumed else None)
        if counters.code != code:
            self._notices.append(
                {"name": "code_changed", "iteration": counters.iteration, "before": counters.code, "now": code}
            )
            self._say(instruments.CODE_CHANGED.format("run"))
        return state, dataclasses.replace(counters, code=code)

    @contextlib.contextmanager
    def open(self, iteration: int):
        """Around the run: its line files are open, and closed at the end; a disk that fails is one clear line."""
        with usage_errors():  # a file may be gone, or shorter than the checkpoint says
            self.files = files.RunFiles(self.workdir, self._positions, write=self._chief, tensorboard=self._tensorboard)
        for notice in self._notices:
            self.files.event(**notice)
        self.files.event("resume" if self.resumed else "start", iteration, version=r2vpo_jax.__version__)
        with (
            files.disk_errors(self.workdir, "the last checkpoint"),
            contextlib.closing(self._checkpointer),
            contextlib.closing(self.files),
        ):
            yield

    def save(self, state: LearnerState, counters: Counters) -> None:
        """Everything that the run needs to continue; written in the background."""
        self._checkpointer.wait()
        self.replay.collect_garbage(self._checkpointer.replay_listings())
        self._positions = self.files.positions()
        saved = dataclasses.asdict(counters) | {
            "seconds": self.seconds(counters),
            "positions": self._positions,
            "replay": self.replay.listing(),
            "alarms": self.alarms.state,
        }
        self._checkpointer.save(counters.iteration, state, saved, score=counters.last_validation)

    def seconds(self, counters: Counters) -> float:
        """Seconds that the run has taken, over all processes that worked on it one after the other."""
        return counters.seconds + time.perf_counter() - self._started

    def wait(self) -> None:
        """Until what was saved is on disk."""
        self._checkpointer.wait()
