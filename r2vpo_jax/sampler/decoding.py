"""Prompts -> Rollout: one prefill for each prompt, then a while_loop in which all samples draw a token a step.

Sizes in comments: N prompts, G samples a prompt, B = N * G rows, C columns of the response cache, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import struct

from r2vpo_jax import sharding
from r2vpo_jax.models.decoder import Cache, gather_layers, init_cache, join_cache, split_cache
from r2vpo_jax.rollout import Rollout
from r2vpo_jax.sampler.distribution import Sampling, sampling_logps

CACHE_AXES = (None, "batch", None, "kv_heads", None, None)


@struct.dataclass
class Decoding:
    """Responses in the making, all of them as long. Rows that are done have no meaning but their length."""

    logits: jax.Array  # f32 [N, G, V], of the next token
    keys: jax.Array  # typed [N, G]; the draw at step t takes fold_in(key, t)
    done: jax.Array  # bool [N, G]
    length: jax.Array  # int32 [N, G], tokens so far
    found: jax.Array | None  # int [N, G], how much of a stop string is there (`models.stops`); None without these
    cache: Cache  # cache.response_length is the number of steps done


def prefill(model, params, tokens, lengths, keys, sampling: Sampling, columns: int) -> Decoding:
    """The state before the first token.

    Args:
      model, params: as for `sample`, the layers gathered.
      tokens, lengths: int32 [N, P] and [N], as for `sample`.
      keys: typed [N, G].
      sampling: as for `sample`.
      columns: C, tokens that the cache has room for.
    """
    num_prompts, prompt_size = tokens.shape
    group = keys.shape[1]
    mask = jnp.arange(prompt_size) >= (prompt_size - lengths)[:, None]
    cache = init_cache(model.config, num_prompts, prompt_size, group, columns)
    cache = cache.replace(
        response_key=sharding.constrain(cache.response_key, *CACHE_AXES),
        response_value=sharding.constrain(cache.response_value, *CACHE_AXES),
    )
    hidden, cache = model.apply({"params": params}, tokens, mask=mask, cache=cache, method="hidden_states")
    logits = _logits(model, params, unembedding(model, params), hidden[:, -1])  # [N, V]
    return Decoding(
        logits=jnp.broadcast_to(logits[:, None], (num_prompts, group, logits.shape[-1])),
        keys=keys,
        done=jnp.zeros((num_prompts, group), bool),
        length=jnp.zeros((num_prompts, group), jnp.int32),
        found=None if sampling.stop is None else jnp.zeros((num_prompts, group), sampling.stop.dtype),
        cache=cache,
    )


def decode(
    model, params, state: Decoding, sampling: Sampling, *, enough=None, until=None, axis_name: str | None = None
) -> tuple[Decoding, jax.Array, jax.Array]:
    """Draw tokens until all rows are done or the cache is full.

    Args:
      model, params: as for `sample`, the layers gathered.
      state: where to go on.
      sampling: as for `sample`.
      enough: int32 [], also stop once no more rows than this are not done; default 0.
      until: int32 [], also stop once each row has as many tokens; default C.
      axis_name: as for `sample`.

    Returns:
      The state afterwards, and of the tokens drawn here int32 [N, G, C] and their log-probabilities f32 [N, G, C], in
      the columns of the cache; elsewhere, and where a row was done before, the padding token and 0.
    """
    kernel = unembedding(model, params)
    eos_ids = jnp.asarray(sampling.eos_ids, jnp.int32).reshape(-1)
    stop = None if sampling.stop is None else jnp.asarray(sampling.stop)
    size = state.cache.response_key.shape[4]

    def draw(logits, step):
        """One token a row from [N, G, V] logits: (tokens, their log-probabilities)."""
        logps = sampling_logps(logits, sampling)
        step_keys = jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, step)))(state.keys)
        gumbel = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[-1:])))(step_keys)
        token = jnp.argmax(logps + gumbel, axis=-1).astype(jnp.int32)
        chosen = jnp.arange(logits.shape[-1]) == token[..., None]
        return token, jnp.sum(jnp.where(chosen, logps, 0.0), axis=-1)

    def body(carry):
        step, logits, done, out, logp_out, length, cache, found = carry
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
        return step + 1, _logits(model, params, kernel, hidden[:, :, 0]), done, out, logp_out, length, cache, found

    end = size if until is None else jnp.minimum(until, size)

    def unfinished(carry):
        done = carry[2]
        some = ~jnp.all(done) if enough is None else jnp.sum(~done) > enough
        return (carry[0] < end) & (some if axis_name is None else jax.lax.pmax(some, axis_name))

    shape = state.done.shape
    carry = (
        state.cache.response_length,
        state.logits,
        state.done,
        jnp.full((*shape, size), sampling.pad_id, jnp.int32),
        jnp.zeros((*shape, size), jnp.float32),
        state.length,
        split_cache(model, state.cache),
        state.found,
    )
    _, logits, done, out, logp_out, length, cache, found = jax.lax.while_loop(unfinished, body, carry)
    return state.replace(logits=logits, done=done, length=length, found=found, cache=join_cache(cache)), out, logp_out


def state_axes(state: Decoding) -> Decoding:
    """The logical axes of each array of a state, as tuples."""

    def rows(x):
        return ("batch",) + (None,) * (x.ndim - 1)

    prompts = (None, "batch", "kv_heads", None, None)
    return Decoding(
        logits=("batch", None, "vocab"),
        **{name: jax.tree.map(rows, getattr(state, name)) for name in ("keys", "done", "length", "found")},
        cache=state.cache.replace(
            prompt_key=prompts,
            prompt_value=prompts,
            prompt_mask=rows(state.cache.prompt_mask),
            response_key=CACHE_AXES,
            response_value=CACHE_AXES,
            response_length=(),
        ),
    )


def placed(state: Decoding) -> Decoding:
    """Pinned to one layout: programs that take it are then compiled once, whichever program made it."""
    axes = state_axes(state)
    return jax.tree.map(
        lambda axes, x: sharding.constrain(x, *axes), axes, state, is_leaf=lambda x: isinstance(x, tuple)
    )


def row_keys(key, problem_ids, numbers):
    """The key of each row, typed [N, G]: of its problem int32 [N] and its number in the group int32 [G]."""

    def of(problem, number):
        return jax.random.fold_in(jax.random.fold_in(key, problem), number)

    return jax.vmap(lambda problem: jax.vmap(lambda number: of(problem, number))(numbers))(problem_ids)


def unembedding(model, params):
    """The kernel of `_logits`, made once before a loop."""
    return model.apply({"params": params}, method="unembedding")


def _logits(model, params, kernel, hidden):
    logits = model.apply({"params": params}, hidden, kernel, method="unembed")
    # Whole rows to the devices that draw them: sorting and drawing need no further communication.
    return sharding.constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")


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
    problem_ids = jnp.arange(tokens.shape[0]) if problem_ids is None else problem_ids
    tokens = sharding.constrain(tokens, "batch", None)
    keys = row_keys(key, problem_ids, first_sample + jnp.arange(sampling.group_size))
    # Decoding reads all weights for a few rows a token: left sharded, they would be gathered at every token.
    params = gather_layers(model, params)
    state = prefill(model, params, tokens, lengths, keys, sampling, sampling.max_response_length)
    state, out, logps = decode(model, params, state, sampling, axis_name=axis_name)

    def rows(x):
        return x.reshape(-1, *x.shape[2:])

    return assemble(
        jnp,
        tokens,
        lengths,
        problem_ids,
        rows(out),
        rows(logps),
        rows(state.length),
        rows(state.done),
        sampling=sampling,
        version=version,
    )


def assemble(np, tokens, lengths, problem_ids, out, logps, length, done, *, sampling: Sampling, version) -> Rollout:
    """The Rollout of N prompts and their B responses.

    Args:
      np: the module of the arrays: numpy, or jax.numpy.
      tokens, lengths, problem_ids: [N, P], [N] and [N].
      out, logps: [B, T].
      length, done: [B].
      sampling: that they were drawn with.
      version: stamped on the rollout.
    """
    batch = out.shape[0]

    def per_group(x):
        return np.repeat(x, sampling.group_size, axis=0)

    nan = np.full((batch,), np.nan, np.float32)
    return Rollout(
        tokens=np.concatenate([per_group(tokens), out], axis=1),
        prompt_length=per_group(lengths).astype(np.int32),
        response_length=length,
        truncated=~done,
        behavior_logp=logps,
        temperature=np.full((batch,), sampling.temperature, np.float32),
        reward=nan,
        outcome=np.full((batch,), -1, np.int32),
        advantage=nan,
        keep=np.ones((batch,), bool),
        group_id=per_group(problem_ids).astype(np.int32),
        rollout_id=np.arange(batch, dtype=np.int32),
        version=np.full((batch,), version, np.int32),
    )
