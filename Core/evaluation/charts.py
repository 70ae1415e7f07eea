"""Charts as inline SVG whose colours are CSS variables, so that one picture suits a light and a dark page.

Beside each picture stand its numbers, for a page that shows the values under the pointer.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

SERIES = 12  # colours that page.html has
# matplotlib wants colours, the page wants variables: each stand-in is replaced once the picture is drawn.
VARIABLES = {
    "#010101": "var(--soft)",
    "#020202": "var(--line)",
    **{f"#0303{n:02x}": f"var(--series-{n})" for n in range(1, SERIES + 1)},
}
INK, GRID = "#010101", "#020202"
SIZE = (4.4, 2.35)  # inches of 100 units
LABEL_GAP = 0.105  # between labels beside the data, as a share of the height of the axes
SMOOTHED_FROM = 8  # values
# Phases that take a smaller share of the time than this would be lines without a width.
VISIBLE_SHARE = 0.005

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.labelcolor": INK,
    "figure.constrained_layout.use": True,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Line:
    """A curve over optimiser steps; ``dots`` marks each point, ``smooth`` draws a moving average over faint values."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    dots: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawn chart.

    Attributes:
        svg: the element.
        data: what a page needs to show values: ``box``, the axes' left, top, right and bottom as shares of the
            picture; ``range``, the steps at its left and right; ``lines`` with label, colour, steps and values.
    """

    svg: str
    data: dict[str, Any]


def series_colour(number: int) -> str:
    return f"#0303{number % SERIES + 1:02x}"


def line_chart(name: str, lines: Sequence[Line], y_label: str, log: bool = False) -> Plot:
    """One curve per line; ``name`` must differ between the charts of a page."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = _new_axes(y_label)
        if log:
            axes.set_yscale("log")
        drawn = [_draw(axes, line, series_colour(number)) for number, line in enumerate(lines)]
        _label_beside(axes, [(line.label, _last(line.values), colour) for line, colour in drawn])
        return _finish(figure, axes, name, _with_means(lines, drawn))


def stack_chart(
    name: str, steps: Sequence[float], parts: Mapping[str, Sequence[float]], y_label: str
) -> Plot:
    """The parts piled on each other, each in a colour of its own; those that take next to nothing are left out."""
    total = sum(np.nansum(values) for values in parts.values())
    numbered = enumerate(parts.items())
    shown = [
        (Line(label, steps, values), series_colour(number))
        for number, (label, values) in numbered
        if np.nansum(values) >= VISIBLE_SHARE * total
    ]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = _new_axes(y_label)
        values, colours = [line.values for line, _ in shown], [colour for _, colour in shown]
        axes.stackplot(steps, *values, colors=colours, linewidth=0)
        axes.set_ylim(bottom=0)
        tops = np.cumsum([_last(line.values) for line, _ in shown])
        middles = [top - _last(line.values) / 2 for top, (line, _) in zip(tops, shown, strict=True)]
        _label_beside(axes, [(line.label, y, c) for (line, c), y in zip(shown, middles, strict=True)])
        return _finish(figure, axes, name, shown[::-1])


def _new_axes(y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    axes.margins(x=0.02)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(y_label)
    return figure, axes


def _draw(axes, line: Line, colour: str) -> tuple[Line, str]:
    """The line as it is labelled: its moving average where it has one."""
    marker = "o" if line.dots or len(line.values) < 3 else None
    if not line.smooth or len(line.values) < SMOOTHED_FROM:
        axes.plot(line.steps, line.values, color=colour, linewidth=1.6, marker=marker, markersize=4)
        return line, colour
    width = max(1, len(line.values) // 20)
    smooth = moving_average(np.asarray(line.values, dtype=float), width)
    axes.plot(line.steps, line.values, color=colour, linewidth=0.9, alpha=0.35)
    axes.plot(line.steps, smooth, color=colour, linewidth=1.9)
    return Line(line.label, line.steps, smooth.tolist()), colour


def _with_means(lines: Sequence[Line], drawn: Sequence[tuple[Line, str]]) -> list[tuple[Line, str]]:
    """What is shown under the pointer: every line, followed by its moving average where that was drawn."""
    shown = []
    for line, (mean, colour) in zip(lines, drawn, strict=True):
        shown.append((line, colour))
        if mean is not line:
            shown.append((replace(mean, label=f"{line.label}, smoothed"), colour))
    return shown


def _last(values: Sequence[float]) -> float:
    """The last value that is a number; 0 where none is."""
    known = [value for value in values if math.isfinite(value)]
    return float(known[-1]) if known else 0.0


def _label_beside(axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Write labels (text, y, colour) to the right of the axes, beside their data and clear of each other."""
    if len(labels) < 2:
        return
    low_to_high = sorted(labels, key=lambda label: label[1])
    axes.get_ylim()  # settles the limits that the transform uses
    to_share = axes.transData + axes.transAxes.inverted()
    heights: list[float] = []
    for _, y, _ in low_to_high:
        wanted = float(np.clip(to_share.transform((0, y))[1], 0, 1))
        heights.append(max(wanted, heights[-1] + LABEL_GAP) if heights else wanted)
    excess = max(0.0, heights[-1] - 1)
    for place in reversed(range(len(heights))):  # push down what left the axes
        ceiling = 1 - LABEL_GAP * (len(heights) - 1 - place)
        heights[place] = min(heights[place], ceiling) if excess else heights[place]
    for (text, _, colour), height in zip(low_to_high, heights, strict=True):
        axes.text(1.03, height, text, color=colour, transform=axes.transAxes, va="center", fontsize=8.5)


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over up to ``width`` values on each side, fewer at the ends; NaN is left out."""
    known = ~np.isnan(values)
    kernel = np.ones(2 * width + 1)
    total = np.convolve(np.where(known, values, 0), kernel)[width : width + len(values)]
    count = np.convolve(known.astype(float), kernel)[width : width + len(values)]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _finish(figure: Figure, axes, name: str, lines: Sequence[tuple[Line, str]]) -> Plot:
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    low, high = axes.get_xlim()
    if high - low < 1:  # a single step, which matplotlib would show among hundredths of steps
        axes.set_xlim(low - 1, high + 1)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    svg = _to_svg(figure, name)
    box, (low, high) = axes.get_position(), axes.get_xlim()
    data = {
        "box": [round(share, 4) for share in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)],
        "range": [low, high],
        "lines": [_numbers(line, VARIABLES[colour]) for line, colour in lines],
    }
    return Plot(svg, data)


def _numbers(line: Line, colour: str) -> dict[str, Any]:
    values = [float(f"{value:.5g}") if math.isfinite(value) else None for value in line.values]
    return {"label": line.label, "colour": colour, "steps": list(line.steps), "values": values}


def _to_svg(figure: Figure, name: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    for noise in (r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</defs>", r"font-family: [^;]*; "):
        svg = re.sub(noise, "", svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    # The page decides how large a chart is, its viewBox how it is shaped.
    tag, _, body = svg[svg.index("<svg") :].partition(">")
    svg = re.sub(r' (width|height)="[^"]*"', "", tag) + ">" + body
    return _unique_ids(svg, name)


def _unique_ids(svg: str, name: str) -> str:
    """Ids that nothing refers to go, the others get the chart's name: a page holds several charts."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(url\(#|href="#)([^)"]+)', rf"\g<1>{name}-\g<2>", svg)
