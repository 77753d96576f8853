r"""Whether two expressions are the same mathematics: Math-Verify reads and compares them, and what is exact is compared exactly.

What Math-Verify 0.9 would get wrong is kept from it: it takes A for a, x' for x, A^T for A, E for the number e and \gamma for
Euler's constant, so names get spellings of their own (`_named`); it takes any two numbers for equal that differ by less than
about 1e-15, so decimals are read as fractions, numbers are compared to 100 digits, and formulas at points.
"""

import functools
import re

from r2vpo_jax.verifiers.notation import GREEK_NAMES, closing
from r2vpo_jax.verifiers.numbers import is_finite
from r2vpo_jax.verifiers.words import MATH_WORDS

_TOLERANCE = 1e-6  # relative, of a rounded decimal
_DIGITS = 200  # to which numbers are computed where their difference cancels
_MODULE = re.compile(r"(?<![A-Za-z.])(?:np|math)\.(?=[a-z])")  # np.arcsin(10/13) is an answer of Minerva
_ROOT = re.compile(r"\\sqrt\s*\(")
_SET_FUNCTION = re.compile(r"\\(max|min|gcd|lcm)\s*\\\{")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_IN_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.]|\s*\\(?:overline|bar|dot)|\s*_)")
_NAMES = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}(?:\s*\^\s*\{?T\}?)?"  # a matrix is transposed, a name is not
    r"|(?P<name>\\frac\s*\{\s*d\s*(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?)\s*\}\s*\{\s*d\s*\\?[A-Za-z]+\s*\}"
    r"|\\(?:vec|hat|bar|tilde|d?dot|overline|overrightarrow|wide(?:hat|tilde))\s*(?:\{\s*\\?[A-Za-z]+\s*\}|[A-Za-z](?![A-Za-z]))"
    r"|\\(?:mathcal|mathfrak|mathscr)\s*(?:\{\s*[A-Za-z]\s*\}|[A-Za-z])"
    r"|\\mathbb\s*(?:\{\s*[A-Za-z]\s*\}|[A-Za-z])(?=\s*[_^])|\\text\s*\{[^{}]*\}"
    rf"|\\(?:{'|'.join(GREEK_NAMES)}|mho|beth)(?![a-zA-Z])(?<!Gamma)|\\Gamma(?!\s*[(a-zA-Z])|[A-Za-z])"
    r"(?P<primes>(?:'|\^\s*\{?\s*\\prime\s*\}?)*)(?:\s*_\s*(?P<index>\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\\text\s*\{[^{}]*\}|\\?[A-Za-z]|\d+))?(?P<more>'*)"
    r"|\\mathbb\s*\{?\s*[A-Za-z]\s*\}?|\\[A-Za-z]+"
)
_LAYOUT = re.compile(r"\\(?:text|mathrm)(?![a-zA-Z])|[\s{}\\]")


def same(gold: str, answer: str) -> bool:
    """Whether a cleaned expression is the cleaned gold.

    Raises:
      ValueError: the gold cannot be read.
    """
    if gold.endswith("%") or answer.endswith("%"):
        return _same_percent(gold, answer)
    parsed_gold = read_gold(gold)
    parsed = _parse(answer)
    if parsed is None or not _is_defined(parsed):
        return False
    rounded = (_is_rounded(gold) and not _DECIMAL.search(answer)) or (_is_rounded(answer) and not _DECIMAL.search(gold))
    return _same(parsed_gold, parsed, rounded)


def read_gold(gold: str):
    """The SymPy object that a cleaned gold means.

    Raises:
      ValueError: it cannot be read.
    """
    parsed = _parse(gold)
    if parsed is None or not _is_defined(parsed):
        raise ValueError(f"the gold answer {gold[:200]!r} is not mathematics that can be read")
    return parsed


def _same_percent(gold, answer) -> bool:
    bodies = gold.removesuffix("%").strip(), answer.removesuffix("%").strip()
    if same(*bodies):
        return True
    if gold.endswith("%") and answer.endswith("%"):
        return False
    hundredth = [
        rf"\frac{{{body}}}{{100}}" if text.endswith("%") else body
        for body, text in zip(bodies, (gold, answer), strict=True)
    ]
    return same(*hundredth)


