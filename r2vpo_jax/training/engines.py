"""A run whose rollouts are sampled by a server: is it there, and how it comes by the weights of the policy.

Weights are published as a Hugging Face directory on a disk that the server reads too; then its address is posted. What
follows is sampled with them, and stamped with their version, so that all that counts the age of data counts it right.
"""

import hashlib
import pathlib
import secrets
import shutil
from collections.abc import Callable

import jax

from r2vpo_jax import cluster, storage
from r2vpo_jax.config import Config, EndpointConfig
from r2vpo_jax.errors import UsageError, usage_errors
from r2vpo_jax.models.base import BaseModel
from r2vpo_jax.run.instruments import Timers
from r2vpo_jax.sampler import Published
from r2vpo_jax.sampler.endpoint import Endpoint
from r2vpo_jax.training.sampler_mesh import SamplerWeights
from r2vpo_jax.training.update import LearnerState

_ANSWER_BYTES = 1 << 20


def find(config: Config, workdir, tokens: int, say: Callable[[str], None]) -> Endpoint | None:
    """The server that samples rollouts, looked at; None: this program does.

    Args:
      config: the run's.
      workdir: the run directory.
      tokens: of prompt and response together, at most.
      say: where lines for people go.

    Raises:
      EngineError: it does not answer.
      UsageError: it cannot serve this run, or could not read its weights.
    """
    if config.sampler.engine == "own":
        return None
    where = storage.path(config.sampler.endpoint.publish_dir or workdir)
    if storage.is_store(where):
        raise UsageError(
            f"weights cannot be published in {where}: set sampler.endpoint.publish_dir, a folder on a disk that the engine reads"
        )
    engine = Endpoint(config.sampler.endpoint)
    say(engine.check(tokens))
    return engine


def posts(config: EndpointConfig, path: str, name: str) -> list[tuple[str, dict]]:
    """What a server is told of new weights: (path, body) of each request.

    Args:
      config: how.
      path: the directory.
      name: what they are called.
    """
    if config.publisher == "sglang":
        body = {"model_path": path, "weight_version": name, "flush_cache": True}
        return [(config.publish_path or "/update_weights_from_disk", body)]
    body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
    # vLLM keeps what it has computed of prompts, with the weights that were.
    return [(config.publish_path or "/collective_rpc", body), ("/reset_prefix_cache", {})]


def weights_of(engine: Endpoint | None, scores: SamplerWeights, base: BaseModel, workdir, timers: Timers):
    """The weights of whoever samples: `SamplerWeights`, or those published. Arguments as of `PublishedWeights`."""
    return scores if engine is None else PublishedWeights(engine, scores, base, workdir, timers)


class PublishedWeights:
    """A server's weights, in the place of `SamplerWeights`; scores are sampled by this program all the same.

    Args:
      engine: that samples.
      scores: the weights that scores are sampled with.
      base: the base model.
      workdir: the run directory.
      timers: "weights" is timed.
    """

    def __init__(self, engine: Endpoint, scores: SamplerWeights, base: BaseModel, workdir, timers: Timers):
        self._engine, self._base, self._timers = engine, base, timers
        self.for_scores = scores.for_scores
        self._folder, self._now = _folder(engine.config, workdir), None
        self._process = secrets.token_hex(4)  # so that no two runs give weights the same name

    def for_rollouts(self, state: LearnerState, iteration: int) -> Published:
        """What the server has from now on: the weights of this state, or older ones where it is not their turn.

        The first time they are always published: a server does not say which it has.

        Args:
          state: the learner's.
          iteration: from 0.

        Raises:
          EngineError: the server does not answer.
          UsageError: it does not take them.
        """
        version = int(jax.device_get(state.version))
        due = self._now is None or iteration % self._engine.config.publish_every == 0
        if due and (self._now is None or self._now.version != version):
            jax.block_until_ready(state.params)  # the updates before are no part of the time
            with self._timers("weights"):
                self.publish(version, state.params)
        return self._now

    def statistics(self) -> dict[str, int]:
        """For a row of metrics.jsonl: nothing that the sampler does not say."""
        return {}

    def publish(self, version: int, params) -> None:
        """Give the server these parameters.

        Args:
          version: optimizer updates done.
          params: the learner's.
        """
        chief, path = jax.process_index() == 0, self._folder / f"version_{version:08d}"
        how = {"dtype": self._engine.config.publish_dtype, "write": chief, "compare": False}
        with usage_errors():
            self._base.export(path, params, **how)
        name = f"{version}-{self._process}"
        if chief:
            self._tell(path, name)
            for folder in self._folder.glob("version_*"):
                if folder != path:
                    shutil.rmtree(folder)
        # Nobody asks for responses before.
        self._now = Published(version, cluster.of_first("weights of the engine", name))

    def _tell(self, path: pathlib.Path, name: str) -> None:
        for where, body in posts(self._engine.config, str(path), name):
            said = self._engine.wire.post(where, body, limit=_ANSWER_BYTES)
            if isinstance(said, dict) and said.get("success") is False:
                raise UsageError(
                    f"the engine at {self._engine.config.url} does not take the weights in {path}: {str(said.get('message'))[:300]}"
                )


def _folder(config: EndpointConfig, workdir) -> pathlib.Path:
    """Where weights are published. Runs may share a folder of the user's: each has one of its own in there."""
    if not config.publish_dir:
        return (workdir / "published").resolve()
    digest = hashlib.sha256(str(storage.absolute(workdir)).encode()).hexdigest()[:8]
    return pathlib.Path(config.publish_dir).resolve() / f"{workdir.name}_{digest}"
