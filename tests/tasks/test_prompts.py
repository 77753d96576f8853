"""Prompts: chat and plain templates, thinking, system prompt, BOS; end-of-text ids; which tokenizer is opened."""

import datetime
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from r2vpo_jax.config import to_dict
from r2vpo_jax.config.task import PromptConfig, RewardConfig, TaskConfig, TextConfig, VerifierConfig
from r2vpo_jax.models import base as base_model
from r2vpo_jax.tasks.prompts import PromptTemplate, unknown_share
from tests.helpers.tokenizers import CHAT, byte_tokenizer


def rendered(tokenizer=None, question="1+1?", **config):
    tokenizer = tokenizer or byte_tokenizer()
    return tokenizer.decode(PromptTemplate(PromptConfig(**config), tokenizer).tokens(question))


def test_chat_template():
    assert rendered() == "<user>1+1?</user><assistant>"
    assert rendered(text="Q: {question}\nA:") == "<user>Q: 1+1?\nA:</user><assistant>"
    assert rendered(system="Be brief.") == "<system>Be brief.</system><user>1+1?</user><assistant>"


def test_thinking_is_passed_on_only_if_it_is_set():
    assert rendered(thinking=False) == "<user>1+1?</user><assistant><think></think>"
    assert rendered(thinking=True) == rendered(thinking=None) == "<user>1+1?</user><assistant>"


def test_plain_template():
    assert rendered(template="plain") == "1+1?"
    assert rendered(template="plain", text="Q: {question} A:") == "Q: 1+1? A:"
    # Braces of the problem itself are not fields.
    assert rendered(template="plain", question=r"\frac{1}{2} {x}") == r"\frac{1}{2} {x}"


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos(template, adds_bos):
    """On: exactly one, whoever writes it. Off: none. Left open: as the tokenizer or the template has it."""
    tokenizer = byte_tokenizer(bos="<s>", adds_bos=adds_bos)

    def count(bos):
        tokens = PromptTemplate(PromptConfig(template=template, bos=bos), tokenizer).tokens("?")
        return tokens.tolist().count(256), tokens[0] == 256

    assert count(True) == (1, True)
    assert count(False) == (0, False)
    # A chat template writes its special tokens itself: the tokenizer adds none.
    assert count(None) == ((1, True) if adds_bos and template == "plain" else (0, False))


def test_what_a_tokenizer_puts_behind_plain_text_is_no_part_of_a_prompt():
    """A text is ended by it, and a prompt is to be gone on with."""
    for single, first in (("$A </s>", []), ("<s> $A </s>", [256]), ("<s> </s> $A", [256, 257])):
        tokenizer = byte_tokenizer(bos="<s>")
        special = [("<s>", 256), ("</s>", 257)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
        template = PromptTemplate(PromptConfig(template="plain"), tokenizer)
        assert template.tokens("1?").tolist() == [*first, *byte_tokenizer()("1?")["input_ids"]]
        chat = PromptTemplate(PromptConfig(), tokenizer).tokens("1?").tolist()
        assert not {256, 257} & set(chat)


DATED = "{%- if strftime_now is defined %}{% set d = strftime_now('%d %b %Y, %-d.%m.%y %H:%M, 5%%') %}{% endif -%} {{ d }}: "


def test_a_template_is_told_a_day_that_does_not_change(monkeypatch):
    """Else prompts change at midnight, and two evaluations are of different questions."""
    import transformers.utils.chat_template_utils as library

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    tokenizer = byte_tokenizer(DATED + "{{ messages[-1].content }}")
    today = PromptTemplate(PromptConfig(), tokenizer).text("2+2?")
    monkeypatch.setattr(library, "datetime", Tomorrow)
    assert PromptTemplate(PromptConfig(), tokenizer).text("2+2?") == today
    assert today.strip() == "26 Jul 2024, 26.07.24 00:00, 5%: 2+2?"
    other = PromptTemplate(PromptConfig(date="2025-03-04"), tokenizer).text("2+2?")
    assert other.strip() == "04 Mar 2025, 4.03.25 00:00, 5%: 2+2?"
    # It is a part of what a run is.
    assert to_dict(PromptConfig())["date"] == "2024-07-26"
    assert "date" not in to_dict(PromptConfig(template="plain"))


def test_a_template_that_draws_lots_is_refused():
    tokenizer = byte_tokenizer("{{ range(10 ** 5) | random }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match="another prompt each time"):
        PromptTemplate(PromptConfig(), tokenizer)


def test_an_empty_thought_is_where_the_template_puts_it():
    """Qwen3's template closes an empty thought before an answer that is gone on with. Nothing here goes on with one: a
    prompt ends where the answer begins, and an open thought of the template's is left open."""
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if not add_generation_prompt %}<think></think>{% endif %}"
        "{% if add_generation_prompt %}<think>{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
        "{% endif %}"
    )
    assert rendered(byte_tokenizer(template)) == "1+1?<think>"
    assert rendered(byte_tokenizer(template), thinking=False) == "1+1?<think></think>"


