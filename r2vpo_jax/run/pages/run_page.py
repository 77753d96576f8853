"""The page of one run: how far it is, whether something is wrong, curves, samples, and where the time goes."""

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

from r2vpo_jax.run.pages import charts, times, tokens
from r2vpo_jax.run.pages.charts import Line
from r2vpo_jax.run.pages.history import History
from r2vpo_jax.run.pages.markup import duration, escaped, page, picture, visible

_STYLE = (
    charts.STYLE
    + tokens.STYLE
    + """
progress{width:100%;height:.8em;accent-color:var(--c0)}.alarm{background:var(--alarm-ground);color:var(--alarm);
border-left:5px solid var(--alarm);padding:.5em .9em;margin:.8em 0;border-radius:4px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:.7em;margin:1em 0}
.card{background:var(--panel);border-radius:6px;padding:.5em .8em}.card b{display:block;font-size:1.25em;font-weight:600}
"""
)


@dataclasses.dataclass(frozen=True)
class Status:
    """How a run is.

    Attributes:
      now: when the page is made, seconds of the epoch.
      wrote: when the run last wrote a line, where that is known apart from `now`.
      finished, stopped: whether it is.
      failed: why it will not go on, if so.
    """

    now: float
    wrote: float | None = None
    finished: bool = False
    stopped: bool = False
    failed: str | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more is to come for now."""
        return self.finished or self.stopped or self.failed is not None


def render(
    config: Mapping[str, Any],
    history: History,
    status: Status,
    *,
    result: str | None = None,
    pictures: Mapping[str, bytes] | None = None,
    refresh: bool = True,
    links: str = "",
) -> str:
    """The page as HTML.

    Args:
      config: plain values as in config.json.
      history: of the run.
      status: of the run.
      result: the closing table of a finished run.
      pictures: PNG files by what they show.
      refresh: whether a browser loads it again while there is more to come.
      links: HTML above everything, where the page is served.
    """
    name = f"{config['objective']['name']}, seed {config['seed']}"
    total, pace = config["trainer"]["num_iterations"], history.pace()
    again = min(max(round(pace or 10.0), 5), 120) if refresh and not status.over else None
    head = f"{_percent(history, total)} {name}" if not status.finished else name
    sections = {
        "Result": f"<pre>{_lines(result)}</pre>" if result else "",
        "Curves": _curves(config, history),
        "Samples": tokens.sections(history.samples),
        "Where the time goes": times.section(history.iterations),
        "Pictures": "".join(picture(png, text) for text, png in (pictures or {}).items()),
        "Events": _events(history),
        "Configuration": _folded("every field in force", f"<pre>{escaped(json.dumps(config, indent=2))}</pre>"),
    }
    body = (
        f"{links}<h1>{escaped(name)}</h1><p>{_where(history, status, total, pace)}</p>"
        f"<progress max='{total}' value='{history.iteration}' aria-label='iterations done'></progress>"
        f"{_alarms(history, status, pace)}{_cards(config, history)}"
        + "".join(f"<h2>{title}</h2>{content}" for title, content in sections.items() if content)
    )
    return page(head, body, style=_STYLE, guarded=True, refresh=again)


def _percent(history: History, total: int) -> str:
    return f"{100 * history.iteration // max(total, 1)} %"


def clock(seconds: float) -> str:
    """A time of the epoch, for people anywhere."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def left(history: History, total: int, pace: float | None) -> str:
    """ "3 min left"; "" before the first iteration."""
    return "" if pace is None else f"{duration(pace * max(total - history.iteration, 0))} left"


def _where(history: History, status: Status, total: int, pace: float | None) -> str:
    done = f"iteration {history.iteration} of {total}"
    written = f"last written at {clock(status.wrote if status.wrote is not None else status.now)}"
    if status.finished:
        return f"<b>finished</b> after {done}, {written}"
    if status.failed is not None:
        return f"<b>failed</b> after {done}, {written}"
    if status.stopped:
        return f"<b>stopped</b> after {done}, {written}; the same command goes on from there"
    if not history.iterations:
        return f"<b>{done}</b>: scores of the base model and compilation come first; {written}"
    parts = [f"<b>{done}</b>", left(history, total, pace), written]
    return ", ".join(part for part in parts if part)


# Signs that something is wrong ------------------------------------------------------------------------------------


def silence(status: Status, pace: float | None) -> float | None:
    """Seconds without a line, where that is long for a run of this pace; None: it is not, or is not known."""
    if status.over or status.wrote is None:
        return None
    quiet = status.now - status.wrote
    return quiet if quiet > max(5 * (pace or 60.0), 120.0) else None


