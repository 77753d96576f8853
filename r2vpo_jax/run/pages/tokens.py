"""Responses with the ratio of each token as a color and what is kept of its gradient as a line.

The ground says how far the policy has moved on the token: log r from -0.5 (blue) over 0 (none) to 0.5 (orange), as in
`training/token_gradients.py`. The line says what the objective does to the token's policy gradient: below the token it is
the thicker the more is taken away, and waves where the token is pulled back; above the token more than the plain gradient
is given. Both are also in words, to hover over.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from r2vpo_jax.run.pages.markup import escaped, visible

FULL_COLOR = 0.5  # |log r| of the strongest color
_UNTOUCHED = 0.05  # kept within so much of 1 needs no line
_CUT = 0.005  # kept within so much of 0
_THICKEST = 4.0  # pixels
_TOKENS, _FEWER = 1500, 300  # of a response that are shown at most, half of them from its end; of earlier iterations

STYLE = """
.sample{border:1px solid var(--line);border-radius:6px;padding:.6em .8em;margin:.7em 0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/2 ui-monospace,monospace;margin:.4em 0}
.prompt{color:var(--soft);line-height:1.5}.right{color:var(--right)}.wrong{color:var(--wrong)}
.t{padding:.1em 0;margin-right:1px;border-radius:2px;text-decoration-color:var(--ink);text-underline-offset:3px;text-decoration-skip-ink:none}
.u{background:rgb(var(--up)/var(--a))}.d{background:rgb(var(--down)/var(--a))}
.less{text-decoration-line:underline}.back{text-decoration:underline wavy var(--ink) 1.5px}.more{text-decoration-line:overline}
.t:hover{outline:2px solid var(--ink)}.gap{color:var(--soft);font-style:italic}
.legend{display:flex;flex-wrap:wrap;gap:.3em 1.4em;align-items:center;font-size:13px}
.legend .t{font:14px/2 ui-monospace,monospace;padding:.1em .3em}
"""


def sample(row: Mapping[str, Any], limit: int = _TOKENS) -> str:
    """A line of samples.jsonl as HTML, with so many tokens of its response at most."""
    sign = {"right": "✓", "wrong": "✗"}.get(row["outcome"], "–")
    verdict = (
        f"<b class='{'right' if row['outcome'] == 'right' else 'wrong'}'>{sign} {escaped(row['outcome'])}</b>, "
        f"reward {row['reward']:.3g}, advantage {_number(row['advantage'])}"
    )
    about = [verdict, f"problem {row['problem']}"]
    if "age" in row:
        about.append(f"sampled {row['age']} updates ago")
    if not row.get("learned", True):
        about.append("took no part in learning")
    if "kept" in row:
        about.append(_counts(row))
        text = _colored(row["token_texts"], row["log_ratios"], row["kept"], limit)
    else:
        text = _cut(visible(row["response"]), limit)
    return (
        f"<div class='sample'><div class='small'>{' · '.join(about)}</div>"
        f"<div class='text prompt'>{_cut(visible(row['prompt']), limit)}</div><div class='text'>{text}</div></div>"
    )


def legend() -> str:
    """What colors and lines mean."""
    ratios = "".join(
        f"<span class='t {_side(log_ratio)}' style='{_ground(log_ratio)}'>{math.exp(log_ratio):.2f}</span>"
        for log_ratio in (-0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5)
    )
    lines = "".join(
        f"<span><span class='{_line(kept)[0]}' style='{_line(kept)[1]}'>token</span> {text}</span>"
        for kept, text in (
            (1.0, "1: untouched (within 5 %)"), (0.5, "0.5: half is kept"), (0.0, "0: cut"), (-0.5, "below 0: pulled back"),
            (2.0, "above 1: enlarged"),
        )
    )  # fmt: skip
    return (
        f"<div class='legend'><span>ratio π/μ after the updates</span><span>{ratios}</span></div>"
        f"<div class='legend'><span>kept of the gradient</span>{lines}</div>"
    )


def _colored(texts: Sequence[str], log_ratios: Sequence[float], kept: Sequence[float | None], limit: int) -> str:
    tokens, half = list(zip(texts, log_ratios, kept, strict=True)), limit // 2
    if len(tokens) <= limit:
        return "".join(_token(*token) for token in tokens)
    first, last = ("".join(_token(*token) for token in part) for part in (tokens[:half], tokens[-half:]))
    return f"{first}<span class='gap'> … {len(tokens) - 2 * half} tokens … </span>{last}"


def _token(text: str, log_ratio: float, kept: float | None) -> str:
    log_ratio, kept = _float(log_ratio), _float(kept)
    line, style = _line(kept)
    what = "no gradient at stake (A = 0)" if math.isnan(kept) else f"keeps {_number(kept)} of its gradient"
    title = f"ratio {math.exp(min(log_ratio, 50.0)):.3g} (log {log_ratio:+.3g}); {what}"
    if text == "":
        title = f"part of a character; {title}"
    # A space that is a token of its own, or nothing, could not be hovered over.
    return (
        f"<span class='{line} {_side(log_ratio)}' style='{_ground(log_ratio)}{style}' title='{escaped(title)}'>"
        f"{escaped(visible(text)) or '◌'}</span>"
    )


def _side(log_ratio: float) -> str:
    return "u" if log_ratio > 0 else "d"


def _ground(log_ratio: float) -> str:
    strength = min(abs(log_ratio) / FULL_COLOR, 1.0) if math.isfinite(log_ratio) else 1.0
    return f"--a:{0.75 * strength:.2f};"


def _line(kept: float) -> tuple[str, str]:
    """(classes, style) of what is kept."""
    if math.isnan(kept) or abs(kept - 1) <= _UNTOUCHED:
        return "t", ""
    if kept < -_CUT:
        return "t back", ""
    if kept > 1:
        return "t more", f"text-decoration-thickness:{min(1 + 2 * (kept - 1), _THICKEST):.1f}px;"
    return "t less", f"text-decoration-thickness:{max(_THICKEST * (1 - max(kept, 0.0)), 0.5):.1f}px;"


def _counts(row: Mapping[str, Any]) -> str:
    """In words, how many tokens were treated how."""
    kept = [x for x in map(_float, row["kept"]) if math.isfinite(x)]
    if not kept:
        return f"{len(row['kept'])} tokens, no gradient at stake"
    kinds = {
        "cut": sum(abs(x) <= _CUT for x in kept),
        "pulled back": sum(x < -_CUT for x in kept),
        "damped": sum(_CUT < x < 1 - _UNTOUCHED for x in kept),
        "enlarged": sum(x > 1 + _UNTOUCHED for x in kept),
    }
    parts = [f"{number} {name}" for name, number in kinds.items() if number]
    return f"{len(row['kept'])} tokens: {', '.join(parts) or 'all untouched'}"


def _cut(text: str, tokens: int) -> str:
    """The text, or as much of its two ends as so many tokens are about."""
    half = 2 * tokens
    if len(text) <= 2 * half:
        return escaped(text)
    return (
        f"{escaped(text[:half])}<span class='gap'> … {len(text) - 2 * half} characters … </span>{escaped(text[-half:])}"
    )


def _float(value) -> float:
    return math.nan if value is None else float(value)  # "nan" and "inf" are texts in the files


def _number(value) -> str:
    return f"{float(value):.3g}"


def sections(samples: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]) -> str:
    """The samples of several iterations as HTML, the first of them open."""
    if not samples:
        return ""
    told = any("kept" in row for _, rows in samples for row in rows)
    parts = [legend()] if told else []
    for place, (iteration, rows) in enumerate(samples):
        shown = "".join(sample(row, _FEWER if place else _TOKENS) for row in rows[:8])
        parts.append(
            f"<details{' open' if place == 0 else ''}><summary>iteration {iteration}</summary>{shown}</details>"
        )
    return "".join(parts)
