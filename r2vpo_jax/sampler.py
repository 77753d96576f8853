"""Prompts -> Rollout: one prefill a prompt, then one while_loop that decodes all samples in lock-step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r2vpo_jax import sharding
from r2vpo_jax.config.run import SAMPLING_WEIGHTS
from r2vpo_jax.models.decoder import gather_layers, init_cache, split_cache
from r2vpo_jax.rollout import Rollout

_NEVER = -1e30


@struct.dataclass
class Sampling:
    """How to sample. The first three are traced: changing them does not recompile."""

    temperature: jax.Array | float = 1.0  # 0: greedy
    top_k: jax.Array | int = 0  # keep the k most likely tokens; 0: all
    top_p: jax.Array | float = 1.0  # keep the smallest set of tokens with this much probability; 1: all
    group_size: int = struct.field(pytree_node=False, default=1)  # samples a prompt
    max_response_length: int = struct.field(pytree_node=False, default=128)
    eos_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    pad_id: int = struct.field(pytree_node=False, default=0)  # what is written past the end
    stop: jax.Array | None = None  # int [S, V] of `models.stops.stop_table`: strings that end a response as an EOS does


def _truncated_logits(logits, top_k, top_p):
    """Logits with everything outside top-k and top-p at -1e30. [..., V]"""

    def truncate(logits):
        descending = jnp.sort(logits, axis=-1)[..., ::-1]
        k = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
        kth = jnp.take_along_axis(descending, jnp.full((*logits.shape[:-1], 1), k - 1), axis=-1)
        probabilities = jax.nn.softmax(jnp.where(descending >= kth, descending, _NEVER), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the more likely tokens
        inside = (before < top_p) & (descending >= kth)
        threshold = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= threshold, logits, _NEVER)

    return jax.lax.cond((top_k > 0) | (top_p < 1), truncate, lambda x: x, logits)


def sampling_logps(logits, sampling: Sampling):
    """Log-probabilities [..., V] of the distribution that is really sampled from: temperature, top-k, top-p.

    At temperature 0 it is a point mass on the most likely token.
    """
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    greedy = temperature == 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)
    logps = jax.nn.log_softmax(_truncated_logits(scaled, sampling.top_k, sampling.top_p), axis=-1)
    best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(greedy, jnp.where(best, 0.0, _NEVER), logps)


def rounded_weights(params, how: str):
    """Parameters as a sampler of lower precision has them; activations stay as they are.

    It stands in for inference engines that compute otherwise than the learner: the ratio then is not 1 on fresh data.

    Args:
      params: of a `models.Decoder`.
      how: "compute" (unchanged), "bfloat16" (every weight to 8 bits of mantissa), or "int8" (every matrix to 255 levels, evenly
        spaced between plus and minus the largest weight of its layer and output channel; vectors unchanged).

    Raises:
      ValueError: an unknown `how`.
    """
    if how not in SAMPLING_WEIGHTS:
        raise ValueError(f"unknown weights {how!r}; one of {SAMPLING_WEIGHTS}")

    def rounded(path, x):
        stacked = path[0].key == "layers"  # axis 0 is the layer
        if how == "bfloat16":
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        if how == "compute" or x.ndim < 2 + stacked:
            return x
        largest = jnp.max(jnp.abs(x), axis=tuple(range(stacked, x.ndim - 1)), keepdims=True)
        level = jnp.where(largest == 0, 1.0, largest / 127)
        return (jnp.round(x / level) * level).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(rounded, params)


def sample(
    model,
    params,
    tokens,
    lengths,
    key,
    sampling: Sampling,
    *,
    problem_ids=None,
    first_sample=0,
    version=0,
    axis_name: str | None = None,
) -> Rollout:
    """Sample G responses to each of N prompts. Pure and jittable (`model` static).

    The key of a draw is fold_in(key, problem, sample, step), so that batching, buckets and the number of
    devices do not change it.

    Args:
      model: a `models.Decoder`.
      params: its parameters.
      tokens: int32 [N, P], prompts left-padded.
      lengths: int32 [N], prompt tokens, at least 1.
      key: a typed PRNG key.
      sampling: temperature and so on.
      problem_ids: int32 [N], stable identities of the prompts (default 0..N-1); also the `group_id`.
      first_sample: number of the first sample of each group, to draw more samples of the same problems.
      version: stamped on the rollout.
      axis_name: of a vmap that this is under. All its members then stop together, once the last is done: a loop whose
        end differs between them would copy the whole cache at every token.

    Returns:
      A Rollout of B = N * G rows; reward and advantage NaN, rollout_id 0..B-1.
    """
    config = model.config
    num_prompts, prompt_size = tokens.shape
    group, size = sampling.group_size, sampling.max_response_length
    problem_ids = jnp.arange(num_prompts) if problem_ids is None else problem_ids
    tokens = sharding.constrain(tokens, "batch", None)

    def row_key(problem, number):
        return jax.random.fold_in(jax.random.fold_in(key, problem), number)

    numbers = first_sample + jnp.arange(group)
    keys = jax.vmap(lambda problem: jax.vmap(lambda n: row_key(problem, n))(numbers))(problem_ids)  # [N, G]

    # Decoding reads all weights for a few rows a token: left sharded, they would be gathered at every token.
    params = gather_layers(model, params)
    kernel = model.apply({"params": params}, method="unembedding")

    def next_logits(hidden):
        logits = model.apply({"params": params}, hidden, kernel, method="unembed")
        # Whole rows to the devices that draw them: sorting and drawing need no further communication.
        return sharding.constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")

    # Prefill: once a prompt, not once a sample.
    mask = jnp.arange(prompt_size) >= (prompt_size - lengths)[:, None]
    cache = init_cache(config, num_prompts, prompt_size, group, size)
    axes = (None, "batch", None, "kv_heads", None, None)
    cache = cache.replace(
        response_key=sharding.constrain(cache.response_key, *axes),
        response_value=sharding.constrain(cache.response_value, *axes),
    )
    hidden, cache = model.apply({"params": params}, tokens, mask=mask, cache=cache, method="hidden_states")
    cache = split_cache(model, cache)
    logits = next_logits(hidden[:, -1])  # [N, V]
    logits = jnp.broadcast_to(logits[:, None], (num_prompts, group, logits.shape[-1]))

    eos_ids = jnp.asarray(sampling.eos_ids, jnp.int32).reshape(-1)
    stop = None if sampling.stop is None else jnp.asarray(sampling.stop)

    def draw(logits, step):
        """One token a row from [N, G, V] logits: (tokens, their log-probabilities)."""
        logps = sampling_logps(logits, sampling)
        step_keys = jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, step)))(keys)
        gumbel = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[-1:])))(step_keys)
        token = jnp.argmax(logps + gumbel, axis=-1).astype(jnp.int32)
        chosen = jnp.arange(logits.shape[-1]) == token[..., None]
        return token, jnp.sum(jnp.where(chosen, logps, 0.0), axis=-1)

    def body(state):
        step, logits, done, out, logp_out, length, cache, found = state
        token, logp = draw(logits, step)
        token = jnp.where(done, sampling.pad_id, token)
        out = jax.lax.dynamic_update_index_in_dim(out, token, step, axis=2)
        logp_out = jax.lax.dynamic_update_index_in_dim(logp_out, jnp.where(done, 0.0, logp), step, axis=2)
        length = length + ~done
        done = done | jnp.any(token[..., None] == eos_ids, axis=-1)
        if found is not None:  # the response keeps the token that completes a string
            found = stop[found, token]
            done = done | (found == len(stop) - 1)
        hidden, cache = model.apply({"params": params}, token[..., None], cache=cache, method="hidden_states")
        return step + 1, next_logits(hidden[:, :, 0]), done, out, logp_out, length, cache, found

    state = (
        jnp.int32(0),
        logits,
        jnp.zeros((num_prompts, group), bool),
        jnp.full((num_prompts, group, size), sampling.pad_id, jnp.int32),
        jnp.zeros((num_prompts, group, size), jnp.float32),
        jnp.zeros((num_prompts, group), jnp.int32),
        cache,
        None if stop is None else jnp.zeros((num_prompts, group), stop.dtype),
    )

    def unfinished(state):
        some = ~jnp.all(state[2])
        return (state[0] < size) & (some if axis_name is None else jax.lax.pmax(some, axis_name))

    _, _, done, out, logp_out, length, _, _ = jax.lax.while_loop(unfinished, body, state)

    def rows(x):
        return x.reshape(num_prompts * group, *x.shape[2:])

    def per_group(x):
        return jnp.repeat(x, group, axis=0)

    batch = num_prompts * group
    nan = jnp.full((batch,), jnp.nan, jnp.float32)
    return Rollout(
        tokens=jnp.concatenate([per_group(tokens), rows(out)], axis=1),
        prompt_length=per_group(lengths).astype(jnp.int32),
        response_length=rows(length),
        truncated=~rows(done),
        behavior_logp=rows(logp_out),
        temperature=jnp.full((batch,), sampling.temperature, jnp.float32),
        reward=nan,
        outcome=jnp.full((batch,), -1, jnp.int32),
        advantage=nan,
        keep=jnp.ones((batch,), bool),
        group_id=per_group(problem_ids).astype(jnp.int32),
        rollout_id=jnp.arange(batch, dtype=jnp.int32),
        version=jnp.full((batch,), version, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _sample(model, params, tokens, lengths, key, sampling, problem_ids, first_sample, version, mesh):
    with sharding.activate(mesh):
        return sample(
            model,
            params,
            tokens,
            lengths,
            key,
            sampling,
            problem_ids=problem_ids,
            first_sample=first_sample,
            version=version,
        )


def generate(
    model,
    params,
    tokens,
    lengths,
    key,
    sampling: Sampling,
    *,
    mesh,
    problem_ids,
    first_sample=0,
    version=0,
    batch_size=None,
    buckets=(),
) -> Rollout:
    """`sample` for any number of prompts, from and to the host.

    Args:
      model, params, key, sampling, first_sample, version: as for `sample`.
      tokens: int32 [N, P] NumPy, left-padded.
      lengths: int32 [N].
      mesh: the run's mesh.
      problem_ids: int32 [N].
      batch_size: prompts in one call (default all); the last batch is filled up and cut again.
      buckets: prompt sizes below P; a prompt is computed at the smallest that holds it. One program each.

    Returns:
      A Rollout of NumPy arrays in the order of the prompts, with prompt size P.

    Raises:
      ValueError: a prompt is empty or longer than P, an EOS id is outside of the vocabulary, or temperature,
        top_k or top_p is out of range.
    """
    tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
    problem_ids = np.asarray(problem_ids, np.int32)
    num_prompts, prompt_size = tokens.shape
    if num_prompts == 0 or lengths.min() < 1 or lengths.max() > prompt_size:
        raise ValueError(
            f"prompt lengths must be between 1 and {prompt_size}, got {lengths.min(initial=0)} to {lengths.max(initial=0)}"
        )
    if not (sampling.temperature >= 0 and sampling.top_k >= 0 and 0 < sampling.top_p <= 1):
        raise ValueError(
            f"sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {sampling.temperature}, "
            f"{sampling.top_k} and {sampling.top_p}"
        )
    if not all(0 <= i < model.config.vocab_size for i in sampling.eos_ids):
        raise ValueError(
            f"end-of-text ids {sampling.eos_ids} are not all in the vocabulary of {model.config.vocab_size}"
        )
    batch_size = min(batch_size or num_prompts, num_prompts)

    sizes = sorted({min(b, prompt_size) for b in buckets} | {prompt_size})
    bucket_of = np.searchsorted(sizes, lengths)
    parts, order = [], []
    for number, size in enumerate(sizes):
        members = np.flatnonzero(bucket_of == number)
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            filled = np.resize(chosen, batch_size)
            part = _sample(
                model,
                params,
                sharding.put_batch(tokens[filled, prompt_size - size :], mesh),
                sharding.put_batch(lengths[filled], mesh),
                key,
                sampling,
                sharding.put_batch(problem_ids[filled], mesh),
                first_sample,
                version,
                mesh,
            )
            part = sharding.to_host(part)
            part = jax.tree.map(lambda x: x[: len(chosen) * sampling.group_size], part)  # noqa: B023
            left = np.full((len(part.tokens), prompt_size - size), sampling.pad_id, np.int32)
            parts.append(part.replace(tokens=np.concatenate([left, part.tokens], axis=1)))
            order.append(chosen)
    rank = np.argsort(np.concatenate(order), kind="stable")
    rows = (rank[:, None] * sampling.group_size + np.arange(sampling.group_size)).reshape(-1)
    rollout = jax.tree.map(lambda *x: np.concatenate(x)[rows], *parts)
    return rollout.replace(rollout_id=np.arange(len(rows), dtype=np.int32))
