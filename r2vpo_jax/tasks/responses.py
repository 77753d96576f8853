"""Response tokens to the text that is judged: without special tokens, thoughts in marks that the verifiers know."""

import re

import numpy as np

OPEN, CLOSE = "<think>", "</think>"  # as the verifiers know them

# Marks of others than DeepSeek-R1 and Qwen3, which a tokenizer tells by having both as tokens.
KNOWN_MARKS = (
    ("[unused16]", "[unused17]"),  # openPangu
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<longcat_think>", "</longcat_think>"),  # LongCat
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)

_CLOSES = re.compile(r"\s*(?:</[^<]*|[\])}$]+)\s*")


class ResponseTexts:
    """Texts of responses for verifiers and reward functions.

    Whatever marks a model puts around its thoughts, these texts have `<think>` and `</think>` there, also where the
    tokenizer has flagged the marks as special tokens; all other special tokens are left out.

    Args:
      tokenizer: a Transformers tokenizer.
      marks: of the model's thoughts, (begin, end), besides <think> and </think>; (): those of `KNOWN_MARKS` that the tokenizer
        has as tokens.
      stop: strings that end a response: a text ends before the first of them that is in it, or behind it where the string
        closes something, as </answer> does.
    """

    def __init__(self, tokenizer, marks: tuple[str, ...] = (), stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        vocabulary = tokenizer.get_vocab()
        known = [pair for pair in KNOWN_MARKS if all(mark in vocabulary for mark in pair)]
        self._marks = [(OPEN, CLOSE), *([marks] if marks else known)]
        kept = {vocabulary.get(mark) for pair in self._marks for mark in pair}
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._left_out = np.array(sorted((added | set(tokenizer.all_special_ids)) - kept), np.int64)

    def __call__(self, responses, lengths) -> list[str]:
        """Texts of int [B, T] responses with int [B] tokens."""
        rows = [np.asarray(row[:length]) for row, length in zip(responses, lengths, strict=True)]
        rows = [row[~np.isin(row, self._left_out)].tolist() for row in rows]
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=False)
        return [self.with_known_marks(self._ended(text)) for text in texts]

    def with_known_marks(self, text: str) -> str:
        """A text with <think> and </think> for the model's own marks."""
        for begin, end in self._marks:
            text = text.replace(begin, OPEN).replace(end, CLOSE)
        return text

    def _ended(self, text: str) -> str:
        found = [(at, string) for string in self._stop if (at := text.find(string)) >= 0]
        if not found:
            return text
        at, string = min(found, key=lambda pair: pair[0] + len(pair[1]))
        return text[: at + len(string)] if _CLOSES.fullmatch(string) else text[:at]
