"""The plots of the report, as SVG text for inlining.

Each function takes `name` (prefix of its ids, unique on the page), `width` in CSS pixels, and plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdro_ray.report.drawing import (
    INK,
    LABEL_GAP,
    MUTED,
    NARROW,
    PAPER,
    SERIES,
    categories,
    draw,
    end_labels,
    legend_above,
    percent_axis,
    short,
    thinned,
)
from tdro_ray.report.markup import share


def grouped_bars(
    name: str, width: int, groups: Sequence[str], scores: Mapping[str, Sequence[float | None]], label: str
) -> str:
    """Horizontal bars: per group one bar a series. The first two groups (mean, worst) stand apart from the tasks."""
    thick = 9
    places = np.arange(len(groups)) + np.where(np.arange(len(groups)) >= 2, 0.6, 0.0)
    step = thick * len(scores) + 12

    def paint(axes: Any) -> None:
        bar = thick / step
        for i, (series, values) in enumerate(scores.items()):
            offset = (i - (len(scores) - 1) / 2) * bar
            lengths = [0.0 if value is None else value for value in values]
            axes.barh(places + offset, lengths, height=bar * 0.86, color=SERIES[i % len(SERIES)], label=series)
        categories(axes, places, groups, width)
        axes.set_xlabel(label)
        legend_above(axes, width, list(scores))

    return draw(name, f"{label} of each model per task", width, int(places[-1] * step) + step + 80, paint)


def differences(name: str, width: int, rows: Sequence[tuple[str, float, float, float, bool]], label: str) -> str:
    """Points with intervals, one per row of (group, difference, low, high, significant); zero is marked."""

    def paint(axes: Any) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        for at, (_, middle, low, high, sure) in enumerate(rows):
            colour = SERIES[0] if not sure else SERIES[1] if middle > 0 else SERIES[2]
            axes.plot([low, high], [at, at], color=colour, linewidth=2.4, solid_capstyle="round")
            axes.plot(
                [middle],
                [at],
                "o",
                markersize=7.5,
                color=colour,
                markerfacecolor=colour if sure else PAPER,
                markeredgewidth=1.8,
            )
        categories(axes, range(len(rows)), [row[0] for row in rows], width)
        axes.set_xlabel(label)

    return draw(name, label, width, 23 * len(rows) + 62, paint)


def seed_weights(name: str, width: int, rows: Sequence[tuple[str, Sequence[float]]], start: float) -> str:
    """Dots: per row of (task, weight under each seed) one dot a seed, joined from lowest to highest, and their mean."""

    def paint(axes: Any) -> None:
        axes.axvline(start, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        for at, (_, values) in enumerate(rows):
            axes.plot([min(values), max(values)], [at, at], color=SERIES[0], linewidth=1.6)
            axes.plot(values, [at] * len(values), "o", markersize=5, color=SERIES[1], alpha=0.7)
            axes.plot([float(np.mean(values))], [at], "|", markersize=14, markeredgewidth=2.4, color=SERIES[1])
        categories(axes, range(len(rows)), [row[0] for row in rows], width)
        percent_axis(axes, "x", [value for _, values in rows for value in values])
        axes.set_xlabel("sampling weight" + (", log scale" if axes.get_xscale() == "log" else ""))

    return draw(name, "Learned weight of each task under every seed", width, 23 * len(rows) + 62, paint)


def length_profiles(name: str, width: int, rows: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    """Small histograms, one line per task of (task, queries, passages): counts by powers of two of the length."""

    def paint(axes: Any) -> None:
        for which, (label, colour) in enumerate((("queries", SERIES[1]), ("passages", SERIES[2])), 1):
            for at, row in enumerate(rows):
                counts = np.asarray(row[which], float)
                heights = 0.8 * counts / max(1.0, counts.max(initial=0.0))
                shown = label if at == 0 else None
                axes.bar(
                    np.arange(len(counts)) + 0.45 * (which - 1) + 0.05,
                    -heights,  # the axis of categories points down
                    width=0.43,
                    bottom=at + 0.4,
                    align="edge",
                    color=colour,
                    label=shown,
                )
        categories(axes, range(len(rows)), [row[0] for row in rows], width)
        most = max((len(counts) for row in rows for counts in row[1:]), default=1)
        ticks = list(range(0, most + 1, 2 if width > NARROW else 4))
        axes.set_xticks(ticks, [f"{2**t:,}" for t in ticks])
        axes.set_xlabel("characters, log scale")
        legend_above(axes, width, ["queries", "passages"])

    return draw(name, "Lengths of queries and passages of each task", width, 34 * len(rows) + 90, paint)


def negative_sources(name: str, width: int, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Stacked bars, one line per task of (task, given, mined, random): hard negatives a row."""
    labels = ("given", "mined", "random")

    def paint(axes: Any) -> None:
        start = np.zeros(len(rows))
        for which, label in enumerate(labels, 1):
            counts = np.array([row[which] for row in rows], float)
            axes.barh(range(len(rows)), counts, left=start, height=0.66, color=SERIES[which % len(SERIES)], label=label)
            start += counts
        categories(axes, range(len(rows)), [row[0] for row in rows], width)
        axes.set_xlabel("negatives a row")
        legend_above(axes, width, labels)

    return draw(name, "Hard negatives of each task by where they came from", width, 22 * len(rows) + 90, paint)


