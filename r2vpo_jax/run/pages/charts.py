"""Small drawings as SVG, which is drawn in milliseconds and follows the colors of the page.

Matplotlib takes seconds for as much, too long for a page that is written while a run goes on.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from r2vpo_jax.run.pages.markup import escaped

_WIDTH, _HEIGHT = 340, 190  # units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 22  # margins
_POINTS = 200  # of a line: more cannot be seen
_MARKED = 60  # points of a line at most that have a value to hover over
_FAR = 3.0  # times the median
_DASHES = ("", "5 3", "2 2", "7 2 2 2")

STYLE = """
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:1em}
figure{margin:0;border:1px solid var(--line);border-radius:6px;padding:.6em .7em}figcaption{font-size:13px}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
svg .grid{stroke:var(--line);stroke-width:1}svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg.stack{min-width:600px}svg.stack text{font-size:9px}svg .over{fill:var(--ink);paint-order:stroke;stroke:var(--ground);stroke-width:3px}
svg .dot{stroke:none}svg .hover{fill:transparent}svg .hover:hover{fill:var(--ink);fill-opacity:.35}
.key{display:inline-flex;align-items:center;gap:.4em;margin-right:1em}.key svg{width:26px;height:10px}
"""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart: where a value is not finite, there is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0  # number of a color of the page
    dots: bool = False  # few points, each drawn


def line_chart(
    title: str, lines: Sequence[Line], *, log: bool = False, percent: bool = False, x_name="iteration"
) -> str:
    """A figure with a caption, a key, and values to hover over; "" if there is nothing to draw.

    Args:
      title: what is drawn, and its unit.
      lines: at least one.
      log: a logarithmic axis, where values that are not above 0 are left out.
      percent: values are shares.
      x_name: what x is.
    """
    drawn = [dataclasses.replace(line, **dict(zip("xy", _finite(line, log), strict=True))) for line in lines]
    drawn = [line for line in drawn if any(map(math.isfinite, line.y))]
    if not drawn:
        return ""
    values = [y for line in drawn for y in line.y if math.isfinite(y)]
    first, last = min(line.x[0] for line in drawn), max(line.x[-1] for line in drawn)
    low, high, ticks = _log_axis(values) if log else _axis(values)
    across = (_WIDTH - _LEFT - _RIGHT) / max(last - first, 1)

    def at_x(x: float) -> float:
        return _LEFT + (x - first) * across

    def at_y(y: float) -> float:
        share = (math.log(y / low) / math.log(high / low)) if log else (y - low) / (high - low)
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    def short(y: float) -> str:
        if percent:
            return f"{100 * y:.3g} %"
        for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if y >= 10 * unit:
                return f"{y / unit:g}{sign}"
        return f"{y:.4g}"

    def said(y: float) -> str:
        if not percent and abs(y) >= 1e4:
            return f"{y:,.0f}"
        return f"{100 * y:.3g} %" if percent else f"{y:.4g}"

    parts = []
    for tick in ticks:
        y = at_y(tick)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{_LEFT - 5}' y='{y + 4:.1f}' text-anchor='end'>{short(tick)}</text>")
    for x, anchor in {first: "start", last: "end"}.items():
        parts.append(f"<text x='{at_x(x):.1f}' y='{_HEIGHT - 6}' text-anchor='{anchor}'>{x:g}</text>")
    parts.append(f"<text x='{(_LEFT + _WIDTH) / 2:.0f}' y='{_HEIGHT - 6}' text-anchor='middle'>{x_name}</text>")
    for number, line in enumerate(drawn):
        points = _thinned(line.x, line.y)
        path = _path([(at_x(x), at_y(y) if math.isfinite(y) else math.nan) for x, y in points])
        dash = f" stroke-dasharray='{_DASHES[number % len(_DASHES)]}'" if number else ""
        parts.append(f"<path class='line' d='{path}' style='stroke:var(--c{line.color})'{dash}/>")
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        if line.dots or len(finite) == 1:
            parts += [
                f"<circle class='dot' cx='{at_x(x):.1f}' cy='{at_y(y):.1f}' r='2.6' style='fill:var(--c{line.color})'/>"
                for x, y in finite
            ]
        every = -(-len(finite) // _MARKED)
        parts += [
            f"<circle class='hover' cx='{at_x(x):.1f}' cy='{at_y(y):.1f}' r='5'>"
            f"<title>{escaped(line.name)}, {x_name} {x:g}: {said(y)}</title></circle>"
            for x, y in finite[::-every]
        ]
    latest = [(line, next(y for y in reversed(line.y) if math.isfinite(y))) for line in drawn]
    heard = f"{title}; last values: " + ", ".join(f"{line.name} {said(y)}" for line, y in latest)
    keys = "".join(
        _key(line.color, f"{line.name}: {said(y)}", dash=_DASHES[number % len(_DASHES)] if number else "")
        for number, (line, y) in enumerate(latest)
    )
    return (
        f"<figure><figcaption><b>{escaped(title)}</b></figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escaped(heard)}'>{''.join(parts)}</svg>"
        f"<figcaption class='soft'>{keys}</figcaption></figure>"
    )


def _key(color: int, text: str, dash: str = "", block: bool = False) -> str:
    drawn = (
        f"<rect width='26' height='10' style='fill:var(--c{color})'/>"
        if block
        else f"<path class='line' d='M0 5H26' style='stroke:var(--c{color})' stroke-dasharray='{dash}'/>"
    )
    return f"<span class='key'><svg viewBox='0 0 26 10' aria-hidden='true'>{drawn}</svg>{escaped(text)}</span>"


def stacked_chart(
    title: str, bars: Sequence[tuple[str, Sequence[float]]], names: Sequence[tuple[str, int]], *, unit: str
) -> str:
    """A figure of bars side by side, each a stack of as many parts as there are names.

    Args:
      title: what is drawn.
      bars: what each is of, and its parts, from below; not negative.
      names: of the parts, each with the number of a color of the page.
      unit: of the parts.
    """
    width, height, sums = 760, 190, [sum(parts) for _, parts in bars]
    if not any(sums):
        return ""
    # One that is far above the others (an iteration that compiled) would flatten them: it is cut off, and says how high it is.
    usual = [total for total in sums if total <= _FAR * statistics.median(sums)] or sums
    _, high, ticks = _axis([0.0, max(usual)])
    per_unit, each = (height - _TOP - _BOTTOM) / high, (width - _LEFT - _RIGHT) / len(bars)
    drawn = []
    for tick in ticks:
        y = height - _BOTTOM - tick * per_unit
        drawn.append(f"<line class='grid' x1='{_LEFT}' x2='{width - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        drawn.append(f"<text x='{_LEFT - 5}' y='{y + 4:.1f}' text-anchor='end'>{tick:g}</text>")
    cut_off = []
    for place, (of, parts) in enumerate(bars):
        x, y, room = _LEFT + place * each + 0.08 * each, height - _BOTTOM, high
        for (name, color), part in zip(names, parts, strict=True):
            shown = min(part, room)
            if shown <= 0:
                continue
            room -= shown
            y -= shown * per_unit
            drawn.append(
                f"<rect x='{x:.1f}' y='{y:.2f}' width='{0.84 * each:.2f}' height='{shown * per_unit:.2f}' "
                f"style='fill:var(--c{color})'><title>{escaped(of)}: {escaped(name)} {part:.3g} {unit} of "
                f"{sum(parts):.3g}</title></rect>"
            )
        if sum(parts) > high:
            at_end = place > len(bars) / 2
            where = f"x='{x - 3:.1f}' text-anchor='end'" if at_end else f"x='{x + 0.84 * each + 3:.1f}'"
            said = f"{sum(parts):.3g} {unit} →" if at_end else f"← {sum(parts):.3g} {unit}"
            cut_off.append(f"<text class='over' {where} y='{_TOP + 9 * (1 + len(cut_off) % 3)}'>{said}</text>")
    drawn += cut_off  # over the bars
    ends = {_LEFT: (bars[0][0], "start"), width - _RIGHT: (bars[-1][0], "end")}
    if len(bars) == 1:
        ends.popitem()
    drawn += [
        f"<text x='{x}' y='{height - 6}' text-anchor='{anchor}'>{escaped(of)}</text>"
        for x, (of, anchor) in ends.items()
    ]
    keys = "".join(_key(color, name, block=True) for name, color in names)
    return (
        f"<figure><figcaption><b>{escaped(title)}</b></figcaption><div class='wide'><svg class='stack' viewBox='0 0 {width} {height}' role='img' "
        f"aria-label='{escaped(title)}; the table below has the sums'>{''.join(drawn)}</svg></div>"
        f"<figcaption class='soft'>{keys}</figcaption></figure>"
    )


# Numbers ----------------------------------------------------------------------------------------------------------


def _finite(line: Line, log: bool) -> tuple[list[float], list[float]]:
    """x and y as they can be drawn."""
    return list(line.x), [y if math.isfinite(y) and (y > 0 or not log) else math.nan for y in line.y]


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """At most `_POINTS` points: of each stretch the smallest and the largest, so that no peak is lost."""
    points = list(zip(x, y, strict=True))
    if len(points) <= _POINTS:
        return points
    stretches, found = _POINTS // 2, []
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        finite = [point for point in part if math.isfinite(point[1])]
        if not finite:
            found.append(part[0])
            continue
        found += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
    return found if found[-1] == points[-1] else [*found, points[-1]]


def _path(points: Sequence[tuple[float, float]]) -> str:
    drawn, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            drawn.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = math.isfinite(y)
    return "".join(drawn)


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """(low, high, ticks): round numbers around the values; from 0 where they are not negative and not far from it."""
    low, high = min(values), max(values)
    if low > 0 and low < 0.6 * high:
        low = 0.0
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _log_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """(low, high, ticks): powers of ten around the values, or 1, 2 and 5 of them where there are few."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)
    step = -(-(last - first) // 5)
    ticks = [10.0**i for i in range(first, last + 1, step)]
    if ticks[-1] < 10.0**last:
        ticks.append(10.0 ** (first + step * len(ticks)))
    if last - first == 1:
        ticks = [factor * 10.0**first for factor in (1, 2, 5, 10)]
    return ticks[0], ticks[-1], ticks
