r"""The final answer in a response, and whether a response keeps a form.

Every function takes time linear in the text, whatever the text: the model writes it.

Rules:
  - Only what follows the last `</think>` counts. A response that opens `<think>` and never closes it has no answer. Where
    the prompt itself ends in `<think>`, put it in front of the response, or an unfinished thought is read as an answer.
  - Of several answers in the same style the last one counts. A last `\boxed{` that is never closed, or an empty one, is
    no answer: the response was cut off there.
"""

import collections
import re

RESPONSE_STYLES = ("final", "boxed", "answer_tag", "hash", "last_number")  # where in a response its final answer is
MAX_FORM_CHARS = 200_000  # a longer response has no form

_BRACE_OR_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\s*([^\s$\\{}]+)")
_SAYS = re.compile(r"answer(?:\s+is|\s*[:：=])(?:\s*[:：])?", re.IGNORECASE)
_MATH_SPAN = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"\n|[.?](?=\s|$|\*)|[;,]?\s(?=(?:because|since|which|where|as we)\s)|[。！？]")
_NUMBER = re.compile(r"(?<![\w.)}\]])[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?|\d[\d,]*(?:\.\d+)?(?:/\d+)?", re.ASCII)


def extract(text: str, style: str = "final") -> str | None:
    r"""The final answer in a response, or None where there is none.

    Styles:
      boxed        content of the last \boxed{...} or \fbox{...} (braces balanced), or the word after a bare \boxed
      answer_tag   content of the last <answer>...</answer>
      hash         what follows the last #### on its line (GSM8K)
      last_number  the last number, with sign, decimals, or as a fraction a/b
      final        the first of these that is there: boxed, answer_tag, hash, what follows the last "answer is" or
                   "answer:" in its sentence, last_number. A box or tag that is cut off or empty ends the search.

    Raises:
      ValueError: unknown style.
    """
    if style not in RESPONSE_STYLES:
        raise ValueError(f"unknown style {style!r} of a final answer; one of {', '.join(RESPONSE_STYLES)}")
    text = after_thinking(text)
    if text is None:
        return None
    if style == "boxed":
        return _boxed(text)
    if style == "answer_tag":
        return _answer_tag(text)
    if style == "hash":
        return _hash(text)
    if style == "last_number":
        return _last_number(text)
    if _has_box(text):
        return _boxed(text)
    if "<answer>" in text:
        return _answer_tag(text)
    return _hash(text) or _said(text) or _last_number(text)


def extract_text(text: str) -> str | None:
    """The whole answer where it need not be mathematics: the tag, else the box, else all that follows the thinking."""
    text = after_thinking(text)
    if text is None:
        return None
    if "<answer>" in text:
        return _answer_tag(text)
    if _has_box(text):
        return _boxed(text)
    return text.strip() or None


def after_thinking(text: str) -> str | None:
    """What follows the last </think>; the whole text if there are no think tags; None if thinking never ended."""
    end = text.rfind("</think>")
    if text.rfind("<think>") > end:
        return None
    return text if end < 0 else text[end + len("</think>") :]


def format_score(text: str, pattern: str) -> float:
    r"""1.0 if the response keeps a form, else 0.0.

    Args:
      text: response.
      pattern: "boxed" (there is a closed, non-empty box after the thinking), "think_boxed" (`<think>` thought `</think>`,
        each once, the opening one left out if the prompt has it, then a box), or a regular expression that the whole
        response must match, `.` matching newlines too, on responses of up to MAX_FORM_CHARS characters. One with nested
        repetition may run for ever: text tasks run it in a verifier process, by `format_scores`.
    """
    if len(text) > MAX_FORM_CHARS:
        return 0.0
    if pattern == "boxed":
        return float(extract(text, "boxed") is not None)
    if pattern == "think_boxed":
        thought, end, answer = text.partition("</think>")
        opened, start, thought = thought.rpartition("<think>")
        once = not opened.strip() and "<think>" not in answer and "</think>" not in answer
        return float(bool(end) and once and bool(thought.strip()) and extract(answer, "boxed") is not None)
    return float(re.fullmatch(pattern, text, re.DOTALL) is not None)


def format_scores(patterns, responses, answers) -> list[float]:
    """`format_score` as a reward function; the questions' place has the patterns."""
    return [format_score(response, pattern) for pattern, response in zip(patterns, responses, strict=True)]


def _has_box(text) -> bool:
    return any(m.group() in ("\\boxed", "\\fbox") for m in _BRACE_OR_BOX.finditer(text))


def _boxed(text) -> str | None:
    """Content of the last outermost box."""
    closing, stack, boxes = {}, [], []
    for match in _BRACE_OR_BOX.finditer(text):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            closing[stack.pop()] = match.start()
        elif match.group() in ("\\boxed", "\\fbox"):
            boxes.append(match.end())
    answer, outer_end = None, 0
    for start in boxes:
        if start < outer_end:
            continue  # a box within a box
        bare = _BARE_BOX.match(text, start)
        opening = _skip_spaces(text, start)
        if opening in closing:
            outer_end = closing[opening]
            answer = text[opening + 1 : outer_end]
        elif text[opening : opening + 1] == "{":
            answer = None  # never closed
        else:
            answer = bare.group(1).rstrip(".,;:") if bare else None
    return (answer or "").strip() or None


def _skip_spaces(text, position) -> int:
    while text[position : position + 1] in (" ", "\n", "\t"):
        position += 1
    return position


def _answer_tag(text) -> str | None:
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    if start < 0 or end < 0:
        return None
    return text[start + len("<answer>") : end].strip() or None


def _hash(text) -> str | None:
    _, found, rest = text.rpartition("####")
    return (rest.strip().partition("\n")[0].strip() or None) if found else None


def _said(text) -> str | None:
    says = _last(_SAYS, text)
    if says is None:
        return None
    rest = text[says.end() :].lstrip(" \t\n*:")[:2000]
    math = _MATH_SPAN.match(rest)
    if math:
        tail = _SENTENCE_END.split(rest[math.end() :], maxsplit=1)[0]
        if not re.match(r"\s*(?:,|or\b|and\b)", tail):
            return next(group for group in math.groups() if group is not None).strip() or None
    answer = _SENTENCE_END.split(rest, maxsplit=1)[0].strip(" \t*")
    return answer or None


def _last(pattern, text) -> re.Match | None:
    return next(iter(collections.deque(pattern.finditer(text), maxlen=1)), None)


def _last_number(text) -> str | None:
    number = _last(_NUMBER, text)
    if number is None:
        return None
    end = number.end()
    percent = "%" if text[end : end + 1] == "%" or text[end : end + 2] == "\\%" else ""
    return number.group().rstrip(",") + percent