def heat(
    name: str,
    width: int,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    label: str,
) -> str:
    """Differences as coloured cells: blue above 0, orange below, the fuller the larger; None stays empty."""
    from matplotlib.patches import Rectangle

    most = max((abs(v) for line in values for v in line if v is not None), default=0.0) or 1.0

    def paint(axes: Any) -> None:
        for at, line in enumerate(values):
            for i, value in enumerate(line):
                if value is None:
                    continue
                colour, full = SERIES[1] if value > 0 else SERIES[2], abs(value) / most
                axes.add_patch(
                    Rectangle((i - 0.47, at - 0.45), 0.94, 0.9, color=colour, alpha=0.06 + 0.8 * full, linewidth=0)
                )
                if width > NARROW and len(columns) <= 20:
                    axes.text(i, at, f"{100 * value:+.0f}", ha="center", va="center", fontsize=10, color=INK)
        categories(axes, range(len(rows)), rows, width)
        axes.set_xticks(range(len(columns)), [short(c, NARROW) for c in columns], rotation=90, color=INK)
        axes.set_xlim(-0.6, len(columns) - 0.4)
        axes.xaxis.tick_top()
        axes.grid(False)
        axes.spines[:].set_visible(False)

    return draw(name, label, width, 21 * len(rows) + 130, paint)


def weight_changes(
    name: str, width: int, rows: Sequence[tuple[str, float, float | None, float]], before: str, after: str
) -> str:
    """Dumbbells: per row of (task, weight before, share of rows, weight after) a line from before to after."""

    def paint(axes: Any) -> None:
        for at, (_, start, natural, end) in enumerate(rows):
            colour = SERIES[1] if end >= start else SERIES[2]
            axes.plot([start, end], [at, at], color=colour, linewidth=2.4, zorder=2)
            axes.plot([start], [at], "o", markersize=6, color=SERIES[0], zorder=3, label=before if at == 0 else None)
            axes.plot([end], [at], "o", markersize=8.5, color=colour, zorder=4)
            if natural is not None:
                axes.plot(
                    [natural],
                    [at],
                    "|",
                    markersize=11,
                    markeredgewidth=2,
                    color=MUTED,
                    zorder=1,
                    label="share of rows" if at == 0 else None,
                )
        axes.plot([], [], "o", markersize=8.5, color=SERIES[1], label=f"{after}, gained")
        axes.plot([], [], "o", markersize=8.5, color=SERIES[2], label=f"{after}, lost")
        categories(axes, range(len(rows)), [row[0] for row in rows], width)
        percent_axis(axes, "x", [value for row in rows for value in row[1:] if value is not None])
        axes.set_xlabel("sampling weight" + (", log scale" if axes.get_xscale() == "log" else ""))
        legend_above(axes, width, ["share of rows", before, f"{after}, gained", f"{after}, lost"])

    return draw(
        name, f"Sampling weight of each task before and after: {before}, {after}", width, 23 * len(rows) + 100, paint
    )


def trajectories(
    name: str, width: int, steps: Sequence[int], lines: Mapping[str, Sequence[float]], start: float
) -> str:
    """Weights over steps, every task labelled at its line's end; the tasks that moved most have a colour of their own."""
    values = {task: np.asarray(line, dtype=np.float64) for task, line in lines.items()}
    moved = sorted(values, key=lambda task: -abs(values[task][-1] - start))
    colour = {task: SERIES[1 + i] for i, task in enumerate(moved[: len(SERIES) - 1])}

    def paint(axes: Any) -> None:
        keep = thinned(len(steps))
        for task, line in sorted(values.items(), key=lambda item: item[0] in colour):
            axes.plot(
                np.asarray(steps)[keep],
                line[keep],
                color=colour.get(task, SERIES[0]),
                linewidth=2 if task in colour else 1.2,
            )
        percent_axis(axes, "y", [v for line in values.values() for v in (line.min(), line.max())])
        axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        axes.axhline(start, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlabel("step of stage 1")
        axes.set_title(
            "sampling weight" + (", log scale" if axes.get_yscale() == "log" else ""), loc="left", color=MUTED
        )
        texts = {task: f"{short(task, width)} {share(line[-1])}" for task, line in values.items()}
        end_labels(axes, {task: float(line[-1]) for task, line in values.items()}, texts, colour)

    return draw(
        name,
        "Sampling weight of each task over the steps of stage 1",
        width,
        max(330, int(LABEL_GAP * len(values)) + 80),
        paint,
    )


def curves(
    name: str, width: int, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str, baseline: bool
) -> str:
    """Values over steps as (steps, values) per series: every logged value faint, their running mean bold.

    With `baseline` the first series takes the baseline's colour.
    """

    def paint(axes: Any) -> None:
        for i, (_, (steps, values)) in enumerate(series.items()):
            colour = SERIES[(i + (not baseline)) % len(SERIES)]
            keep = thinned(len(steps))
            at, raw = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
            axes.plot(at[keep], raw[keep], color=colour, linewidth=1, alpha=0.3)
            axes.plot(at[keep], _running_mean(raw)[keep], color=colour, label=list(series)[i])
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", color=MUTED)
        if len(series) > 1:
            legend_above(axes, width, list(series))

    return draw(name, label, width, 280, paint)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the values, shorter at both ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