def _is_rounded(text) -> bool:
    """Whether a decimal in it has six or more significant digits."""
    return any(len((m[1] + m[2]).lstrip("0")) >= 6 for m in _DECIMAL.finditer(text))


def _is_defined(expression) -> bool:
    import sympy

    return not expression.has(sympy.nan, sympy.zoo)


# Comparing ---------------------------------------------------------------------------------------------------


def _same(gold, answer, rounded) -> bool:
    import sympy
    from math_verify import verify

    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and all(
            _same(a, b, rounded) for a, b in zip(gold.flat(), answer.flat(), strict=True)
        )
    scalars = all(isinstance(e, sympy.Expr) and not isinstance(e, sympy.MatrixExpr) for e in (gold, answer))
    equations = all(
        isinstance(e, sympy.Eq) and not any(isinstance(side, sympy.MatrixBase | sympy.MatrixExpr) for side in e.args)
        for e in (gold, answer)
    )
    if scalars:
        gold, answer = _with_values(gold), _with_values(answer)
        exact = _same_scalar(gold, answer, rounded)
        if exact is not None:
            return exact
        if not rounded and _differ(gold, answer):  # Math-Verify rounds coefficients
            return False
    elif equations and _are_multiples(gold.lhs - gold.rhs, answer.lhs - answer.rhs):
        return True
    found = verify(gold, answer, strict=True, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=False)
    if found and equations:
        return not _have_other_solutions(gold.lhs - gold.rhs, answer.lhs - answer.rhs)
    return found


def _with_values(expression):
    """With a symbol instead of each f(x) of an unknown function."""
    import sympy
    from sympy.core.function import AppliedUndef

    applied = expression.atoms(AppliedUndef)
    return expression.xreplace({f: sympy.Symbol(str(f), real=True) for f in applied}) if applied else expression


def _same_scalar(gold, answer, rounded) -> bool | None:
    """Whether two numbers or formulas are equal, where that can be said exactly; None where it cannot."""
    import sympy

    if gold == answer:
        return True
    if gold.has(*_unevaluated()) or answer.has(*_unevaluated()):
        return None
    if gold.free_symbols or answer.free_symbols:
        return True if (gold - answer).expand() == 0 else None
    gold, answer = gold.doit(), answer.doit()
    if gold == answer:
        return True
    if gold.has(sympy.oo, -sympy.oo) or answer.has(sympy.oo, -sympy.oo):
        return False
    difference = _distance(gold, answer)
    if difference is None:
        return None
    if rounded and gold.is_Rational and answer.is_Rational:
        rounded = not (is_finite(gold) and is_finite(answer))
    return difference == 0 or (rounded and difference <= _TOLERANCE)


def _unevaluated() -> tuple:
    import sympy

    return sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative


def _distance(a, b) -> float | None:
    """|a - b| as a share of the larger, 0.0 where they agree to 100 digits; None where it cannot be computed."""
    import sympy

    difference = a - b
    if difference == 0:
        return 0.0
    apart, *sizes = (abs(e.evalf(15, maxn=_DIGITS)) for e in (difference, a, b))
    if not all(number.is_Float or number.is_Rational for number in (apart, *sizes)):
        return None
    size = max(sizes)
    share = apart / size if size else apart
    if difference.is_Rational or share > sympy.Float("1e-100"):
        return max(float(share), 1e-300)
    return 0.0


def _points(symbols):
    """Values for symbols at which formulas that differ do so."""
    import sympy

    ordered = sorted(symbols, key=str)
    yield {symbol: sympy.Rational(5 + 2 * i, 11 + 5 * i) for i, symbol in enumerate(ordered)}
    yield {symbol: sympy.Rational(29 + 9 * i, 7 + 2 * i) for i, symbol in enumerate(ordered)}


def _differ(gold, answer) -> bool:
    """Whether two formulas have different values somewhere. Points where one is not real are left out: roots have branches."""
    import sympy

    is_complex = gold.has(sympy.I) or answer.has(sympy.I)
    if gold.has(*_unevaluated()) or answer.has(*_unevaluated()):
        return False
    for point in _points(gold.free_symbols | answer.free_symbols):
        values = gold.subs(point), answer.subs(point)
        if (is_complex or all(value.is_real for value in values)) and _distance(*values):
            return True
    return False


