"""The decoder: one function of tokens and parameters, however it is padded, cached or scanned.

What it computes is held against Transformers in test_huggingface.py; here the ways to compute it are held
against each other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r2vpo_jax import models, sharding
from r2vpo_jax.models import decoder

CONFIG = models.DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=100.0,
)
MODEL = models.Decoder(CONFIG)
TOLERANCE = 1e-5  # times the largest logit: float32 sums in another order

# Four prompts of ragged length in five columns, padded on the left; the last is empty. Two samples each.
LENGTHS = np.array([5, 3, 1, 0])
GROUP, PROMPT, RESPONSE = 2, 5, 4
SPARE = 2  # columns of the response cache that stay empty


# These tests compile many programs and run each once or twice: they need no optimized code.
jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnames="method")
def jitted_apply(model, params, *args, method, **kwargs):
    return model.apply({"params": params}, *args, method=method, **kwargs)


def apply(model, params, *args, method=None, **kwargs):
    """What the model answers, as NumPy arrays: masking those compiles nothing."""
    return jax.device_get(jitted_apply(model, params, *args, method=method, **kwargs))


def informative(params, seed=0):
    """Random parameters none of which is at a value that hides it (biases at 0, norms at 1)."""
    rng = np.random.default_rng(seed)

    def perturb(path, leaf):
        spread = {"embed": 1.0, "lm_head": 0.3, "kernel": 0.3, "bias": 0.3, "scale": 0.2}[path[-1].key]
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(center + spread * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(perturb, params)


@pytest.fixture(scope="module")
def params():
    return informative(models.abstract_params(MODEL))


def assert_close(actual, expected, tolerance=TOLERANCE):
    scale = np.max(np.abs(expected))
    assert scale > 1, "nothing to compare: the logits are small"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


# ---- with a cache ----


@pytest.fixture(scope="module")
def ragged(params):
    """(prompts, prompt mask, responses, logits [N, G, P+T, V] of the full forward)."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, CONFIG.vocab_size, (len(LENGTHS), PROMPT))
    mask = np.arange(PROMPT) >= PROMPT - LENGTHS[:, None]
    responses = rng.integers(0, CONFIG.vocab_size, (len(LENGTHS), GROUP, RESPONSE))
    tokens = np.concatenate([np.repeat(prompts[:, None], GROUP, axis=1), responses], axis=-1)
    full_mask = np.broadcast_to(np.pad(mask, [(0, 0), (0, RESPONSE)], constant_values=True)[:, None], tokens.shape)
    flat = (len(LENGTHS) * GROUP, PROMPT + RESPONSE)
    logits = apply(MODEL, params, tokens.reshape(flat), mask=full_mask.reshape(flat))
    return prompts, mask, responses, np.asarray(logits).reshape(*tokens.shape, -1)


@pytest.mark.parametrize(
    ("steps", "scan_layers"),
    [((1, 1, 1, 1), False), ((1, 3), False), ((4,), False), ((1, 1, 1, 1), True)],
)
def test_cached_decoding_gives_the_logits_of_the_full_forward(steps, scan_layers, params, ragged):
    prompts, mask, responses, expected = ragged
    model = models.Decoder(dataclasses.replace(CONFIG, scan_layers=scan_layers))
    cache = models.init_cache(CONFIG, len(LENGTHS), PROMPT, GROUP, RESPONSE + SPARE)
    logits, cache = apply(model, params, prompts, mask=mask, cache=cache)
    assert logits.shape == (*prompts.shape, CONFIG.vocab_size)
    assert_close(logits[mask], expected[:, 0, :PROMPT][mask])
    start = 0
    for size in steps:
        logits, cache = apply(model, params, responses[..., start : start + size], cache=cache)
        assert_close(logits, expected[..., PROMPT + start : PROMPT + start + size, :])
        start += size
        assert cache.response_length == start


