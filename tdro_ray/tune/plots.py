"""The plots of the study's page, as SVG text for inlining. The same conventions as the run report's plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tdro_ray.report.drawing import INK, MUTED, NARROW, PAPER, SERIES, draw, legend_above

MARKERS = "osD^vP*X"
FAINTEST = 0.12  # opacity of the lowest objective


def landscape(name: str, width: int, points: Sequence[tuple[int, float, float, str, float]], label: str) -> str:
    """Trials over eta (across) and temperature (up), one point per (number, eta, temperature, measure, objective).

    The fuller a point, the higher its objective; its form is the measure, its label the trial's number.
    """
    values = [point[-1] for point in points]
    low, high = min(values), max(values)
    measures = list(dict.fromkeys(point[3] for point in points))

    def paint(axes: Any) -> None:
        axes.set(xscale="log", yscale="log", xlabel="eta", ylabel="temperature")
        for number, eta, temperature, measure, value in sorted(points, key=lambda p: p[-1]):
            full = (value - low) / (high - low) if high > low else 1.0
            form = {"marker": MARKERS[measures.index(measure) % len(MARKERS)], "markersize": 15, "linestyle": "none"}
            axes.plot([eta], [temperature], **form, color=PAPER, zorder=2)
            axes.plot([eta], [temperature], **form, color=SERIES[1], alpha=FAINTEST + (1 - FAINTEST) * full, zorder=3)
            axes.plot([eta], [temperature], **form, color=SERIES[1], markerfacecolor="none", zorder=4)
            best = value == high
            text = f"{number}: {value:.3f}" if best or number == 0 else str(number)
            axes.annotate(
                text,
                (eta, temperature),
                xytext=(10, 6),
                textcoords="offset points",
                color=INK if best else MUTED,
                fontweight="bold" if best else "normal",
                zorder=5,
            )
        for measure in measures:
            marker = MARKERS[measures.index(measure) % len(MARKERS)]
            axes.plot([], [], marker=marker, markersize=9, linestyle="none", color=SERIES[1], label=measure)
        _few_ticks(axes)
        axes.margins(0.09, 0.12)
        legend_above(axes, width, measures)

    return draw(name, f"{label} of each trial over eta and temperature", width, 380 if width > NARROW else 340, paint)


def _few_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def parallel(
    name: str, width: int, trials: Sequence[tuple[int, Mapping[str, Any], float]], logs: Sequence[str], label: str
) -> str:
    """Parallel coordinates: one line per trial of (number, setting, objective) through its values and its objective.

    The three best trials have a colour each, trial 0 is dashed. `logs` names the fields on a log scale.
    """
    fields = [*trials[0][1], label]
    scales = {f: _scale([t[1][f] for t in trials], f in logs) for f in fields[:-1]}
    scales[label] = _scale([t[2] for t in trials], False)
    ranked = sorted(trials, key=lambda t: -t[2])
    colour = {t[0]: SERIES[1 + i] for i, t in enumerate(ranked[:3])}

    def paint(axes: Any) -> None:
        for number, setting, value in reversed(ranked):
            heights = [scales[f][0](setting[f]) for f in fields[:-1]] + [scales[label][0](value)]
            dashed = (0, (4, 2)) if number == 0 else "solid"
            axes.plot(
                range(len(fields)),
                heights,
                color=colour.get(number, INK if number == 0 else SERIES[0]),
                linewidth=2.4 if number in colour else 1.3,
                alpha=1 if number in colour or number == 0 else 0.6,
                linestyle=dashed,
                label=f"trial {number}" + (" (the recipe's own)" if number == 0 else ""),
            )
        box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 1}
        for i, field in enumerate(fields):
            axes.axvline(i, color=MUTED, linewidth=1, zorder=0)
            for height, text in scales[field][1]:
                axes.annotate(
                    text,
                    (i, height),
                    xytext=(4, 3),
                    textcoords="offset points",
                    color=INK,
                    fontsize=11,
                    bbox=box,
                    zorder=6,
                )
        axes.set_xticks(range(len(fields)), [_short(f, width) for f in fields], color=INK)
        axes.set_yticks([])
        axes.set(ylim=(-0.06, 1.1), xlim=(-0.1, len(fields) - 1 + (0.28 if width > NARROW else 0.5)))
        axes.grid(False)
        axes.spines[:].set_visible(False)
        shown = [f"trial {t[0]}" + (" (the recipe's own)" if t[0] == 0 else "") for t in ranked[:3]]
        own = "trial 0 (the recipe's own)"
        legend_above(axes, width, shown if own in shown else [*shown, own])

    return draw(name, f"Settings of each trial and their {label}", width, 360, paint)


def _short(field: str, width: int) -> str:
    return field if width > NARROW or len(field) <= 9 else f"{field[:8]}…"


def _scale(values: Sequence[Any], log: bool) -> tuple[Any, list[tuple[float, str]]]:
    """Return (value -> height in 0..1, [(height, text)] of the marks): the ends of numbers, every name."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        form = math.log if log else float
        low, high = form(min(values)), form(max(values))
        span = high - low
        marks = [(0.0, f"{min(values):.3g}"), (1.0, f"{max(values):.3g}")] if span else [(0.5, f"{values[0]:.3g}")]
        return (lambda v: (form(v) - low) / span if span else 0.5), marks
    names = sorted({str(v) for v in values})
    place = {n: i / (len(names) - 1) if len(names) > 1 else 0.5 for i, n in enumerate(names)}
    return (lambda v: place[str(v)]), [(height, n) for n, height in place.items()]


def growth(name: str, width: int, lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], label: str) -> str:
    """The objective over a trial's fine-tuning, one line per trial."""

    def paint(axes: Any) -> None:
        for i, (trial, (steps, values)) in enumerate(lines.items()):
            axes.plot(
                steps,
                values,
                marker="o",
                markersize=5,
                color=SERIES[(i + 1) % len(SERIES)] if i < 7 else SERIES[0],
                label=trial,
            )
        axes.set_xlabel("step of the fine-tuning")
        axes.set_title(label, loc="left", color=MUTED)
        legend_above(axes, width, list(lines)[:7])

    return draw(name, f"{label} over the fine-tuning", width, 300, paint)
