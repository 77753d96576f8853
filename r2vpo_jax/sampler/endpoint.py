"""A server in the place of the sampler: an OpenAI-compatible /v1/completions with token ids and log-probabilities.

One request is one response. Its seed is the 64 bits of the key that `sample` would draw it with, so that a server that
samples as this program does (`serving`) gives the same tokens. Behavior log-probabilities are taken as the server gives
them. Where a response ends is found here, by the rules of the run.
"""

import concurrent.futures
import functools
import os
import time
from collections.abc import Iterable

import jax
import numpy as np

from r2vpo_jax.config.sampling import EndpointConfig
from r2vpo_jax.errors import EngineError, UsageError
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.rows import Rows
from r2vpo_jax.sampler import answers
from r2vpo_jax.sampler.decoding import assemble, row_keys
from r2vpo_jax.sampler.distribution import Sampling
from r2vpo_jax.sampler.protocol import Published
from r2vpo_jax.sampler.wire import Wire

_BYTES, _BYTES_A_TOKEN = 1 << 20, 1 << 10  # of an answer, at most
_MOST_BIASES = 4096  # rows of the embedding without a token that are named in each request


class Endpoint:
    """The server: that it is there, that it serves one model, and what weights it has.

    Args:
      config: where and how.
    """

    def __init__(self, config: EndpointConfig):
        """Raises UsageError where the key that is asked for is not in the environment."""
        self.config = config
        key = ""
        if config.key_variable:
            key = os.environ.get(config.key_variable, "")
            if not key:
                raise UsageError(
                    f"sampler.endpoint.key_variable={config.key_variable}: there is no such variable in the environment"
                )
        self.wire = Wire(config.url, timeout=config.timeout, patience=config.patience, key=key)
        self.model = config.model

    def check(self, tokens: int) -> str:
        """Look whether the server can serve the run, and return a line about it for people.

        Args:
          tokens: of prompt and response together, at most.

        Raises:
          EngineError: it does not answer.
          UsageError: it has not the model, or one whose texts are shorter.
        """
        listed = self.wire.get("/v1/models", limit=_BYTES)
        models = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(models, list) or not all(
            isinstance(m, dict) and isinstance(m.get("id"), str) for m in models
        ):
            raise UsageError(f"{self.config.url}/v1/models lists no models: it must be an OpenAI-compatible server")
        names = [model["id"] for model in models]
        if not self.model and len(names) != 1:
            raise UsageError(
                f"the engine at {self.config.url} serves {_listed(names)}: name one by sampler.endpoint.model"
            )
        self.model = self.model or names[0]
        if self.model not in names:
            raise UsageError(
                f"the engine at {self.config.url} does not serve sampler.endpoint.model={self.model}, but {_listed(names)}"
            )
        longest = models[names.index(self.model)].get("max_model_len")
        if isinstance(longest, int) and longest < tokens:
            raise UsageError(
                f"the engine at {self.config.url} takes {longest} tokens of prompt and response together, and this run has up "
                f"to {tokens}; start it with room for them (vLLM: --max-model-len, SGLang: --context-length)"
            )
        return f"rollouts: sampled by {self.model} at {self.config.url}; scores are sampled here"


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(_shown, names[:5]))
    return f"{shown or 'no model'}{' …' if len(names) > 5 else ''}"


def _shown(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:80]