def test_a_split_cache_is_the_same_cache(params, ragged):
    """As the sampler decodes: parameters and cache apart by layer, and together again."""
    prompts, mask, responses, expected = ragged
    cache = models.init_cache(CONFIG, len(LENGTHS), PROMPT, GROUP, RESPONSE + SPARE)
    apart = decoder.gather_layers(MODEL, params)
    _, cache = apply(MODEL, apart, prompts, mask=mask, cache=cache)
    logits, together = apply(MODEL, apart, responses, cache=cache)
    assert_close(logits, expected[..., PROMPT:, :])
    split = decoder.split_cache(MODEL, cache)
    for step in range(RESPONSE):
        logits, split = apply(MODEL, apart, responses[..., step : step + 1], cache=split)
        assert_close(logits, expected[..., PROMPT + step : PROMPT + step + 1, :])
    joined = decoder.join_cache(split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), joined, together)
    scanned = models.Decoder(dataclasses.replace(CONFIG, scan_layers=True))
    assert decoder.split_cache(scanned, cache) is decoder.join_cache(cache) is cache


def test_the_prompt_is_read_once_for_its_group():
    """No array of a step's program holds a copy of the prompt for each sample."""
    prompts, prompt, group, columns = 3, 7, 5, 11
    config = dataclasses.replace(CONFIG, num_layers=1)
    model = models.Decoder(config)

    def run(model, params, cache, tokens):
        apart, cache = decoder.gather_layers(model, params), decoder.split_cache(model, cache)

        def body(state):
            hidden, cache = model.apply({"params": apart}, state[0], cache=state[1], method="hidden_states")
            return (jnp.argmax(hidden, -1).astype(jnp.int32), cache)

        return jax.lax.while_loop(lambda s: s[1].response_length < columns, body, (tokens, cache))

    cache = jax.eval_shape(lambda: models.init_cache(config, prompts, prompt, group, columns))
    tokens = jax.ShapeDtypeStruct((prompts, group, 1), jnp.int32)
    text = str(jax.make_jaxpr(lambda *args: run(model, *args))(models.abstract_params(model), cache, tokens))
    loop = text[text.index("while[") :]
    assert f"f32[{prompts},{group},2,{prompt},4]" not in loop, "the prompt is not repeated for the samples"
    assert f"f32[{prompts * group},2,{prompt},4]" not in loop


def test_the_samples_of_a_group_do_not_see_each_other(params, ragged):
    prompts, mask, responses, _ = ragged
    cache = models.init_cache(CONFIG, len(LENGTHS), PROMPT, GROUP, RESPONSE + SPARE)
    _, cache = apply(MODEL, params, prompts, mask=mask, cache=cache)
    other = responses.copy()
    other[:, 1] = (other[:, 1] + 1) % CONFIG.vocab_size
    before, after = (apply(MODEL, params, tokens, cache=cache)[0] for tokens in (responses, other))
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert np.max(np.abs(before[:, 1] - after[:, 1])) > 0.1


def test_the_prompt_is_stored_once_for_its_group():
    cache = jax.eval_shape(lambda: models.init_cache(CONFIG, 3, PROMPT, GROUP, RESPONSE))
    assert cache.prompt_key.shape == cache.prompt_value.shape == (2, 3, 2, PROMPT, 4)
    assert cache.response_key.shape == cache.response_value.shape == (2, 3, GROUP, 2, RESPONSE, 4)
    bfloat16 = dataclasses.replace(CONFIG, compute_dtype=jnp.bfloat16)
    cache = jax.eval_shape(lambda: models.init_cache(bfloat16, 3, PROMPT, GROUP, RESPONSE))
    assert cache.prompt_key.dtype == cache.response_value.dtype == jnp.bfloat16


# ---- padding, positions, causality ----


