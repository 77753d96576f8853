"""config.json of every family: what is read, what it means where it is left out, and what is refused by name."""

import jax
import pytest

from r2vpo_jax import models
from r2vpo_jax.models import families
from tests.models.goldens import CASES, GOLDEN, copy, raw_config

LLAMA3 = raw_config("llama_llama3_untied")["rope_scaling"]
REMOVED = object()
# One checkpoint of each family, by its model_type.
ONE = {raw_config(case)["model_type"]: case for case in CASES}


def read(case, **changes):
    """The fields of `DecoderConfig`; null is null here, and REMOVED takes a field out."""
    raw = {key: value for key, value in (raw_config(case) | changes).items() if value is not REMOVED}
    return families.read_fields(raw)


@pytest.mark.parametrize("case", CASES)
def test_both_rope_fields_read_the_same(case, tmp_path):
    config = models.read_config(GOLDEN / case)
    raw = raw_config(case)
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {"rope_type": "default"}
    scaling = {key: value for key, value in given.items() if key != "rope_theta"}
    old = {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": None}
    new = {"rope_theta": None, "rope_scaling": None, "rope_parameters": scaling | {"rope_theta": config.rope_theta}}
    old, new = copy(case, tmp_path / "old", **old), copy(case, tmp_path / "new", **new)
    assert models.read_config(old) == models.read_config(new) == config


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({}, 10_000.0),  # the default of Transformers
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, 5e5),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e6}, 5e5),
    ],
)
def test_rope_theta_is_found_where_transformers_finds_it(fields, theta, tmp_path):
    path = copy("kv1_tied_rope_theta", tmp_path / "x", **({"rope_theta": None} | fields))
    assert models.read_config(path).rope_theta == theta


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    """The defaults of the configuration classes; for Pangu, those of the one that comes with its checkpoints."""
    names = ("num_kv_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "qkv_bias", "o_bias")
    expected = {
        "qwen2": (32, 8, 1e-6, 1e4, 32_768, True, False),
        "qwen3": (32, 128, 1e-6, 1e4, 32_768, False, False),
        "llama": (64, 8, 1e-6, 1e4, 2048, False, False),
        "mistral": (8, 8, 1e-6, 1e4, 131_072, False, False),
        "PanguEmbedded": (8, 8, 1e-5, 16e6, 32_768, True, True),
    }
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    assert set(expected) == set(ONE)
    for family, case in ONE.items():
        sizes = {"hidden_size": 512, "num_attention_heads": 64, "sliding_window": None}
        removed = dict.fromkeys(set(raw_config(case)) - set(needed), REMOVED)
        config = models.DecoderConfig(**read(case, **removed | sizes))
        assert tuple(getattr(config, name) for name in names) == expected[family], family
        assert not config.tie_word_embeddings
        assert config.rope_scaling is None


def test_no_number_of_key_value_heads_is_that_of_heads():
    for case in ONE.values():
        assert read(case, num_key_value_heads=None)["num_kv_heads"] == 4


@pytest.mark.parametrize("case", CASES)
def test_the_features_of_a_family(case):
    config, raw = models.read_config(GOLDEN / case), raw_config(case)
    kind = raw["model_type"]
    flag = raw.get("attention_bias", raw.get("bias", False))
    assert (config.qkv_bias, config.o_bias) == ((True, False) if kind == "qwen2" else (flag, flag))
    assert config.qk_norm == (kind == "qwen3")
    assert config.family == {"PanguEmbedded": "pangu"}.get(kind, kind)


def test_pangu_is_known_by_its_architecture_too():
    raw = raw_config("pangu_untied") | {"model_type": "something_else"}
    assert families.read_fields(raw)["family"] == "pangu"
    assert not read("pangu_untied", bias=False)["o_bias"]


@pytest.mark.parametrize(
    ("changes", "original"),
    [
        ({}, 32),
        ({"original_max_position_embeddings": 16}, 16),  # above those of rope_scaling, as in Transformers
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}}, 128),
    ],
)
def test_the_original_context_is_found_where_transformers_finds_it(changes, original):
    scaling = read("llama_llama3_untied", **changes)["rope_scaling"]
    assert scaling == models.RopeScaling("llama3", 8.0, 1.0, 4.0, original)


@pytest.mark.parametrize(("window", "allowed"), [(None, True), (128, True), (200, True), (127, False)])
def test_a_window_of_the_whole_context_is_none(window, allowed):
    if allowed:
        assert read("mistral_untied", sliding_window=window) == read("mistral_untied")
    else:
        with pytest.raises(ValueError, match="sliding-window attention is not implemented"):
            read("mistral_untied", sliding_window=window)


