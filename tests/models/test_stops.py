"""Strings that end a response, found token by token: as text says it, whatever the tokens are."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r2vpo_jax.models.base import find_directory
from r2vpo_jax.models.stops import stop_table
from r2vpo_jax.models.tokenizer import load_tokenizer, token_bytes
from tests.helpers.tokenizers import byte_tokenizer


def merged_tokenizer():
    """Byte-level, with tokens of several characters that overlap the strings in all ways."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "b"), ("ab", "a"), ("b", "a"), ("Ċ", "Ċ"), ("Q", "u"), ("Ċ", "Qu"), ("b", "c")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def pieces_tokenizer():
    """As SentencePiece's: a blank is ▁, what has no token is spelled in bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ["▁", "▁a", "a", "b", "x", "1"]:
        vocabulary.setdefault(piece, len(vocabulary))
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def walk(table, ids):
    """After which of the tokens a string has been completed; None: never."""
    state = 0
    for number, token in enumerate(ids):
        state = table[state, token]
        if state == len(table) - 1:
            return number
    return None


@pytest.mark.parametrize(
    "strings",
    [("abab",), ("\nQuestion:", "abc"), ("aab", "ab", "b"), ("aa", "aba"), ("。",), ("\n\n",), ("cab", "abd")],
)
@pytest.mark.parametrize("make", [byte_tokenizer, merged_tokenizer])
def test_a_string_is_found_where_text_has_it(strings, make):
    tokenizer = make()
    table, tokens = stop_table(strings, tokenizer), token_bytes(tokenizer)
    generator = np.random.default_rng(0)
    likely = [
        i for i, token in enumerate(tokens) if (token and token in b"abaababc\n\nQu") or token in (b"d", b"\n", b"Qu")
    ]
    rows = [generator.choice(likely, 24).tolist() for _ in range(400)]
    rows += [tokenizer(f"x{string[:-1]}{string}y")["input_ids"] for string in strings]
    found = 0
    for ids in rows:
        texts = itertools.accumulate(tokens[i] for i in ids)
        first = next((n for n, text in enumerate(texts) if any(s.encode() in text for s in strings)), None)
        assert walk(table, ids) == first, (strings, tokenizer.decode(ids))
        found += first is not None
    assert found >= len(strings)


def test_pieces_and_bytes():
    tokenizer = pieces_tokenizer()
    table = stop_table((" a1", "é"), tokenizer)
    for text, token in (("b a1 b", 3), ("a1 b", 1), ("ba1", None), ("xé", 3)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert walk(table, ids) == token, (text, tokenizer.convert_ids_to_tokens(ids))


def test_shipped_tokenizers_and_special_tokens():
    tokenizer, _ = load_tokenizer(find_directory("word_problems_base")[0])
    table = stop_table(("<|im_end|>", "####"), tokenizer)
    ids = tokenizer("She has 4.\n#### 4<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[: walk(table, ids) + 1]) == "She has 4.\n####"
    assert walk(stop_table(("<|im_end|>",), tokenizer), ids) == len(ids) - 1
    assert stop_table((), tokenizer) is None


def test_what_cannot_be_found_is_refused():
    with pytest.raises(ValueError, match="has an empty string"):
        stop_table(("a", ""), byte_tokenizer())
    words = Tokenizer(models.WordLevel({"2": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="are not its tokens one after the other.*leave sampler.stop out"):
        stop_table(("a",), PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"))