def test_more_padding_changes_nothing(params, ragged):
    prompts, mask, _, expected = ragged
    rows = LENGTHS > 0
    extra = 3
    wide = np.pad(prompts, [(0, 0), (extra, 0)], constant_values=7)
    wide_mask = np.pad(mask, [(0, 0), (extra, 0)])
    logits = apply(MODEL, params, wide, mask=wide_mask)
    assert np.all(np.isfinite(logits))  # also where a row attends to nothing
    assert_close(logits[wide_mask], expected[:, 0, :PROMPT][mask])

    right = apply(MODEL, params, np.roll(wide, -extra, axis=1), mask=np.roll(wide_mask, -extra, axis=1))
    assert_close(right[:, :PROMPT][mask & rows[:, None]], expected[:, 0, :PROMPT][mask & rows[:, None]])


def test_what_stands_in_the_padding_changes_no_bit(params, ragged):
    prompts, mask, _, _ = ragged
    noise = np.where(mask, prompts, (prompts + 13) % CONFIG.vocab_size)
    before = apply(MODEL, params, prompts, mask=mask)
    after = apply(MODEL, params, noise, mask=mask)
    np.testing.assert_array_equal(before[mask], after[mask])


def test_a_token_does_not_see_what_follows(params, ragged):
    prompts, _, _, _ = ragged
    changed = prompts.copy()
    changed[:, 3] = (changed[:, 3] + 1) % CONFIG.vocab_size
    mask = np.ones(prompts.shape, bool)
    before = apply(MODEL, params, prompts, mask=mask)
    after = apply(MODEL, params, changed, mask=mask)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.max(np.abs(before[:, 3:] - after[:, 3:]), axis=-1) > 1e-3)


def test_positions_count_from_the_first_valid_token(params, ragged):
    prompts, mask, _, expected = ragged
    positions = np.maximum(np.arange(PROMPT) - (PROMPT - LENGTHS[:, None]), 0)
    # Row of 3: columns 2, 3, 4 are its tokens and have positions 0, 1, 2.
    np.testing.assert_array_equal(positions[1], [0, 0, 0, 1, 2])
    logits = apply(MODEL, params, prompts, positions, mask)
    assert_close(logits[mask], expected[:, 0, :PROMPT][mask])
    # Only differences of positions count ...
    assert_close(apply(MODEL, params, prompts, positions + 9, mask)[mask], expected[:, 0, :PROMPT][mask])
    # ... and they do count.
    stretched = apply(MODEL, params, prompts, 2 * positions, mask)
    assert np.max(np.abs(stretched[mask] - expected[:, 0, :PROMPT][mask])) > 0.1


# ---- one tree, several ways to compute it ----


def test_scanned_and_rematerialized_equal_unrolled(params):
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, (2, 6))

    @jit
    def logits_and_gradient(model, params):
        def loss(params):
            logits = model.apply({"params": params}, tokens)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3]), logits

        (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, gradient

    scanned = models.Decoder(dataclasses.replace(CONFIG, scan_layers=True, remat=True))
    assert models.abstract_params(scanned) == models.abstract_params(MODEL)
    expected, expected_gradient = logits_and_gradient(MODEL, params)
    actual, gradient = logits_and_gradient(scanned, params)
    assert_close(np.asarray(actual), np.asarray(expected))
    gradient, expected_gradient = jax.device_get((gradient, expected_gradient))
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected_gradient))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient), strict=True
    ):
        assert np.max(np.abs(b)) > 0, f"no gradient reaches {path}"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest, err_msg=str(path))


@pytest.fixture(scope="module")
def hidden(params, ragged):
    prompts, mask, _, _ = ragged
    return apply(MODEL, params, prompts, mask=mask, method="hidden_states")


def test_hidden_states_and_unembed_are_the_two_halves(params, ragged, hidden):
    prompts, mask, _, expected = ragged
    assert hidden.shape == (*prompts.shape, CONFIG.hidden_size)
    logits = apply(MODEL, params, hidden[mask], method="unembed")  # any number of leading axes
    assert_close(logits, expected[:, 0, :PROMPT][mask])


