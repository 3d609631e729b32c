"""A self-contained HTML page: no network, no script, readable on a phone, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Contrast of text on its ground is at least 4.5 to 1 in both schemes.
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --panel: #f6f7f9; --text: #1b1f24; --faint: #59636e;
  --rule: #d8dde3; --c1: #0b5cad; --c2: #b3470e; --good: #1a6e33; --bad: #b3191f; --mark: #fff1bf; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --panel: #1d2127; --text: #e6e9ec; --faint: #a3adb8;
  --rule: #39414a; --c1: #6cb0f5; --c2: #f0955c; --good: #6bcf85; --bad: #ff8a8a; --mark: #52461a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .faint, figcaption, dt, th { color: var(--faint); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
dl div { background: var(--panel); border-radius: .5rem; padding: .5rem .75rem; }
dt { font-size: .85rem; } dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .9rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 11px; } .grid { stroke: var(--rule); stroke-width: 1; }
[class^=line] { fill: none; stroke-width: 1.75; } .line1 { stroke: var(--c1); } .line2 { stroke: var(--c2); }
.dot1 { fill: var(--c1); } .dot2 { fill: var(--c2); }
.key::before { content: ''; display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .6em; }
.key1::before { background: var(--c1); } .key2::before { background: var(--c2); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-top: 1px solid var(--rule); }
pre { white-space: pre-wrap; background: var(--panel); border-radius: .5rem; padding: .75rem; margin: .5rem 0;
  font-size: .9rem; } mark { background: var(--mark); color: inherit; }
.good { color: var(--good); } .bad { color: var(--bad); } .word { white-space: nowrap; font-weight: 600; }
th, td:first-child { overflow-wrap: normal; }
details > summary { cursor: pointer; color: var(--faint); }
"""


class Markup(str):
    """Text that is HTML already; every other text is escaped when it is put on a page."""


def text(value: object) -> str:
    """Return a value as HTML, escaped unless it is Markup."""
    return value if isinstance(value, Markup) else escape(str(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table that scrolls by itself where it is wider than the screen."""
    head = ''.join(f'<th>{text(h)}</th>' for h in heads)
    head = f'<thead><tr>{head}</tr></thead>' if any(heads) else ''
    body = ''.join('<tr>' + ''.join(f'<td>{text(cell)}</td>' for cell in row) + '</tr>' for row in rows)
    return Markup(f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>')


def figures(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Return name and value pairs as tiles."""
    return Markup('<dl>' + ''.join(f'<div><dt>{text(a)}</dt><dd>{text(b)}</dd></div>' for a, b in pairs) + '</dl>')


def block(content: object) -> Markup:
    """Return text as it is, its lines kept."""
    return Markup(f'<pre>{text(content)}</pre>')


def section(title: str, *parts: object) -> Markup:
    """Return a section, '' where there is nothing to put under its title."""
    body = ''.join(text(part) for part in parts if part)
    return Markup(f'<section><h2>{text(title)}</h2>{body}</section>' if body else '')


def page(title: str, *parts: object) -> str:
    """Return a whole document. It may load nothing and run nothing, and says so to the browser."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    body = ''.join(text(part) for part in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{_STYLE}</style></head>'
        f'<body>{body}</body></html>\n'
    )
