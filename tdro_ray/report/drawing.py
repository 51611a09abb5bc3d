"""How plots are drawn for inlining: no font files, no fixed colours, no ids that clash, the same bytes for the same data.

Colours come out as CSS variables with a fallback, so one drawing serves light, dark and print, and keeps its colours
when somebody copies it elsewhere. matplotlib is imported at first use, without pyplot and its global state.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Stand-ins that matplotlib draws with; `_inline` turns them into var(--name, fallback).
# Series colours: Okabe and Ito's palette, told apart under all common colour-vision deficiencies.
INK, MUTED, GRID, PAPER = "#fe0010", "#fe0011", "#fe0012", "#fe0013"
SERIES = ("#fe00c0", "#fe00c1", "#fe00c2", "#fe00c3", "#fe00c4", "#fe00c5", "#fe00c6", "#fe00c7")  # 0 is the baseline
VARIABLES = {
    INK: "var(--ink, #1a1f24)",
    MUTED: "var(--muted, #5c6770)",
    GRID: "var(--grid, #dde2e6)",
    PAPER: "var(--paper, #ffffff)",
    **dict(
        zip(
            SERIES,
            (
                "var(--c0, #8a949c)",
                "var(--c1, #0072b2)",
                "var(--c2, #d55e00)",
                "var(--c3, #009e73)",
                "var(--c4, #cc79a7)",
                "var(--c5, #e69f00)",
                "var(--c6, #56b4e9)",
                "var(--c7, #1a1f24)",
            ),
            strict=True,
        )
    ),
}
FONT_SIZE = 12.0  # CSS pixels, since a figure is drawn at 72 dots an inch
LABEL_GAP = 14.5  # pixels between two labels at a line's end
NARROW = 400  # at this width and below: phone
STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # measured with; the page's own font is put in its place
    "font.size": FONT_SIZE,
    "text.parse_math": False,  # a task may be called "$x$"
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": FONT_SIZE,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": FONT_SIZE,
    "lines.linewidth": 1.8,
}


def draw(name: str, description: str, width: int, height: int, paint: Callable[[Any], None]) -> str:
    """The SVG of a figure of that size, in CSS pixels, with one axes that `paint` fills."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # measured with a box, drawn by the browser
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), name, description, width, height)


def _inline(svg: str, name: str, description: str, width: int, height: int) -> str:
    """The drawing as an element of a page: own id prefix, CSS colours, the page's font, a description."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    body = re.sub(r"(font:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1system-ui, sans-serif", body)
    for stand_in, variable in VARIABLES.items():
        body = body.replace(stand_in, variable)
    body = re.sub(r"\n\s*", "\n", body).replace("xlink:href", "href")
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(description)}" xmlns="http://www.w3.org/2000/svg">{body.strip()}</svg>'
    )


def categories(axes: Any, places: Any, names: Sequence[str], width: int) -> None:
    """Names down the left side, the first on top, as plain text without grid lines."""
    axes.set_yticks(list(places), [short(n, width) for n in names], color=INK)
    axes.set_ylim(max(places) + 0.7, min(places) - 0.7)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def percent_axis(axes: Any, which: str, values: Sequence[float]) -> None:
    """Percent ticks; a log scale where the values span more than a factor of 8."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis, positive = getattr(axes, f"{which}axis"), [v for v in values if v > 0]
    if positive and max(positive) > 8 * min(positive) and len(positive) == len(values):
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))


def end_labels(axes: Any, ends: Mapping[str, float], texts: Mapping[str, str], colour: Mapping[str, str]) -> None:
    """A label right of each line's end, moved apart where they would overlap, joined to the end by a thin line."""
    order = sorted(ends, key=lambda task: ends[task])
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [to_axes.transform((0 if axes.get_xscale() == "linear" else 1, ends[task]))[1] for task in order]
    height = axes.figure.get_size_inches()[1] * 72 - 62  # what title and ticks leave for the axes
    for task, at, placed in zip(order, wanted, spread(wanted, LABEL_GAP / height), strict=True):
        line = colour.get(task, SERIES[0])
        axes.plot(
            [1.0, 1.02, 1.04], [at, placed, placed], color=line, linewidth=1.1, transform=axes.transAxes, clip_on=False
        )
        axes.text(
            1.05,
            placed,
            texts[task],
            transform=axes.transAxes,
            va="center",
            color=INK if task in colour else MUTED,
            fontsize=FONT_SIZE - 1,
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return places at least `gap` apart, in the order of the sorted `wanted` ones, with the least squared movement.

    Pools neighbours that would overlap (pool adjacent violators). Where all fit into 0..1 they stay within it.
    """
    shifted = [place - i * gap for i, place in enumerate(wanted)]  # now they only need to rise
    pools: list[tuple[float, int]] = []
    for place in shifted:
        total, count = place, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    room = 1 - (len(wanted) - 1) * gap
    level = [min(max(total / count, 0.0), max(room, 0.0)) for total, count in pools for _ in range(count)]
    return [place + i * gap for i, place in enumerate(level)]


def _legend_columns(width: int, labels: Sequence[str]) -> int:
    room = width * (0.95 if width <= NARROW else 0.75)
    return max(1, min(len(labels), int(room / (max(map(len, labels)) * 7.2 + 34))))


def legend_above(axes: Any, width: int, labels: Sequence[str]) -> None:
    known = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in labels if label in known]
    columns = _legend_columns(width, labels)
    axes.figure.legend(
        [known[label] for label in labels],
        [label if len(label) <= 30 else short(label, width) for label in labels],
        loc="outside upper left",
        ncols=columns,
        handlelength=1.2,
        columnspacing=1.4,
        borderpad=0.1,
    )


def short(name: str, width: int) -> str:
    """The name, its middle left out where the figure has no room for it."""
    most = 16 if width <= NARROW else 34
    return name if len(name) <= most else f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}"


def thinned(count: int, most: int = 240) -> np.ndarray:
    """Indices of at most about `most` of `count` points, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