def test_padding_rows_of_the_vocabulary_have_no_probability(params, ragged, hidden):
    _, mask, _, expected = ragged
    model = models.Decoder(dataclasses.replace(CONFIG, num_tokens=33))
    logits = apply(model, params, hidden[mask], method="unembed")
    assert_close(logits[:, :33], expected[:, 0, :PROMPT][mask][:, :33])
    assert np.all(np.isfinite(logits))
    np.testing.assert_array_equal(np.exp(logits - np.max(logits, axis=-1, keepdims=True))[:, 33:], 0)


def test_large_vocabularies_are_looked_up_the_same(params, ragged):
    """Small ones multiply with one-hot rows, large ones gather; 300 rows are beyond any threshold for small."""
    prompts, mask, _, expected = ragged
    large = models.Decoder(dataclasses.replace(CONFIG, vocab_size=300))
    rest = np.random.default_rng(3).standard_normal((260, CONFIG.hidden_size)).astype(np.float32)
    logits = apply(large, params | {"embed": jnp.concatenate([params["embed"], rest])}, prompts, mask=mask)
    assert_close(logits[mask][:, : CONFIG.vocab_size], expected[:, 0, :PROMPT][mask])


def test_bfloat16_is_close_and_its_logits_are_float32(params, ragged):
    prompts, mask, _, expected = ragged
    model = models.Decoder(dataclasses.replace(CONFIG, compute_dtype=jnp.bfloat16))
    logits = apply(model, params, prompts, mask=mask)
    assert logits.dtype == jnp.float32
    assert_close(logits[mask], expected[:, 0, :PROMPT][mask], tolerance=0.05)


# ---- parameters ----


def test_parameters_are_a_plain_tree_with_stacked_layers():
    config = dataclasses.replace(
        CONFIG, tie_word_embeddings=False, scan_layers=True, num_layers=3, param_dtype=jnp.bfloat16
    )
    model = models.Decoder(config)
    params = jit(models.init_params)(model, jax.random.key(0))
    assert set(params) == {"embed", "layers", "final_norm", "lm_head"}

    def check(node):
        if type(node) is dict:
            assert all(type(key) is str for key in node)
            for child in node.values():
                check(child)
        else:
            assert isinstance(node, jax.Array), type(node)  # no Flax box
            assert node.dtype == jnp.bfloat16

    check(params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["layers"])} == {3}
    kernels = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float32)
    assert not np.array_equal(kernels[0], kernels[1])  # each layer has a key of its own
    abstract = models.abstract_params(model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), params)

    tied = models.Decoder(dataclasses.replace(config, tie_word_embeddings=True, scan_layers=False))
    assert models.abstract_params(tied) == {name: leaf for name, leaf in abstract.items() if name != "lm_head"}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logical_axes_name_every_axis_of_every_parameter(tied):
    model = models.Decoder(dataclasses.replace(CONFIG, tie_word_embeddings=tied, o_bias=True, qk_norm=True))
    params, axes = models.abstract_params(model), models.logical_axes(model)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(params)

    def check(leaf, names):
        assert type(names) is tuple
        assert len(names) == leaf.ndim
        assert set(names) <= set(sharding.RULES) | {None}

    jax.tree.map(check, params, axes)
    assert axes["embed"] == ("vocab", "embed")
    assert axes["layers"]["attention"]["q_proj"]["kernel"] == (None, "embed", "heads", None)
    assert axes["layers"]["attention"]["k_proj"]["bias"] == (None, "kv_heads", None)
    assert axes["layers"]["attention"]["o_proj"]["kernel"] == (None, "heads", None, "embed")
    assert axes["layers"]["attention"]["o_proj"]["bias"] == (None, "embed")
    assert axes["layers"]["attention"]["q_norm"]["scale"] == (None, None)
    assert axes["layers"]["mlp"]["down_proj"]["kernel"] == (None, "mlp", "embed")
    if not tied:
        assert axes["lm_head"][0] == "embed"


