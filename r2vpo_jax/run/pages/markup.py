"""HTML that is safe to fill with what a model has written: text is escaped, and what cannot be seen is made visible."""

import base64
import html
import unicodedata
from collections.abc import Iterable, Sequence

# Nothing is loaded, nothing runs, and no frame shows the page, whatever a response may have slipped in.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_SEEN = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}
_DRAWN_AS_NOTHING = {
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
}  # categories of Unicode: controls, bidi marks, surrogates, …

# Colors that people with any color vision tell apart (Okabe and Ito, 2008), each dark enough or light enough for its ground.
_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1b1b;--soft:#5a5a5a;--line:#d4d4d0;--panel:#f5f5f2;--link:#0b57a4;
--alarm:#8a1c00;--alarm-ground:#fdeae4;--up:204 92 0;--down:0 104 176;--right:#00694b;--wrong:#8a1c00;
--c0:#0072b2;--c1:#d55e00;--c2:#00805f;--c3:#a3407f;--c4:#8f7400;--c5:#3d3d3d;--c6:#2f8ac4;--c7:#a06a00;--c8:#5f5f8f;--c9:#9a9a96}
@media(prefers-color-scheme:dark){:root{--ground:#16181b;--ink:#ececea;--soft:#a9adb2;--line:#3c4046;--panel:#212429;
--link:#7db8f0;--alarm:#ffb59e;--alarm-ground:#3a1a12;--up:214 104 18;--down:34 120 196;--right:#4fd0a5;--wrong:#ff9d80;
--c0:#56b4e9;--c1:#ff9142;--c2:#33c79b;--c3:#e39ac5;--c4:#f0e442;--c5:#dcdcdc;--c6:#8fc7ff;--c7:#e69f00;--c8:#a9a9e0;--c9:#74787d}}
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:1.5em auto;padding:0 1em;background:var(--ground);color:var(--ink)}
h1{font-size:1.5em;margin:.2em 0}h2{font-size:1.15em;margin:1.8em 0 .5em}h3{font-size:1em;margin:.2em 0}p{margin:.5em 0}
a{color:var(--link)}.soft{color:var(--soft)}.small{font-size:13px}
pre,.wide{overflow-x:auto}pre{background:var(--panel);padding:1em;font-size:13px}img{max-width:100%;background:#fff}
table{border-collapse:collapse;font-size:13px}th,td{padding:.25em .7em;text-align:left;white-space:nowrap}
th{border-bottom:1px solid var(--soft)}td{border-bottom:1px solid var(--line)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
summary{cursor:pointer}details{margin:.5em 0}
"""


def escaped(text) -> str:
    """As HTML, also inside of an attribute."""
    return html.escape(str(text))


def visible(text: str) -> str:
    """The text with a sign for each character that would not be seen, or would change the order of others.

    A line break and a tab stay what they are behind their sign.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character in _SEEN:
        return _SEEN[character]
    if unicodedata.category(character) not in _DRAWN_AS_NOTHING:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def page(title: str, body: str, *, style: str = "", guarded: bool = False, refresh: int | None = None) -> str:
    """A page that needs no other file and no network.

    Args:
      title: a text.
      body: HTML.
      style: more CSS.
      guarded: whether a browser is told the `POLICY`: where texts of models are on it.
      refresh: seconds after which a browser loads it again; None: it does not.
    """
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">' if guarded else ""
    again = "" if refresh is None else f"<meta http-equiv='refresh' content='{refresh}'>"
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escaped(title)}</title>"
        f"<meta name='viewport' content='width=device-width,initial-scale=1'>{policy}{again}"
        f"<style>{_STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def picture(png: bytes, text: str) -> str:
    """The picture itself, inlined; `text` says what it shows to those who do not see it."""
    return f"<img alt='{escaped(text)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """A table of HTML cells under texts; the last `numbers` columns are aligned as numbers are."""
    first = len(head) - numbers

    def line(tag: str, cells: Sequence[str]) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}{' class=n' if i >= first else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
            + "</tr>"
        )

    body = "".join(line("td", row) for row in rows)
    return f"<div class='wide'><table>{line('th', [escaped(title) for title in head])}{body}</table></div>"


def duration(seconds: float) -> str:
    """ "40 s", "3 min", "2 h 5 min" or "3 d 4 h"."""
    seconds = max(seconds, 0.0)
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds and round(seconds, 1) != round(seconds) else f"{seconds:.0f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