def test_bos_of_the_template_is_not_doubled():
    tokenizer = byte_tokenizer("{{ bos_token }}{{ messages[0].content }}", bos="<s>", adds_bos=True)
    for bos in (None, True):
        assert PromptTemplate(PromptConfig(bos=bos), tokenizer).tokens("?").tolist().count(256) == 1


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ({}, {"chat_template": None}, "has no chat template; set task.prompt.template=plain"),
        ({"bos": True}, {}, "names no BOS token"),
        ({"thinking": True}, {"chat_template": "{{ messages[0].content }}"}, "takes no notice"),
        ({}, {"chat_template": "{{ raise_exception('no roles') }}"}, "refuses the prompt: no roles"),
        ({}, {"chat_template": "{{ messages.append(1) }}"}, "refuses the prompt"),  # the sandbox
        ({}, {"chat_template": "{{ 1 // 0 }}"}, "refuses the prompt"),
        (
            {},
            {"chat_template": "{% for p in messages[0].content %}{{ p.text }}{% endfor %}:"},
            "leaves the question out",
        ),
        (
            {"system": "Be brief."},
            {"chat_template": "{{ messages[-1].content }}"},
            "system is set, but .* leaves it out",
        ),
        ({"system": ""}, {"chat_template": "{{ messages[-1].content }}"}, None),
        ({"template": "plain", "text": "{question}"}, {}, None),
    ],
)
def test_refusals(config, tokenizer, message):
    def make():
        PromptTemplate(PromptConfig(**config), byte_tokenizer(**tokenizer))

    if message is None:
        make()
    else:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (PromptConfig, {"template": "jinja"}, "one of chat, plain"),
        (PromptConfig, {"text": "Solve."}, "must contain"),
        (PromptConfig, {"max_length": 0}, "at least 1"),
        (PromptConfig, {"template": "plain", "system": "x"}, "needs task.prompt.template=chat"),
        (PromptConfig, {"template": "plain", "thinking": True}, "needs task.prompt.template=chat"),
        (VerifierConfig, {"num_workers": 0}, "num_workers must be at least 1"),
        (VerifierConfig, {"time_limit": 0.0}, "time_limit must be > 0"),
        (VerifierConfig, {"bad_gold": "ignore"}, "one of refuse, drop"),
        (RewardConfig, {"correct": 0.0}, "nothing to learn from"),
        (RewardConfig, {"correct": -1.0}, "nothing to learn from|must be >= 0"),
        (RewardConfig, {"function": "my_rewards"}, "must be module:function"),
        (RewardConfig, {"format_pattern": "("}, "not a regular expression"),
        (TaskConfig, {"name": "text", "text": TextConfig(train="a")}, "needs task.text.validation"),
        (TextConfig, {"max_response_length": 0}, "at least 1"),
    ],
)
def test_configuration_is_refused(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


def test_unknown_share():
    tokenizer = byte_tokenizer()
    assert unknown_share(tokenizer, [np.array([1, 2])]) == 0.0  # no unknown token at all
    tokenizer.unk_token = "<s>"
    assert unknown_share(tokenizer, [np.array([256, 1]), np.array([256, 256])]) == 0.75
    assert unknown_share(tokenizer, []) == 0.0


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}ENDING{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("generation", "config", "ending", "expected"),
    [
        (5, None, "", (5, 257)),
        ([7, 5], None, "", (7, 5, 257)),
        ([257, 9], None, "", (257, 9)),
        (None, None, "", (257,)),
        (None, 5, "", (5, 257)),
        ([7, 5], [9, 7], "", (7, 5, 9, 257)),
        (5, 6, "<|eot|>\n", (5, 6, 257, 258)),
        (258, None, "\n <|eot|>", (258, 257)),
        (5, None, "</s>", (5, 257)),
        (5, None, "\n\nEnd.", (5, 257)),  # no token of its own: any text may have it
    ],
)
def test_end_of_text_ids(generation, config, ending, expected, tmp_path):
    """All of generation_config.json and config.json, the tokenizer's own and the template's, each once."""
    for name, listed in (("generation_config.json", generation), ("config.json", config)):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": listed}))
    tokenizer = byte_tokenizer(TURNS.replace("ENDING", ending))
    tokenizer.add_tokens([AddedToken("<|eot|>", normalized=False)])
    assert base_model.end_of_text_ids(tmp_path, tokenizer) == expected