# ---- the configuration ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size must be at least 1, got 0"),
        ({"hidden_size": -1}, "model.hidden_size must be at least 1, got -1"),
        ({"intermediate_size": 0}, "model.intermediate_size"),
        ({"num_layers": 0}, "model.num_layers"),
        ({"num_heads": 0}, "model.num_heads"),
        ({"num_kv_heads": 0}, "model.num_kv_heads"),
        ({"head_dim": 0}, "model.head_dim"),
        ({"max_position_embeddings": 0}, "model.max_position_embeddings"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 8}, "num_heads=4 is not a multiple of num_kv_heads=8"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"num_tokens": 41}, "the tokenizer knows 41 tokens, but the embedding has 40 rows"),
        ({"num_tokens": 0}, "the tokenizer knows 0 tokens"),
        ({"attention_block_size": -1}, "attention_block_size must be at least 0"),
    ],
)
def test_a_config_that_describes_no_decoder_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


# ---- attention in blocks of queries ----


def blockwise(block, **changes):
    return models.Decoder(dataclasses.replace(CONFIG, attention_block_size=block, **changes))


# Of the 5 columns of the prompts: blocks that divide, that do not, of one query, and more than there are.
@pytest.mark.parametrize("block", [1, 2, 3, 5, 8])
def test_blocks_change_no_logit(block, params, ragged):
    prompts, mask, responses, expected = ragged
    model = blockwise(block)
    assert_close(apply(model, params, prompts, mask=mask)[mask], expected[:, 0, :PROMPT][mask])
    # In prefill too; the tokens after it see the same prompt.
    cache = models.init_cache(CONFIG, len(LENGTHS), PROMPT, GROUP, RESPONSE + SPARE)
    logits, cache = apply(model, params, prompts, mask=mask, cache=cache)
    assert_close(logits[mask], expected[:, 0, :PROMPT][mask])
    logits, _ = apply(model, params, responses, cache=cache)
    assert_close(logits, expected[..., PROMPT:, :])


def test_a_block_as_long_as_the_row_is_the_same_program(params):
    tokens = jnp.zeros((2, PROMPT), jnp.int32)

    def program(block):
        model = blockwise(block)
        return str(jax.make_jaxpr(lambda params: model.apply({"params": params}, tokens))(params))

    assert program(0) == program(PROMPT) == program(PROMPT + 1) != program(PROMPT - 1)


@pytest.mark.parametrize(("scan_layers", "remat"), [(False, False), (True, True)])
def test_blocks_change_no_gradient(scan_layers, remat, params, ragged):
    prompts, mask, _, _ = ragged

    @jit
    def gradient(model, params):
        def loss(params):
            logits = model.apply({"params": params}, prompts, mask=mask)
            return jnp.sum(jnp.where(mask[..., None], jax.nn.log_softmax(logits) ** 2, 0.0))

        return jax.grad(loss)(params)

    expected = jax.device_get(gradient(MODEL, params))
    actual = jax.device_get(gradient(blockwise(2, scan_layers=scan_layers, remat=remat), params))
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(b)) > 0, path
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest, err_msg=str(path))


def test_blocks_hold_a_block_of_scores():
    """Forward and backward, by what the compiler allocates: not one array of [B, heads, S, S]."""
    rows, size = 2, 512
    scores = rows * CONFIG.num_heads * size * size * 4  # bytes

    @jit
    def gradient(model, params, tokens):
        return jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens, method="hidden_states") ** 2))(params)

    def temporary(model):
        tokens = jax.ShapeDtypeStruct((rows, size), jnp.int32)
        compiled = gradient.lower(model, models.abstract_params(model), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense, blocks = (temporary(blockwise(block, num_layers=1, remat=True)) for block in (0, 32))
    assert dense > 2 * scores
    assert blocks < scores / 2
