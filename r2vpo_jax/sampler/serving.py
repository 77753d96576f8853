"""Our own sampler behind requests: those that wait together are decoded together.

A request has its own seed, so with whom it is decoded decides nothing. Shapes are few: rows, prompts and caches are filled
up to powers of two.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from typing import Any, NamedTuple

import jax
import numpy as np

from r2vpo_jax import models, sharding
from r2vpo_jax.models.base import BaseModel
from r2vpo_jax.models.decoder import gather_layers
from r2vpo_jax.models.stops import stop_table
from r2vpo_jax.sampler.decoding import decode, prefill
from r2vpo_jax.sampler.distribution import Sampling
from r2vpo_jax.sampler.endpoint import keys_of
from r2vpo_jax.sampler.weights import rounded_weights

_WINDOW = 0.005  # seconds in which more requests may come before a batch begins
_SMALLEST = 8  # rows, prompt tokens, response tokens


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the requests of one batch have in common."""

    temperature: float
    top_k: int
    top_p: float
    eos_ids: tuple[int, ...]
    stop: tuple[str, ...]


class Request(NamedTuple):
    """One response that is wanted."""

    prompt: list[int]
    max_tokens: int
    seed: int
    settings: Settings


class Response(NamedTuple):
    """It."""

    tokens: list[int]
    logps: list[float]
    ended: bool  # else it has max_tokens
    version: str  # of the weights


class Engine:
    """A model that answers requests, one batch after the other, in a thread of its own.

    Args:
      base: the model, whose weights have not been read.
      weights: how they are rounded (`rounded_weights`).
      batch_size: most rows at one time.
    """

    def __init__(self, base: BaseModel, *, weights: str = "compute", batch_size: int = 256):
        """Raises UsageError where the weights cannot be read."""
        self.base, self._batch_size = base, batch_size
        dtype = base.model.config.compute_dtype
        self._as_served = jax.jit(
            lambda params: rounded_weights(jax.tree.map(lambda x: x.astype(dtype), params), weights)
        )
        self._stop_table = functools.lru_cache(maxsize=16)(lambda strings: stop_table(strings, base.tokenizer))
        self._mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
        self._params, self.version = self._as_served(base.load_params(self._mesh)), "default"
        self._waiting = collections.deque()
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def longest(self) -> int:
        """Tokens of prompt and response together, at most."""
        return self.base.model.config.max_position_embeddings

    def submit(self, request: Request) -> concurrent.futures.Future:
        """A promise of its `Response`."""
        return self._enqueue(request)

    def load(self, path, version: str) -> concurrent.futures.Future:
        """A promise that the requests from now on are answered with the weights of a Hugging Face directory.

        It fails with ValueError or OSError where they are not those of this model; the weights then stay.

        Args:
          path: the directory.
          version: what they are called from then on.
        """
        return self._enqueue((path, version))

    def close(self) -> None:
        """Answer no more."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _enqueue(self, work: Any) -> concurrent.futures.Future:
        future = concurrent.futures.Future()
        with self._news:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append((work, future))
            self._news.notify()
        return future

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._closed)
                if not self._closed and len(self._waiting) < self._batch_size:
                    self._news.wait_for(lambda: self._closed or len(self._waiting) >= self._batch_size, _WINDOW)
                if self._closed:
                    for _, future in self._waiting:
                        future.set_exception(RuntimeError("the engine is closed"))
                    return
                work = self._take()
            futures = [future for _, future in work]
            try:
                results = self._do([each for each, _ in work])
            except Exception as error:  # whoever waits hears of it, and the next requests may go well
                for future in futures:
                    future.set_exception(error)
                continue
            for future, result in zip(futures, results, strict=True):
                future.set_result(result)

    def _take(self) -> list:
        """The first of those that wait, and what can be done together with it."""
        first = self._waiting.popleft()
        if not isinstance(first[0], Request):
            return [first]
        taken, left = [first], collections.deque()
        while self._waiting and len(taken) < self._batch_size:
            other = self._waiting.popleft()
            if not isinstance(other[0], Request):  # new weights: what came later waits for them
                self._waiting.appendleft(other)
                break
            (taken if other[0].settings == first[0].settings else left).append(other)
        self._waiting.extendleft(reversed(left))
        return taken

    def _do(self, work: list) -> list:
        if isinstance(work[0], Request):
            return self._answer(work)
        path, version = work[0]
        self._params, self.version = self._as_served(models.load_params(path, self.base.model, self._mesh)), version
        return [None]

    def _answer(self, requests: list[Request]) -> list[Response]:
        settings = requests[0].settings
        rows = _size(len(requests), self._batch_size)
        prompt_size = _size(max(len(request.prompt) for request in requests), self.longest)
        longest = max(request.max_tokens for request in requests)
        tokens, lengths = np.zeros((rows, prompt_size), np.int32), np.ones(rows, np.int32)
        for row, request in enumerate(requests):
            lengths[row] = len(request.prompt)
            tokens[row, prompt_size - lengths[row] :] = request.prompt
        seeds = [request.seed for request in requests] + [0] * (rows - len(requests))
        wanted = np.arange(rows) < len(requests)
        sampling = Sampling(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_ids=settings.eos_ids,
            stop=self._stop_table(settings.stop),
        )
        how = {"columns": _size(longest, self.longest), "mesh": self._mesh}
        drawn = _draw(
            self.base.model, self._params, tokens, lengths, keys_of(seeds), wanted, sampling, np.int32(longest), **how
        )
        out, logps, length, done = (np.asarray(x) for x in drawn)
        results = []
        for row, request in enumerate(requests):
            number = min(int(length[row]), request.max_tokens)
            ended = bool(done[row]) and int(length[row]) == number
            results.append(Response(out[row, :number].tolist(), logps[row, :number].tolist(), ended, self.version))
        return results


def _size(number: int, most: int) -> int:
    """The next power of two, and no more than the most."""
    return min(max(_SMALLEST, 1 << (number - 1).bit_length()), max(most, number))


@functools.partial(jax.jit, static_argnames=("model", "columns", "mesh"))
def _draw(model, params, tokens, lengths, keys, wanted, sampling, until, *, columns, mesh):
    """Tokens [N, C], log-probabilities [N, C], lengths [N] and whether each has ended [N]: a response to each prompt."""
    with sharding.activate(mesh):
        params = gather_layers(model, params)
        state = prefill(model, params, tokens, lengths, keys[:, None], sampling, columns)
        state = state.replace(done=state.done | ~wanted[:, None])
        state, out, logps = decode(model, params, state, sampling, until=until)
        return out[:, 0], logps[:, 0], state.length[:, 0], state.done[:, 0]