def _alarms(history: History, status: Status, pace: float | None) -> str:
    found = [
        f"<b>ALARM {escaped(event['alarm'])}</b>, iteration {event['iteration']}: {escaped(visible(event['message']))}"
        for event in history.alarms
    ]
    if status.failed is not None:
        found.insert(0, f"<b>The run has failed</b>: {escaped(visible(status.failed))}")
    if (quiet := silence(status, pace)) is not None:
        usual = f"; an iteration takes {duration(pace)}" if pace else ""
        found.insert(0, f"<b>No line for {duration(quiet)}</b>{usual}: has the process ended?")
    skipped = sum(event["event"] == "nonfinite" for event in history.events)
    if skipped:
        found.append(f"<b>{skipped} updates were not finite</b> and were not applied; events.jsonl names their files")
    return "".join(f"<div class='alarm' role='alert'>{text}</div>" for text in found)


def _events(history: History) -> str:
    """The last ones, as they are in events.jsonl."""
    lines = [
        f"iteration {event['iteration']}: {event['event']}  "
        + json.dumps({k: v for k, v in event.items() if k not in ("event", "iteration")}, ensure_ascii=False)
        for event in reversed(history.events)
    ]
    return _folded(f"the last {len(lines)}", f"<pre>{_lines(chr(10).join(lines))}</pre>") if lines else ""


def _lines(text: str) -> str:
    return "\n".join(escaped(visible(line)) for line in text.split("\n"))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{content}</details>"


# Numbers and curves -----------------------------------------------------------------------------------------------


def last(values) -> float:
    """The last that is a number; nan if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return finite[-1] if finite else math.nan


def _cards(config: Mapping[str, Any], history: History) -> str:
    budget = _budget(config)
    bound = f" of {budget:g}" if budget is not None else ""
    shown = [
        ("validation pass@1", last(history.scores("validation")[1]), "{:.3f}", ""),
        ("mean reward", last(history.series("reward/mean", kind="any")[1]), "{:.3f}", ""),
        ("ratio variance V", last(held(history)[1]), "{:.3g}", bound),
        ("multiplier λ", last(history.series("dual/variance_coef")[1]), "{:.3g}", ""),
        ("entropy, nats", last(history.series("policy/entropy")[1]), "{:.3g}", ""),
        (
            "tokens/s sampled",
            last(history.series("throughput/rollout_tokens_per_second", kind="any")[1]),
            "{:,.0f}",
            "",
        ),
    ]
    cards = [
        f"<div class='card'><span class='small soft'>{name}</span><b>{form.format(value)}<span class='small soft'>{more}</span></b></div>"
        for name, value, form, more in shown
        if math.isfinite(value)
    ]
    return f"<div class='cards'>{''.join(cards)}</div>" if cards else ""


def held(history: History) -> tuple[list[float], list[float]]:
    """(iterations, V as the budget bounds it)."""
    x, signal = history.series("dual/signal")
    variance = history.series("ratio/variance")[1]
    return x, [v if math.isnan(s) else s for s, v in zip(signal, variance, strict=True)]


def _budget(config: Mapping[str, Any]) -> float | None:
    dual = config["objective"].get("dual", {})
    return dual.get("budget") if dual.get("adaptive") else None


def _curves(config: Mapping[str, Any], history: History) -> str:
    x, variance = held(history)
    budget, lines = _budget(config), [Line("V", x, variance, 0)]
    if budget is not None and x:
        lines.append(Line("budget δ", [x[0], x[-1]], [budget, budget], 1))

    def of(name: str, label: str, color: int = 0, kind: str = "train", dots: bool = False) -> Line:
        return Line(label, *history.series(name, kind=kind), color, dots)

    validation = Line("validation pass@1", *history.scores("validation"), 0, dots=True)
    drawn = [
        charts.line_chart("Reward", [validation, of("reward/mean", "training reward", 1, "any")]),
        charts.line_chart("Ratio variance V = E[(r − 1)²]", lines, log=True),
        charts.line_chart("Multiplier λ of the ratio variance", [of("dual/variance_coef", "λ", 3)]),
        charts.line_chart("Entropy, nats per token", [of("policy/entropy", "entropy", 2)]),
        charts.line_chart("Tokens that a clip at 0.2 would cut", [
            of("keeps/at_stake", "of the unclipped gradient", 1), of("clip/gradient_share", "of this gradient", 0)], percent=True),
        charts.line_chart("Response tokens", [
            of("response/length", "mean", 0, "any"), of("response/length_max", "longest", 1, "any")]),
        charts.line_chart("Responses without an end", [of("response/truncated", "truncated", 4, "any")], percent=True),
        charts.line_chart("Outliers", [
            of("ratio/max", "largest ratio r", 1), of("optimizer/grad_norm", "gradient norm", 3)], log=True),
        charts.line_chart("KL divergence per token", [of("kl/mean", "KL", 7)]),
        charts.line_chart("Tokens per second", [
            of("throughput/rollout_tokens_per_second", "sampled", 0, "any"),
            of("throughput/update_tokens_per_second", "learned from", 2)]),
    ]  # fmt: skip
    return f"<div class='charts'>{''.join(drawn)}</div>" if any(drawn) else ""
