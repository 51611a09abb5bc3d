"""Small pieces of HTML. Every text goes through `esc`; functions take plain text unless they say HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

WIDE, HALF, PHONE = 976, 472, 356  # CSS pixels that a figure gets on a desktop, beside another, on a phone


def esc(text: object) -> str:
    """The text as HTML, safe in content and in quoted attributes."""
    return html.escape(str(text), quote=True)


def breakable(name: str) -> str:
    """HTML of a name that may be broken at its underscores, dashes, dots and slashes."""
    return re.sub(r"([_\-./])(?=\w)", r"\1<wbr>", esc(name))


def number(value: float | None, form: str = ",.0f") -> str:
    """The number as text, a dash where there is none."""
    return "–" if value is None else format(value, form).replace("-", "−")


def share(value: float | None) -> str:
    """A share in percent: one decimal, two digits below one percent."""
    return "–" if value is None else f"{value:.1%}" if value >= 0.00995 or value == 0 else f"{100 * value:.2g}%"


def below(name: str) -> str:
    """HTML of a name in small print below a number."""
    return f'<small class="name">{breakable(name)}</small>'


def missing(what: str) -> str:
    """HTML of a part that is not there, and why."""
    return f'<p class="missing">{esc(what)}</p>'


def figure(caption: str, draw: Callable[[str, int], str], name: str, width: int = WIDE) -> str:
    """HTML of a plot, drawn once for wide screens and once for a phone's. `draw` takes (id prefix, width in pixels)."""
    return (
        f"<figure><figcaption>{esc(caption)}</figcaption>"
        f'<div class="wide">{draw(name, width)}</div><div class="phone">{draw(f"{name}-phone", PHONE)}</div></figure>'
    )


def table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], text_columns: Sequence[int] = ()) -> str:
    """HTML of a table in its own scroll box. Cells are HTML; each row comes with its class ("" for none).

    Columns hold numbers, at the right, except the first and `text_columns`.
    """

    def row(cells: Sequence[str], tag: str, style: str = "") -> str:
        parts = []
        for i, cell in enumerate(cells):
            kind = ' class="text"' if i in text_columns else ""
            scope = ' scope="row"' if i == 0 and tag == "td" else ' scope="col"' if tag == "th" else ""
            name = "th" if i == 0 else tag
            parts.append(f"<{name}{scope}{kind}>{cell}</{name}>")
        return f"<tr{f' class={chr(34)}{style}{chr(34)}' if style else ''}>{''.join(parts)}</tr>"

    body = "\n".join(row(cells, "td", style) for cells, style in rows)
    return (
        f'<div class="box" tabindex="0"><table><thead>{row(head, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'
    )


def difference(value: float, sure: bool, form: str = ".3f") -> str:
    """HTML of a signed difference; only where it is significant it is coloured, bold and starred."""
    tone = f"{'up' if value > 0 else 'down'} sure" if sure else "unsure"
    return f'<span class="{tone}">{number(value, "+" + form)}{"*" if sure else ""}</span>'


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 8.2 s, 3 min 5 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