def test_a_template_that_writes_no_answers_names_no_end(tmp_path):
    tokenizer = byte_tokenizer("{{ messages[0].content }}")
    assert base_model.end_of_text_ids(tmp_path, tokenizer) == (257,)
    tokenizer.chat_template = "{% if messages[1:] %}{{ raise_exception('one question') }}{% endif %}"
    assert base_model.end_of_text_ids(tmp_path, tokenizer) == (257,)


def test_end_of_text_ids_that_cannot_be(tmp_path):
    assert base_model.end_of_text_ids(tmp_path, byte_tokenizer()) == (257,)  # no generation_config.json
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names no end-of-text token"):
        base_model.end_of_text_ids(tmp_path, tokenizer)
    for wrong in ('{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', "[]", "{"):
        (tmp_path / "generation_config.json").write_text(wrong)
        with pytest.raises(ValueError, match="generation_config.json"):
            base_model.end_of_text_ids(tmp_path, tokenizer)


@pytest.fixture
def directory(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 258}))
    return tmp_path


def test_a_tokenizer_is_opened_from_its_directory(directory):
    tokenizer, _ = base_model.load_tokenizer(directory)
    assert tokenizer("aé")["input_ids"] == byte_tokenizer()("aé")["input_ids"]
    assert tokenizer.chat_template == CHAT
    assert len(tokenizer) == 258


def test_tokenizer_json_is_what_counts(directory):
    """A class that would rebuild the tokenizer in its own way (here one that Llama's has) does not get its way."""
    file = directory / "tokenizer_config.json"
    for name in ("LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
        tokenizer, _ = base_model.load_tokenizer(directory)
        for text in ("Let $x = 1$.\n\n  y", "naïve 1,000"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == byte_tokenizer()(text)["input_ids"]


def test_code_of_the_directory_is_not_run(directory):
    """openPangu's tokenizer is code; a tokenizer.json beside it is enough, and without one the message says so."""
    (directory / "evil.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"
    )
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    }
    file.write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": "PanguEmbedded"}))
    tokenizer, _ = base_model.load_tokenizer(directory)
    assert tokenizer("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json"):
        base_model.load_tokenizer(directory)
    assert not (directory / "ran").exists()


def test_a_torn_tokenizer_is_refused_in_words(directory):
    for text in ("{}", "[1]", '{"version": "1.0", "model": 3}', "not JSON"):
        (directory / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="cannot be opened"):
            base_model.load_tokenizer(directory)


def test_a_pre_tokenizer_of_ones_own_stays(tmp_path):
    """Transformers' class for Qwen2 cuts numbers digit by digit, whatever tokenizer.json says."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "</s>"]
    own = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [("1", "2"), ("12", "3")]))
    cut = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.pre_tokenizer, own.decoder = pre_tokenizers.Sequence([cut, byte_level]), decoders.ByteLevel()
    own.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer, (notice,) = base_model.load_tokenizer(tmp_path)
    assert tokenizer.tokenize("123") == ["123"]
    assert notice == "tokenizer: tokenizer.json as it is (Qwen2Tokenizer changes it)"
