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

from r2vpo_jax.verifiers.prose import last_value, spans

RESPONSE_STYLES = ("final", "boxed", "answer_tag", "hash", "last_number")  # where in a response its final answer is
MAX_FORM_CHARS = 200_000  # a longer response has no form

_BRACE_OR_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\s*([^\s$\\{}]+)")
_BETWEEN_BOXES = re.compile(  # \boxed{1} or \boxed{2}; $a = \boxed{1}$ and $a = \boxed{2}$
    r"[\s$]*(?:[,;]|,?\s*(?:\\text\s*\{\s*)?,?\s*(?:and|or)\s*\}?)[\s$]*(?:\\?[A-Za-z](?:_\{?\w\}?)?\s*=)?[\s$]*"
)
_CALCULATOR = re.compile(r"<<[^<>\n=]*=[^<>\n=]*>>")  # of GSM8K: 9*2=<<9*2=18>>18
_BOLD = re.compile(r"[\s:]*(?:\*\*\s+)?\*\*(?=[^\s*])([^*\n]+)\*\*")
_IS = r"(?:\s+(?:is|are)|\s*[:：=])(?:\s*[:：])?"
_SAYS = re.compile(rf"answers?{_IS}", re.IGNORECASE)
_SAYS_OR_CHOOSES = re.compile(rf"(?:answers?|correct (?:option|choice)){_IS}", re.IGNORECASE)  # slower
_SENTENCE_END = re.compile(
    r"\n|[.?](?=\s|$|\*)|[;,]?\s(?=(?:because|since|which|where|as we|not|rather)\s|\((?:since|because|as|i\.e|that)\W)|[。！？]"
)
_STARTS_WITH_WORD = re.compile(r"[A-Za-z]{2,}(?![A-Za-z(])|[IA]\s")
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|has|have|had|equals?|makes?|gets?|takes?|costs?|needs?|becomes?)\b", re.IGNORECASE
)
_NEGATION = re.compile(r"\b(?:not|no|none|never|cannot|neither|nor|without)\b|n't", re.IGNORECASE)


def extract(text: str, style: str = "final") -> str | None:
    r"""The final answer in a response, or None where there is none.

    Styles:
      boxed        content of the last \boxed{...} or \fbox{...} (braces balanced), or the word after a bare \boxed; boxes with
                   only "or", "and" or a comma between them are a list: \boxed{1} or \boxed{2} is "1, 2"
      answer_tag   content of the last <answer>...</answer>
      hash         what follows the last #### on its line (GSM8K)
      last_number  the last number or formula, as `prose.last_value` finds it
      final        the first of these that is there: boxed, answer_tag, hash, what follows the last "answer is",
                   "answer:" or "correct option is" in its sentence (where that is a whole sentence: last_number of what follows), last_number.
                   A box, tag or "answer is" that is cut off or empty ends the search.

    Raises:
      ValueError: unknown style.
    """
    if style not in RESPONSE_STYLES:
        raise ValueError(f"unknown style {style!r} of a final answer; one of {', '.join(RESPONSE_STYLES)}")
    text = after_thinking(text)
    if text is None:
        return None
    if "<<" in text:
        text = _CALCULATOR.sub("", text)
    if style == "boxed":
        return _boxed(text)
    if style == "answer_tag":
        return _answer_tag(text)
    if style == "hash":
        return _hash(text)
    if style == "last_number":
        return last_value(text)
    if _has_box(text):
        return _boxed(text)
    if "<answer>" in text:
        return _answer_tag(text)
    if "####" in text:
        return _hash(text)
    says = _SAYS_OR_CHOOSES if "orrect " in text else _SAYS
    ends = collections.deque((match.end() for match in says.finditer(text)), maxlen=1)
    return _said(text[ends[0] :]) if ends else last_value(text)


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
    found: list[str | None] = []  # the last box, and those that it is listed with
    outer_end = previous_end = 0
    for start in boxes:
        if start < outer_end:
            continue  # a box within a box
        bare = _BARE_BOX.match(text, start)
        opening = _skip_spaces(text, start)
        end = start
        if opening in closing:
            end = outer_end = closing[opening]
            answer = text[opening + 1 : end].strip()
        elif text[opening : opening + 1] == "{":
            answer = None  # never closed
        else:
            answer = bare.group(1).rstrip(".,;:") if bare else None
        command = text.rfind("\\", previous_end, start)
        listed = bool(found and found[-1] and _BETWEEN_BOXES.fullmatch(text[previous_end + 1 : command][:100]))
        found = [*found, answer] if listed else [answer]
        previous_end = end
    if not found or not found[-1]:
        return None
    return ", ".join(dict.fromkeys(found))


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


def _said(rest) -> str | None:
    """The answer that follows "answer is"."""
    bold = _BOLD.match(rest)
    rest = (bold[1] + rest[bold.end() :] if bold else rest).lstrip(" \t\n*:")
    short = rest[:2000]
    start, inner, inner_end, end = next(iter(spans(short)), (-1, 0, 0, 0))
    if start == 0:
        tail = _SENTENCE_END.split(short[end:], maxsplit=1)[0]
        if not re.match(r"\s*(?:,|or\b|and\b)", tail):
            return short[inner:inner_end].strip() or None
    answer = _SENTENCE_END.split(short, maxsplit=1)[0].strip(" \t*")
    if answer.endswith(":") or _is_sentence(answer):
        return last_value(rest)
    return answer or None


def _is_sentence(answer) -> bool:
    """Whether it tells of the answer rather than being one: "she makes 18 dollars"."""
    if not _STARTS_WITH_WORD.match(answer) or _NEGATION.search(answer) or last_value(answer) is None:
        return False
    return bool(_VERB.search(answer)) or len(re.findall("[A-Za-z]{2,}", answer)) >= 4
