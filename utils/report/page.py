"""Functions that make the parts of an HTML page. The page uses no network and no script, and supports phones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path


class Markup(str):
    """A text that is already HTML. Any other value is escaped before it is put on a page."""


def text(value: object) -> str:
    """Return a value as HTML. The value is escaped unless it is Markup."""
    return value if isinstance(value, Markup) else escape(str(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return an HTML table. If it is wider than the screen, only the table scrolls sideways, not the page."""
    head = ''.join(f'<th>{text(h)}</th>' for h in heads)
    head = f'<thead><tr>{head}</tr></thead>' if any(heads) else ''
    body = ''.join('<tr>' + ''.join(f'<td>{text(cell)}</td>' for cell in row) + '</tr>' for row in rows)
    return Markup(f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>')


def figures(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Return an HTML list that shows each pair (name, value) as a tile."""
    return Markup('<dl>' + ''.join(f'<div><dt>{text(a)}</dt><dd>{text(b)}</dd></div>' for a, b in pairs) + '</dl>')


def block(content: object) -> Markup:
    """Return the content as an HTML block of preformatted text (<pre>)."""
    return Markup(f'<pre>{text(content)}</pre>')


def section(title: str, *parts: object) -> Markup:
    """Return an HTML section with a title and these parts. Returns '' if all parts are empty."""
    body = ''.join(text(part) for part in parts if part)
    return Markup(f'<section><h2>{text(title)}</h2>{body}</section>' if body else '')


def page(title: str, *parts: object) -> str:
    """Return a complete HTML document. Its content security policy forbids all network requests and scripts."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    body = ''.join(text(part) for part in parts)
    style = Path(__file__).with_name('page.css').read_text(encoding='utf-8')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{style}</style></head>'
        f'<body>{body}</body></html>\n'
    )