class EndpointSampler:
    """A `protocol.Sampler` whose weights are `Published`.

    Args:
      endpoint: checked.
      model: the run's decoder: which tokens there are.
      stop: strings that end a response.
    """

    def __init__(self, endpoint: Endpoint, model, stop: tuple[str, ...] = ()):
        self._endpoint, self._stop = endpoint, list(stop)
        self._num_tokens = model.config.num_tokens or model.config.vocab_size
        unknown = range(self._num_tokens, model.config.vocab_size)
        # Rows of the embedding that no token has: never sampled here, and scored accordingly.
        self._biases = {str(i): -100 for i in unknown} if len(unknown) <= _MOST_BIASES else {}
        self._counts = np.zeros(4)  # responses, requests that were repeated, seconds of all requests, tokens
        self._seconds = 0.0
        self._names_weights = False

    def sample(
        self, weights: Published, tokens, lengths, key, sampling: Sampling, *, problem_ids, version: int, rows: Rows
    ) -> Rollout:
        """As `Sampler.sample`; stamps the version of `weights`.

        Raises:
          EngineError: the server does not answer.
          UsageError: it gives an answer that cannot be learned from.
        """
        tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
        problem_ids = np.asarray(problem_ids, np.int32)
        begun = time.perf_counter()
        seeds = seeds_of(key, problem_ids[rows.groups], sampling.group_size)
        prompts = [tokens[group, tokens.shape[1] - lengths[group] :].tolist() for group in rows.groups]
        requests = [(prompts[i // sampling.group_size], seed) for i, seed in enumerate(seeds.tolist())]
        drawn = _empty(len(requests), sampling)
        if rows.leads:
            self._draw(requests, weights, sampling, drawn)
        drawn = rows.told(drawn)
        self._seconds += time.perf_counter() - begun
        rollout = assemble(
            np,
            *(x[rows.groups] for x in (tokens, lengths, problem_ids)),
            *drawn,
            sampling=sampling,
            version=weights.version,
        )
        self._age = version - weights.version
        self._said = rows.exchange(self._counts.tolist())
        return rollout.replace(rollout_id=rows.index.astype(np.int32))

    def statistics(self) -> dict[str, float]:
        responses, retries, waited, tokens = np.sum(self._said, axis=0).tolist()
        seconds, self._seconds = self._seconds, 0.0
        self._counts[:] = 0
        return {
            "engine/requests": int(responses),
            "engine/retries": int(retries),
            "engine/weights_age": int(self._age),
            "time/engine_request": waited / max(responses, 1),
            "throughput/engine_tokens_per_second": tokens / max(seconds, 1e-9),
        }

    def _draw(self, requests, weights: Published, sampling: Sampling, drawn) -> None:
        """Fill `drawn` with the responses to all requests; the first failure ends them all."""
        wire = self._endpoint.wire
        body = self._body(sampling)
        ask = functools.partial(self._ask, body, sampling, weights)
        pool = concurrent.futures.ThreadPoolExecutor(self._endpoint.config.concurrency, "engine")
        try:
            futures = {pool.submit(ask, *request): row for row, request in enumerate(requests)}
            for future in concurrent.futures.as_completed(futures):
                self._keep(future.result(), futures[future], drawn)
        except BaseException:
            wire.interrupt()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            wire.close()
        self._counts[1] += wire.take_retries()

    def _keep(self, response, row: int, drawn) -> None:
        tokens, logps, done, seconds = response
        out, behavior, length, ended = drawn
        out[row, : len(tokens)], behavior[row, : len(tokens)] = tokens, logps
        length[row], ended[row] = len(tokens), done
        self._counts += (1, 0, seconds, len(tokens))

    def _body(self, sampling: Sampling) -> dict:
        """What all requests have in common. All is said: servers have defaults of their own, and of the model's."""
        body = {
            "model": self._endpoint.model,
            "max_tokens": sampling.max_response_length,
            "n": 1,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": int(sampling.top_k) or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,  # of no token but the sampled one
            "stop_token_ids": list(sampling.eos_ids),
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if self._stop:
            body["stop"] = self._stop
        if self._biases:
            body["logit_bias"] = self._biases
        return body

    def _ask(self, body: dict, sampling: Sampling, weights: Published, prompt: list[int], seed: int):
        """(tokens, log-probabilities, whether it has ended, seconds) of one response."""
        begun = time.perf_counter()
        body = body | {"prompt": prompt}
        if self._endpoint.config.seeds:
            body["seed"] = seed
        limit = _BYTES + _BYTES_A_TOKEN * (len(prompt) + sampling.max_response_length)
        said = self._endpoint.wire.post("/v1/completions", body, limit=limit)
        answer = answers.read(said, prompt, sampling, self._num_tokens)
        self._check_weights(answer.weights, weights.name)
        length, ended = answers.cut(answer, sampling, bool(self._stop))
        return answer.tokens[:length], answer.logps[:length], ended, time.perf_counter() - begun

    def _check_weights(self, said: str | None, given: str) -> None:
        """A server that takes no name always says the same; one that has named ours was restarted, or given others."""
        self._names_weights = self._names_weights or said == given
        if said is not None and said != given and (self._names_weights or said != "default"):
            raise EngineError(
                f"the engine at {self._endpoint.config.url} answers with the weights {_shown(said)}, and was given {given}: it was "
                "restarted, or another run uses it; the same command gives it the weights of this run again"
            )


def _empty(number: int, sampling: Sampling):
    shape = (number, sampling.max_response_length)
    return (
        np.full(shape, sampling.pad_id, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(number, np.int32),
        np.zeros(number, bool),
    )


@functools.partial(jax.jit, static_argnames="group_size")
def _words(key, problem_ids, group_size):
    return jax.random.key_data(row_keys(key, problem_ids, np.arange(group_size)))


def seeds_of(key, problem_ids: np.ndarray, group_size: int) -> np.ndarray:
    """The first 64 bits of the keys of rows (`decoding.row_keys`), int64 [n * G].

    Args:
      key: a typed PRNG key.
      problem_ids: int32 [n].
      group_size: G.
    """
    words = np.asarray(_words(key, problem_ids, group_size)).reshape(len(problem_ids) * group_size, -1)
    return np.ascontiguousarray(words[:, :2], np.uint32).view(np.int64)[:, 0]


def keys_of(seeds: Iterable[int]) -> jax.Array:
    """Typed keys [n] that `seeds_of` made whole numbers of."""
    words = np.array([seed & (2**64 - 1) for seed in seeds], np.uint64).view(np.uint32).reshape(-1, 2)
    return jax.random.wrap_key_data(words)
