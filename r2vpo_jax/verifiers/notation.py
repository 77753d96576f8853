r"""Notation of mathematical answers: one spelling for what is written in many ways. No heavy imports.

What is taken away or made equal (`clean`):
  layout     math delimiters ($, \(, \[), \left and \right, spacing commands, \displaystyle, colors, **...**, braces around
             the whole, an introduction as in \text{The value is } 7, a trailing dot, comma or semicolon
  numbers    the separators of digit groups: 10,\!080, 10{,}080, 10\,080, and 12,500\pi outside of lists and tuples
  arguments  get their braces: \frac12, \frac\pi2, \frac{12}13, \sqrt3, x^\pi; \dfrac, \tfrac and \cfrac are \frac
  fonts      bold and italic letters are letters; upright functions and constants are those (\mathrm{e}, \operatorname{lcm});
             other upright text, as of units, is \text
  Unicode    minus, fractions (½), superscripts, full-width characters, Greek, ∞, √, comparison and set signs become LaTeX
"""

import re
import unicodedata
from fractions import Fraction

MAX_ANSWER_CHARS = 2000  # nothing longer is a final answer

_GREEK = {
    character: "\\" + name
    for characters, names in (
        ("αβγδεζηθικλμ", "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu"),
        ("νξπρστυφχψωϵϕϑ", "nu xi pi rho sigma tau upsilon phi chi psi omega epsilon phi theta"),
        ("ΓΔΘΛΞΠΣΦΨΩℓℏℵ", "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar aleph"),
    )
    for character, name in zip(characters, names.split(), strict=True)
}
GREEK_NAMES = sorted(({name[1:] for name in _GREEK.values()} | {"varepsilon", "varphi", "vartheta"}) - {"pi"})
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SYMBOLS = {
    **dict.fromkeys("−–—‐‑‒﹣", "-"),
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("°˚º", r"^{\circ}"),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **dict.fromkeys("\u2009\u202f\u2007\u2006", r"\,"),  # thin spaces part groups of digits
    **{character: command + " " for character, command in _GREEK.items()},
    **{"∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup "},
    **{"∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "≈": r"\approx ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"},
    **{"⟨": r"\langle ", "⟩": r"\rangle ", "，": ",", "、": ",", "％": "%", "‘": "'", "’": "'", "“": '"', "”": '"'},
}
_UNICODE_ROOT = re.compile(r"([√∛])\s*(\d+(?:\.\d+)?)")
_SCRIPT_FRACTION = re.compile("([⁰¹²³⁴-⁹]+)[⁄/]([₀-₉]+)")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_SCRIPTS = re.compile(f"([{''.join(_SUPERSCRIPTS)}]+)|([{''.join(_SUBSCRIPTS)}]+)")
_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)
_GROUP_MARK = r"(?:,\s*\\!|\{,\}(?:\s*\\!)?|\\!,\\!|\\[,;:]|~|\\ )"
_GROUPS = re.compile(rf"(?<![\d.])[1-9]\d{{0,2}}(?:{_GROUP_MARK}\s*\d{{3}})+(?!\d)")
_DECIMAL_GROUPS = re.compile(rf"\.\d{{3}}(?:{_GROUP_MARK}\d{{3}})*{_GROUP_MARK}\d{{1,3}}(?!\d)")
_COMMA_RUN = re.compile(r"(?<![\d.,])\d+(?:,\d+)+")
_COMMA_GROUPS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+")
_DELIMITERS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_NOTHING = re.compile(
    r"\\(?:left|right|middle|displaystyle|textstyle|scriptstyle|limits|[bB]igg?[lr]?|boxed|fbox|nolimits|mathstrut)"
    r"(?![a-zA-Z])\.?|\\!|\\(?:hspace|vspace|color|tag|label)\s*\{[^{}]*\}|\\textcolor\s*\{[^{}]*\}"
)
_SPACES = re.compile(r"\\[,;:> ]|\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|(?<!\\)~|[\s\u200b\ufeff]+")
_SWITCHES = re.compile(r"\{\s*\\(?:rm|bf|it|sf|tt|mathrm|mathbf)\s+([^{}]*)\}")
_MATH_FONTS = re.compile(
    r"\\(?:mathbf|mathit|mathsf|mathnormal|boldsymbol|bm|bf|it)\s*(?:\{\s*([A-Za-z])\s*\}|([A-Za-z])\b)"
)
_FONTS = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|mathnormal|boldsymbol|bm|bf|rm|textbf|textit|textrm|textsf|textnormal|emph|underline"
    r"|mbox|hbox|operatorname\*?)(?:(?=\s*\{)|\s*([A-Za-z])(?![A-Za-z]))"
)
_NO_TEXT = re.compile(r"\\text\s*\{\s*(\\[a-zA-Z]+|[-+]?\d+(?:\.\d+)?|[,;&]|)\s*\}")
_CONSTANT = re.compile(
    r"\\text\s*\{\s*([ei])\s*\}|\\text\s*\{\s*(d)\s*\}(?=\s*[a-zA-Z\\])|(?<=[_^])\s*\\text\s*\{\s*([T])\s*\}"
)
_FUNCTION = re.compile(
    r"\\text\s*\{\s*(?:(a(?:rc|r)?)?(sin|cos|tan|cot|csc|sec|tg|ctg)(h?)|(ln|log|lg|exp))\s*\}(?=\s*(?:[\w(\[{\\|]|\^))"
)
_POWER_AT_END = re.compile(r"\s*(?:\^\s*\{?\s*-?\d\s*\}?)?\s*")
_FUNCTION_OF_SEVERAL = re.compile(r"\\text\s*\{\s*(max|min|gcd|lcm)\s*\}(?=\s*(?:[(\[{]|\\\{))")
_OTHER_NAMES = {"tg": "tan", "ctg": "cot", "arctg": "arctan", "arcctg": "arccot"}
_PREFACE = re.compile(
    r"^\\text\s*\{[^{}]*(?:\bis|:|=)\s*\}\s*(?=\S)|^(?:[A-Za-z]{2,} )+[a-z]{2,} ?: ?(?=\S)|^No solution ?: ?(?=\S)"
)
_TEXT_OF_MATH = re.compile(r"^\\text\s*\{(?=[^{}]*(?:\d|,|\b(?:and|or)\b))([^{}]*)\}$")
_TEXT_AND_CONNECTIVE = re.compile(r"\\text\s*\{([^{}]*[^{}\s,])(,?\s+(?:and|or)\s*)\}")
_ENVIRONMENT = re.compile(r"\\begin|\\end|matrix|cases|array")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[a-zA-Z])")
_ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1}
_TAKES_ARGUMENTS = re.compile(r"\\(frac|binom|sqrt)(?![a-zA-Z])|\^(?=\s*\\[a-zA-Z])")
_OVER = re.compile(r"\{([^{}]*)\\(over|choose)(?![a-zA-Z])([^{}]*)\}")
_OUTWARD = re.compile(r"([\[\]])([^\[\]]*[,;][^\[\]]*)([\[\]])")  # ]1, 2] is (1, 2]
_COMBINATIONS = re.compile(
    r"(?<![A-Za-z\\])(?:C_\{?(\d+)\}?\^\{?(\d+)\}?|C\((\d+), ?(\d+)\)|(?:\{\})?[_^]\{?(\d+)\}? ?C ?_\{?(\d+)\}?)(?![\w(])"
)
_SYNONYMS = [
    (re.compile(r"\\langle(?![a-zA-Z])|\\lparen(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])|\\rparen(?![a-zA-Z])"), ")"),
    (re.compile(r"\\[dtc](frac|binom)(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"\\leq(?:slant|q)?(?![a-zA-Z])|\\leqslant(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\geq(?:slant|q)?(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\[lr]?vert(?![a-zA-Z])"), "|"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\l(?:brack)(?![a-zA-Z])"), "["),
    (re.compile(r"\\r(?:brack)(?![a-zA-Z])"), "]"),
    (re.compile(r"\\(?:varnothing|oslash|O)(?![a-zA-Z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\^\s*\\circ(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])"), r"^{\\circ}"),
    (re.compile(r"\^\s*(?:\{\s*)?\\(?:top|intercal)(?![a-zA-Z])(\s*\})?"), "^T"),
    (re.compile(r"\{\s*,\s*\}(?=\d)"), ","),
    (re.compile(r"\\%|\\text\s*\{\s*percent\s*\}|(?<=\d)\s*\bpercent\b"), "%"),
    (re.compile(r"\\lg(?![a-zA-Z])"), r"\\log_{10}"),
    (re.compile(r"\\log\s*_\s*(?:\{\s*e\s*\}|e(?![a-zA-Z]))"), r"\\ln "),
    (re.compile(r"\\bigcup(?![a-zA-Z]|\s*_)"), r"\\cup"),
    (re.compile(r"\\backslash(?=\s*\\\{)"), r"\\setminus"),
    (re.compile(r"\\(arc)?(c)?tg(?![a-zA-Z])"), lambda m: "\\" + _OTHER_NAMES[m.group()[1:]] + " "),
    (re.compile(r"\\(?:not\\in|notin)(?![a-zA-Z])"), r"\\notin"),
    (re.compile(r"\\(?:to|rightarrow)(?![a-zA-Z])"), r"\\to"),
    (re.compile(r"\\mathbb\s*([A-Z])|\\([RZNQ])(?![a-zA-Z])"), r"\\mathbb{\1\2}"),
]


def clean(text: str) -> str:
    """The answer without layout."""
    text = text.strip().strip("*")
    if _PLAIN_NUMBER.fullmatch(text):
        return text
    text = text.replace("**", "^")
    if not text.isascii():
        text = _ascii(text)
    if "\\" in text or "$" in text or "{" in text or "~" in text:
        text = _without_layout(text)
    else:
        text = " ".join(text.split())
    for pattern, replacement in _SYNONYMS if "\\" in text or "{" in text or "percent" in text else ():
        text = pattern.sub(replacement, text)
    if "&" in text and not _ENVIRONMENT.search(text):
        text = re.sub(r"\\?&", " and ", text)
    text = _with_arguments(text)
    if "C" in text:
        text = _COMBINATIONS.sub(_binomial, text)
    text = _PREFACE.sub("", text.replace("\0", r"\\").strip(), count=1)
    text = _strip_outside(text)
    if text.startswith("]") or text.endswith("["):
        text = _OUTWARD.sub(lambda m: f"{'[('[m[1] == ']']}{m[2]}{'])'[m[3] == '[']}", text)
    return _join_comma_groups(text)


def _ascii(text) -> str:
    text = _UNICODE_ROOT.sub(lambda m: rf"{m[1]}{{{m[2]}}}", text)
    text = _SCRIPT_FRACTION.sub(
        lambda m: rf" \frac{{{unicodedata.normalize('NFKC', m[1])}}}{{{unicodedata.normalize('NFKC', m[2])}}}", text
    )
    text = _SCRIPTS.sub(
        lambda m: (
            "^{" + "".join(_SUPERSCRIPTS[c] for c in m[1]) + "}"
            if m[1]
            else "_{" + "".join(_SUBSCRIPTS[c] for c in m[2]) + "}"
        ),
        text,
    )
    text = _VULGAR.sub(lambda m: _vulgar(m.group()), text)
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    return "".join(_SYMBOLS.get(c, c) for c in text)


def _without_layout(text) -> str:
    text = _DELIMITERS.sub(" ", _protect_line_breaks(text))
    text = _GROUPS.sub(_digits, text)
    text = _DECIMAL_GROUPS.sub(_digits, text)
    text = _NOTHING.sub(" ", text)
    text = _SWITCHES.sub(r"\\text{\1}", text)
    text = _MATH_FONTS.sub(r" \1\2", text)
    text = _FONTS.sub(lambda m: rf"\text{{{m[1]}}}" if m[1] else r"\text", text)
    text = _SPACES.sub(" ", text)
    if r"\text" in text:
        text = _NO_TEXT.sub(r" \1 ", text)
        text = _CONSTANT.sub(r" \1\2\3", text)
        text = _FUNCTION.sub(_function, text)
        text = _FUNCTION_OF_SEVERAL.sub(r"\\\1", text)
        text = _TEXT_AND_CONNECTIVE.sub(r"\\text{\1}\\text{\2}", text)
        text = " ".join(text.split())
    return text


def _digits(match) -> str:
    return re.sub(r"[^\d.]", "", match.group())


def _function(match) -> str:
    inverse, name, hyperbolic, other = match.groups()
    if name == "sec" and not inverse and _POWER_AT_END.fullmatch(match.string, match.end()):
        return match.group()  # a second
    name = other or _OTHER_NAMES.get(name, name)
    return "\\" + ("arc" if inverse else "") + name + (hyperbolic or "") + " "


def _binomial(match) -> str:
    n, k = (int(group) for group in match.groups() if group is not None)
    return rf"\binom{{{n}}}{{{k}}}" if n >= k else match.group()  # C_1^2 is a constant squared


def _join_comma_groups(text) -> str:
    r"""12,500\pi as 12500\pi; in tuples and sets, where a comma parts the members, digit groups are not joined."""
    if "," not in text:
        return text
    pieces, end, depth, position = [], 0, 0, 0
    for match in _COMMA_RUN.finditer(text):
        depth += sum(c in "([" for c in text[position : match.start()])
        depth += text.count(r"\{", position, match.start())
        depth -= sum(c in ")]" for c in text[position : match.start()])
        depth -= text.count(r"\}", position, match.start())
        position = match.start()
        if depth <= 0 and _COMMA_GROUPS.fullmatch(match.group()):
            pieces += [text[end : match.start()], match.group().replace(",", "")]
            end = match.end()
    return "".join(pieces) + text[end:]


def _protect_line_breaks(text) -> str:
    # "\\[" within a matrix is a line break and a bracket, not the start of displayed mathematics
    if not _ENVIRONMENT.search(text):  # a command escaped twice, as in JSON
        text = _ESCAPED_TWICE.sub(r"\\", text)
    return text.replace(r"\\", "\0")


def _vulgar(character) -> str:
    value = Fraction(unicodedata.numeric(character)).limit_denominator(10)
    return rf" \frac{{{value.numerator}}}{{{value.denominator}}}"


def _with_arguments(text) -> str:
    r"""\frac, \binom, \sqrt and ^ with braces around arguments that TeX takes without; {a \over b} as \frac{a}{b}."""
    if r"\over" in text or r"\choose" in text:
        text = _OVER.sub(
            lambda m: rf"\{'frac' if m[2] == 'over' else 'binom'}{{{m[1].strip()}}}{{{m[3].strip()}}}", text
        )
    for match in reversed(list(_TAKES_ARGUMENTS.finditer(text))):  # inner commands before those that they are in
        position, arguments = match.end(), []
        if match[1] == "sqrt" and text[position:].lstrip().startswith("["):
            end = closing(text, text.index("[", position))
            if end < 0:
                continue
            arguments.append(text[position : end + 1].strip())
            position = end + 1
        for _ in range(_ARGUMENTS.get(match[1], 1)):
            whole_number = match[1] == "frac" and arguments and text[position - 1] == "}"
            argument, position = _argument(text, position)
            if not argument:
                break
            if whole_number and argument.isdecimal():  # \frac{12}13 is meant as 12/13
                digits = re.match(r"\d*", text[position:]).group()
                argument, position = argument + digits, position + len(digits)
            arguments.append(f"{{{argument}}}")
        else:
            text = f"{text[: match.start()]}{match.group()}{''.join(arguments)}{text[position:]}"
    return text


def _argument(text, position) -> tuple[str, int]:
    """(what TeX takes as the argument at a position, without its braces; where it ends), ("", position) if there is none."""
    while text[position : position + 1] == " ":
        position += 1
    c = text[position : position + 1]
    if c == "{":
        end = closing(text, position)
        return (text[position + 1 : end].strip(), end + 1) if end > 0 and text[end] == "}" else ("", position)
    if c == "\\":
        command = re.match(r"\\([a-zA-Z]+)", text[position:])
        if command is None or command[1] in ("cdot", "times", "right", "left", "pm", "text", "mathbb", "mathcal"):
            return "", position
        end = position + command.end()
        for _ in range(_ARGUMENTS.get(command[1], 0)):
            _, end = _argument(text, end)
        return text[position:end], end
    return (c, position + 1) if c.isalnum() else ("", position)


def _strip_outside(text) -> str:
    before = None
    while before != text:
        before = text
        text = re.sub(r"^(?:=|\\approx(?![a-zA-Z]))", "", text.strip().rstrip(".,;").strip())
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        text = _TEXT_OF_MATH.sub(r"\1", text)
    return text


def closing(text: str, start: int) -> int:
    r"""Position of the bracket that closes the one at `start`, of whatever shape ("[1, 2)" is an interval); -1: none."""
    depth, position = 0, start
    while position < len(text):
        c = text[position]
        if c == "\\":
            following = text[position + 1 : position + 2]
            depth += (following == "{") - (following == "}")
            position += 1
            if depth == 0 and following == "}":
                return position
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return -1


def split(text: str, separators: str = ",;") -> list[str]:
    """Parts between separators that are not within brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        c = text[position]
        if c == "\\":
            following = text[position + 1 : position + 2]
            depth += (following == "{") - (following == "}")
            position += 1
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c in separators and depth <= 0:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    return [part.strip() for part in [*parts, text[start:]]]


# Structure --------------------------------------------------------------------------------------------------

_EQUALS = re.compile(r"(?<![<>!\\:])=(?!=)")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])")
_ORDER = re.compile(r"(<=|>=|<|>|\\(?:le|ge|lt|gt|ne)(?![a-zA-Z]))")
_INDEX = r"(?:\s*_\s*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\?[A-Za-z]+|\d+))?"
NAME = (
    r"(?:\\frac\s*\{\s*d\s*\\?[A-Za-z]+\s*\}\s*\{\s*d\s*\\?[A-Za-z]+\s*\}|\\(?:angle|triangle)\s*[A-Z]{1,4}|\\(?:vec|overline|overrightarrow|bar|hat)\s*\{[A-Za-z]+\}|\\text\s*\{[A-Za-z ]+\}"
    rf"|\|[A-Z]{{2}}\||\\?[A-Za-z]+){_INDEX}'*(?:\^\{{?-1\}}?)?(?:\s*\([A-Za-z0-9,\s]+\))?"
)
_NAME = re.compile(rf"{NAME}|\([A-Za-z,\s]+\)")
_CONSTANT_NAME = re.compile(r"\\(?:pi|infty)|e|i|-?\\infty")
_LETTER = re.compile(r"(?<![A-Za-z\\])(?!e(?![A-Za-z]))[A-Za-z]")
_COMMAND = re.compile(r"\\[A-Za-z]+")


def has_relation(text: str) -> bool:
    r"""Whether there is an inequality in a cleaned answer: <, \le, \ne and so on."""
    return _RELATION.search(text) is not None


def interval(text: str) -> tuple[str, str] | None:
    r"""(x, "(1,2]") of a cleaned "1 < x \le 2"; None where it is no inequality of a name with constants."""
    parts = [part.strip() for part in _ORDER.split(text)]
    if len(parts) not in (3, 5):
        return None
    relations = [{"<=": "le", ">=": "ge", "<": "lt", ">": "gt"}.get(part, part.lstrip("\\")) for part in parts[1::2]]
    values = parts[::2]
    if len(values) == 2 and not is_variable(values[0]):
        values.reverse()
        relations = [{"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}.get(relations[0], relations[0])]
    name = values[len(values) // 2] if len(values) == 3 else values[0]
    bounds = [value for value in values if value is not name]
    if not is_variable(name) or any(not bound or _LETTER.search(_COMMAND.sub(" ", bound)) for bound in bounds):
        return None
    name = name.replace(" ", "")
    if len(bounds) == 1:
        (bound,) = bounds
        return name, {
            "lt": rf"(-\infty,{bound})",
            "le": rf"(-\infty,{bound}]",
            "gt": rf"({bound},\infty)",
            "ge": rf"[{bound},\infty)",
            "ne": rf"(-\infty,{bound})\cup({bound},\infty)",
        }[relations[0]]
    if {*relations} <= {"gt", "ge"}:
        bounds.reverse()
        relations = [{"gt": "lt", "ge": "le"}[relation] for relation in reversed(relations)]
    if not {*relations} <= {"lt", "le"}:
        return None
    return name, f"{'(['[relations[0] == 'le']}{bounds[0]},{bounds[1]}{')]'[relations[1] == 'le']}"


def is_variable(text: str) -> bool:
    r"""Whether it is a name that is no constant: x and ABC, but not \pi."""
    return is_name(text) and not _CONSTANT_NAME.fullmatch(text)


def sides(text: str) -> list[str]:
    """The sides of an equation "a = b = c", of "5 = x" x first; [text] where a cleaned answer is none."""
    if "=" not in text or has_relation(text) or r"\begin" in text or not _EQUALS.search(text):
        return [text]
    parts = split(text, "=")
    if any(part.endswith(("<", ">", "!", "\\", ":")) for part in parts):
        return [text]
    if len(parts) == 2 and is_variable(parts[1]) and parts[0] and not _LETTER.search(_COMMAND.sub(" ", parts[0])):
        parts.reverse()
    return parts


def is_name(text: str) -> bool:
    r"""Whether a side of an equation is a single name: x, x_1, m_{\max}, \angle ABC, f(x)."""
    return _NAME.fullmatch(text) is not None


def is_set(text: str) -> bool:
    r"""Whether a cleaned answer is \{...\} as a whole."""
    return text.startswith(r"\{") and closing(text, 0) == len(text) - 1


def bracketed(text: str) -> tuple[str, list[str]]:
    """("()", members) of a tuple or interval; ("", []) of anything else."""
    if not text.startswith(("(", "[")) or not text.endswith((")", "]")) or closing(text, 0) != len(text) - 1:
        return "", []
    inner = split(text[1:-1])
    return (text[0] + text[-1], inner) if len(inner) > 1 else ("", [])