def test_a_mistral_that_says_nothing_of_its_window_has_one():
    with pytest.raises(ValueError, match="sliding_window=4096"):
        read("mistral_untied", sliding_window=REMOVED, max_position_embeddings=8192)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; supported: 'qwen2', 'qwen3', 'llama'"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rotary scaling 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear': factor must be positive, got None"),
        ({"rope_scaling": LLAMA3 | {"factor": -1}}, "'llama3': factor must be positive, got -1"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": "1"}}, "'llama3': low_freq_factor must be positive, got '1'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor=4.0 is not below"),
        ({"rope_scaling": [1]}, "rope_scaling is not an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rotary scaling 'dynamic'"),
        ({"rope_parameters": {"type": "yarn", "rope_theta": 1e4}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"use_sliding_window": True, "sliding_window": 4}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"sliding_window": 4, "model_type": "llama"}, "sliding-window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ({"mlp_bias": True, "model_type": "llama"}, "mlp_bias"),
        ({"attention_bias": True, "model_type": "mistral", "sliding_window": 64}, "attention_bias"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"use_mrope": True}, "use_mrope"),
        ({"dual_chunk_attention_config": {"chunk_size": 262_144}}, "dual_chunk_attention_config"),
        ({"sparse_attention_config": {}, "attention_chunk_size": 8}, "attention_chunk_size"),
        ({"is_causal": False}, "is_causal=False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        ({"logits_scaling": 8}, "logits_scaling=8"),
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "'Qwen2ForSequenceClassification', which is not a lang",
        ),
        ({"architectures": ["Qwen2Model"]}, "'Qwen2Model'"),
        ({"architectures": "Qwen2ForRewardModel"}, "'Qwen2ForRewardModel'"),
        ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, "'LlamaForCausalLMEagle3'"),
        ({"architectures": [3]}, "architectures names 3"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"num_hidden_layers": None}, "lacks the field 'num_hidden_layers'"),
        ({"hidden_size": "24"}, "hidden_size is '24', but must be a number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": 0}, "num_heads must be at least 1"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_scaling": {"rope_theta": "1e4"}}, "rope_theta must be positive, got '1e4'"),
        ({"rope_theta": -1}, "rope_theta must be positive, got -1"),
        ({"sliding_window": "4", "model_type": "llama"}, "sliding_window is '4'"),
        ({"layer_types": [["full_attention"]]}, "sliding-window"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads=3"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(fields, message, tmp_path):
    """Before any weight is read: there are none here."""
    path = copy("kv1_tied_rope_theta", tmp_path / "x", **fields)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        models.from_pretrained(path)


def test_what_changes_nothing_is_not_refused():
    neutral = {"is_causal": True, "embedding_multiplier": 1.0, "logits_scaling": 1, "attention_multiplier": None}
    for architectures in (["Qwen2ForCausalLM"], ["FSDPQwen2ForCausalLM"], "Qwen2ForCausalLM", [], None, REMOVED):
        assert read("kv1_tied_rope_theta", architectures=architectures, **neutral) == read("kv1_tied_rope_theta")


@pytest.mark.parametrize("text", ["{", "[1]", b"\xff\xfe\x00"])
def test_a_broken_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="JSON"):
        models.read_config(tmp_path)


@pytest.mark.parametrize("name", ["", "no_such_directory"])
def test_a_directory_without_config_is_refused(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        models.from_pretrained(tmp_path / name)


def test_the_exported_config_reads_back(tmp_path):
    """Every family's, with every feature it has; Pangu's as the Llama that it is."""
    for case in CASES:
        config = models.read_config(GOLDEN / case)
        raw = families.hf_config(config, "float32")
        expected = config.family if config.family != "pangu" else "llama"
        assert models.DecoderConfig(**families.read_fields(raw) | {"family": config.family}) == config, case
        assert families.find(raw) == expected
        old = {key: value for key, value in raw.items() if key != "rope_parameters"}  # readers before Transformers 5
        assert families.read_fields(old) == families.read_fields(raw)


@pytest.mark.parametrize(
    ("family", "features"),
    [
        ("qwen2", {"o_bias": True}),
        ("qwen2", {"qkv_bias": False}),
        ("llama", {"qkv_bias": True, "o_bias": False}),
        ("llama", {"qkv_bias": False, "qk_norm": True}),
        ("mistral", {"qkv_bias": True}),
        ("qwen3", {"qkv_bias": False, "qk_norm": False}),
    ],
)
def test_what_a_family_cannot_express_is_not_exported(family, features):
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_layers"), 8)
    config = models.DecoderConfig(**sizes, num_heads=2, num_kv_heads=1, head_dim=4, family=family, **features)
    with pytest.raises(ValueError, match=f"family '{family}' cannot express"):
        families.hf_config(config, "float32")


PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "use_mrope": False},
        (151_936, 1536, 8960, 28, 12, 2),
        1_777_088_000,
    ),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "tie_word_embeddings": True},
        (151_936, 1024, 3072, 28, 16, 8),
        596_049_920,
    ),
    "Llama-3.2-1B": (
        {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": LLAMA3, "mlp_bias": False},
        (128_256, 2048, 8192, 16, 32, 8),
        1_235_814_400,
    ),
    "Mistral-7B-v0.3": (
        {"model_type": "mistral", "sliding_window": None},
        (32_768, 4096, 14_336, 32, 32, 8),
        7_248_023_552,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(name):
    raw, sizes, expected = PUBLISHED[name]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    raw = raw | dict(zip((*names, "num_key_value_heads"), sizes, strict=True))
    model = models.Decoder(models.DecoderConfig(**families.read_fields(raw)))
    assert sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(model))) == expected