def _are_multiples(gold, answer) -> bool:
    """Whether one of two expressions is a constant times the other."""
    for point in _points(gold.free_symbols | answer.free_symbols):
        a, b = gold.subs(point), answer.subs(point)
        if a.is_zero is False and b.is_zero is False:
            return (gold * b - answer * a).expand() == 0
    return False


def _have_other_solutions(gold, answer) -> bool:
    """Whether a solution of gold = 0 does not solve answer = 0; False where none is found."""
    for point in _points(gold.free_symbols):
        for symbol, value in point.items():
            others = {name: v for name, v in point.items() if name != symbol}
            here = gold.subs(others)
            slope = here.diff(symbol)
            if slope.free_symbols or slope == 0:
                continue
            root = -here.subs(symbol, 0) / slope
            left = answer.subs({**others, symbol: root}).expand()
            if left.is_number and left != 0 and abs(left.evalf(15, maxn=_DIGITS)) > 1e-60 * abs(value):
                return True
    return False


# Reading -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)  # a group of responses has one gold
def _parse(text: str):
    """A SymPy object, or None."""
    import sympy
    from math_verify import parse

    text = _for_latex(text)
    if not text:
        return None
    found = parse(
        rf"\boxed{{{text}}}",
        extraction_config=[_config()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",  # any_match would go on to any fraction inside what it could not read
        parsing_timeout=None,
        raise_on_error=False,
    )
    if not found or isinstance(found[0], str):
        return None
    expression = found[0]
    imaginary = [s for s in getattr(expression, "free_symbols", ()) if s.name in ("i", "imath")]
    return expression.subs({s: sympy.I for s in imaginary}) if imaginary else expression


def _for_latex(text) -> str:
    text = _MODULE.sub("", text)
    text = MATH_WORDS.sub(lambda m: "\\" + (m[1] or m[2]).replace("infinity", "infty") + " ", text)
    text = _with_parentheses(text)
    if _TRIGONOMETRIC.search(text):
        text = _IN_DEGREES.sub(r"{\\left(\\frac{\1 \\pi}{180}\\right)}", text)
    text = re.sub(r"\^\s*(-?\d*\.?\d{2,}|-?\d*\.\d|[A-Za-z])", r"^{\1}", text)
    text = _NAMES.sub(_named, text)
    text = _DECIMAL.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    return text.replace("*", r" \cdot ")


def _named(match) -> str:
    r"""A name in a spelling that is read as one symbol, whatever its letters: m_{\max}, E_1, \gamma, A, x', \vec{v}.

    Lower-case letters by themselves stay as they are, since e, i and the d of an integral mean something.
    """
    name, index = match["name"], match["index"]
    if match.group() == "i":
        return " i "  # Math-Verify takes symbols for complex where it sees the imaginary unit by itself
    if name is None or (
        len(name) == 1 and name.islower() and not match["primes"] and not match["more"] and index is None
    ):
        return match.group()
    primes = "'" * (match["primes"].count("'") + match["primes"].count("prime") + len(match["more"]))
    spelled = _LAYOUT.sub("", name) + primes + ("_" + _LAYOUT.sub("", index) if index else "")
    return "x_{" + "".join(f"{ord(c):03d}" for c in spelled) + "}"


def _with_parentheses(text) -> str:
    r"""\sqrt(a) as \sqrt{a}, \max\{a, b\} as \max(a, b)."""
    for pattern, end_mark in ((_ROOT, ")"), (_SET_FUNCTION, "}")):
        position = 0
        while (match := pattern.search(text, position)) is not None:
            position = match.end()
            end = closing(text, position - (1 if end_mark == ")" else 2))
            if end < 0 or text[end] != end_mark:
                continue
            inner = text[position : end - (end_mark == "}")]
            opened = rf"\sqrt{{{inner}}}" if end_mark == ")" else rf"\{match[1]}({inner})"
            text = text[: match.start()] + opened + text[end + 1 :]
    return text


@functools.cache
def _config():
    import logging

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its time limits are off on purpose: it warns of that
    return LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
        ),
    )
