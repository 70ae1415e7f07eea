"""Line charts as inline SVG whose colours are CSS variables, so that one picture suits a light and a dark page."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# matplotlib wants colours, the page wants variables: each stand-in is replaced once the picture is drawn.
VARIABLES = {
    "#010101": "var(--soft)",
    "#020202": "var(--line)",
    **{f"#0303{n:02x}": f"var(--series-{n})" for n in range(1, 8)},
}
INK, GRID = "#010101", "#020202"
SIZE = (4.4, 2.35)  # inches of 100 units
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
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Line:
    """A curve over optimiser steps; ``dots`` marks each point, ``smooth`` adds a moving average over a faint curve."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    dots: bool = False
    smooth: bool = False


def series_colour(number: int) -> str:
    return f"#0303{number % 7 + 1:02x}"


def line_chart(name: str, lines: Sequence[Line], log: bool = False) -> str:
    """An SVG element with one curve per line; ``name`` must differ between the charts of a page."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=SIZE)
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            _draw(axes, line, series_colour(number))
        if log:
            axes.set_yscale("log")
        _finish(axes, len(lines) > 1)
        return _to_svg(figure, name)


def stack_chart(name: str, steps: Sequence[float], parts: Mapping[str, Sequence[float]]) -> str:
    """An SVG element with the parts piled on each other."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=SIZE)
        axes = figure.add_subplot()
        colours = [series_colour(number) for number in range(len(parts))]
        axes.stackplot(steps, *parts.values(), labels=list(parts), colors=colours, linewidth=0)
        axes.set_ylim(bottom=0)
        _finish(axes, True)
        return _to_svg(figure, name)


def _draw(axes, line: Line, colour: str) -> None:
    steps, values = np.asarray(line.steps, dtype=float), np.asarray(line.values, dtype=float)
    width = max(1, len(values) // 20)
    if line.smooth and width > 1:
        axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.3)
        axes.plot(steps, moving_average(values, width), color=colour, linewidth=1.8, label=line.label)
    else:
        marker = "o" if line.dots or len(values) < 3 else None
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=4, label=line.label)


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over up to ``width`` values on each side, fewer at the ends; NaN is left out."""
    known = ~np.isnan(values)
    kernel = np.ones(2 * width + 1)
    total = np.convolve(np.where(known, values, 0), kernel)[width : width + len(values)]
    count = np.convolve(known.astype(float), kernel)[width : width + len(values)]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _finish(axes, legend: bool) -> None:
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.margins(x=0.02)
    axes.set_xlabel("optimiser step")
    if legend:
        axes.legend(loc="best", ncols=2, handlelength=1.2, columnspacing=1.0)


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
