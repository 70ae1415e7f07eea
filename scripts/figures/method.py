"""Draws assets/method.png: how the reward's gradient reaches the LoRA weights, and where it stops.

Run `python scripts/figures/method.py [OUTPUT.png]`; the picture depends on this file and matplotlib alone.
Coordinates are those of one canvas, origin at the lower left, the same scale in both directions.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon

OUTPUT = Path(__file__).resolve().parents[2] / "assets" / "method.png"
WIDTH, HEIGHT = 16.6, 5.5
INCH = 0.72  # of the printed figure, per canvas unit
LANE = 4.15  # height of the row that runs from noise to loss
TILE = 1.22  # side of a picture

INK, MUTED, LINE = "#1f2933", "#66727f", "#c3ccd5"
GREY, BLUE, GREEN, ORANGE = "#eef1f4", "#e3eefb", "#e4f4ea", "#e8590c"
BLUE_EDGE, GREEN_EDGE, LORA = "#3b82d0", "#2f9e5b", "#fff0e6"


def scene(size: int = 288) -> np.ndarray:
    """A sun over two ridges, `[size, size, 3]` in [0, 1]: what the noise turns into."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1)
    image = (1 - y[..., None]) * np.array(to_rgb("#5b8fd6")) + y[..., None] * np.array(to_rgb("#ffd9a8"))
    image[np.hypot(x - 0.64, y - 0.42) < 0.15] = to_rgb("#ffef9f")
    for height, slope, colour in ((0.56, 5.0, "#7d6b9e"), (0.74, 8.0, "#3f4a73")):
        ridge = height + 0.10 * np.sin(slope * x + 0.6) + 0.04 * np.sin(3.1 * slope * x)
        image[y > ridge] = to_rgb(colour)
    return image


def noised(level: float, seed: int = 0) -> np.ndarray:
    """The scene at a noise level in [0, 1], on the straight line of a rectified flow."""
    image = scene()
    noise = np.random.default_rng(seed).normal(0.5, 0.28, (24, 24, 3)).repeat(12, 0).repeat(12, 1)
    return np.clip((1 - level) * image + level * noise, 0, 1)


def text(ax: Axes, x: float, y: float, words: str, size: float = 12, colour: str = INK, **style) -> None:
    ax.text(x, y, words, fontsize=size, color=colour, ha="center", va="center", zorder=6, **style)


def box(ax: Axes, x: float, y: float, w: float, h: float, face: str, edge: str, zorder: float = 1) -> None:
    """A rounded rectangle with its lower left corner at (x, y)."""
    style = "round,pad=0,rounding_size=0.16"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc=face, ec=edge, lw=1.6, zorder=zorder))


def tile(ax: Axes, x: float, image: np.ndarray, y: float = LANE, zorder: float = 3) -> None:
    """A framed picture centred on (x, y)."""
    half = TILE / 2
    extent = (x - half, x + half, y - half, y + half)
    ax.imshow(image, extent=extent, zorder=zorder, interpolation="antialiased")
    frame = plt.Rectangle((x - half, y - half), TILE, TILE, fill=False, ec=INK, lw=1.1, zorder=zorder + 0.1)
    ax.add_patch(frame)


def arrow(ax: Axes, start: tuple, end: tuple, colour: str = INK, width: float = 1.8) -> None:
    shape = dict(arrowstyle="-|>", mutation_scale=13, shrinkA=0, shrinkB=0)
    ax.add_patch(FancyArrowPatch(start, end, lw=width, color=colour, zorder=5, **shape))


def hop(ax: Axes, x0: float, x1: float, gradient: bool) -> None:
    """Forward from x0 to x1 along the lane; with `gradient`, the way back beneath it."""
    if not gradient:
        arrow(ax, (x0, LANE), (x1, LANE))
        return
    arrow(ax, (x0, LANE + 0.2), (x1, LANE + 0.2))
    arrow(ax, (x1, LANE - 0.2), (x0, LANE - 0.2), ORANGE, 2.6)


def sampling(ax: Axes) -> None:
    """Noise, the steps without a graph, and the window that keeps it."""
    box(ax, 2.05, 2.98, 3.75, 2.72, GREY, LINE)
    text(ax, 3.92, 5.4, "first N − K steps", 13, weight="bold")
    text(ax, 3.92, 5.06, "no graph, no gradient", 11, MUTED)
    box(ax, 6.3, 2.98, 3.75, 2.72, BLUE, BLUE_EDGE)
    text(ax, 8.17, 5.4, "last K steps", 13, weight="bold")
    text(ax, 8.17, 5.06, "graph kept", 11, BLUE_EDGE)
    for x, level in ((0.95, 1.0), (2.95, 0.8), (4.9, 0.6), (7.2, 0.35), (9.15, 0.08)):
        tile(ax, x, noised(level))
    text(ax, 0.95, 3.25, "noise", 12)
    hop(ax, 1.62, 2.28, gradient=False)
    hop(ax, 3.62, 4.23, gradient=False)
    arrow(ax, (5.57, LANE + 0.2), (6.53, LANE + 0.2))
    # The way back ends at the edge of the window.
    ax.plot([6.55, 6.3], [LANE - 0.2] * 2, color=ORANGE, lw=2.6, zorder=5)
    ax.plot([6.3, 6.3], [LANE - 0.36, LANE - 0.04], color=ORANGE, lw=4, zorder=5, solid_capstyle="round")
    hop(ax, 7.87, 8.48, gradient=True)


def denoiser(ax: Axes) -> None:
    """The one network behind every step, and the only place where the gradient ends up."""
    box(ax, 2.05, 1.28, 8.0, 1.05, "white", MUTED)
    text(ax, 3.92, 1.93, "denoiser", 13, weight="bold")
    text(ax, 3.92, 1.57, "frozen", 11, MUTED)
    box(ax, 6.6, 1.45, 3.15, 0.71, LORA, ORANGE, zorder=2)
    text(ax, 8.17, 1.93, "LoRA weights", 13, ORANGE, weight="bold")
    text(ax, 8.17, 1.64, "all that is trained", 10.5, ORANGE)
    arrow(ax, (3.92, 2.33), (3.92, 2.98))
    arrow(ax, (7.6, 2.33), (7.6, 2.98))
    arrow(ax, (8.75, 2.98), (8.75, 2.2), ORANGE, 2.6)


def scoring(ax: Axes) -> None:
    """Frozen decoder, a few frames, frozen reward model, loss."""
    hop(ax, 9.82, 10.5, gradient=True)
    widening = [(10.5, 3.72), (10.5, 4.58), (11.6, 5.1), (11.6, 3.2)]
    ax.add_patch(Polygon(widening, closed=True, fc=GREEN, ec=GREEN_EDGE, lw=1.6, zorder=2))
    text(ax, 11.07, 4.3, "VAE", 12.5, weight="bold")
    text(ax, 11.07, 3.98, "frozen", 10.5, MUTED)
    hop(ax, 11.6, 12.1, gradient=True)
    for shift in (0.24, 0.12, 0.0):
        tile(ax, 12.72 + shift, noised(0.0), LANE + shift, zorder=4 - shift)
    text(ax, 12.84, 3.25, "some frames", 12)
    hop(ax, 13.58, 14.05, gradient=True)
    box(ax, 14.05, 3.5, 1.2, 1.3, GREEN, GREEN_EDGE)
    text(ax, 14.65, 4.3, "reward", 12.5, weight="bold")
    text(ax, 14.65, 3.98, "frozen", 10.5, MUTED)
    hop(ax, 15.25, 15.68, gradient=True)
    ax.add_patch(Circle((16.0, LANE), 0.36, fc="white", ec=INK, lw=1.6, zorder=3))
    text(ax, 16.0, LANE, "loss", 11)


def prompt(ax: Axes) -> None:
    """The prompt steers every step and is what the reward compares the frames with."""
    box(ax, 0.3, 1.45, 1.3, 0.71, "white", MUTED)
    text(ax, 0.95, 1.8, "prompt", 12)
    arrow(ax, (1.6, 1.8), (2.05, 1.8), MUTED)
    ax.plot([0.95, 0.95, 14.65], [1.45, 0.85, 0.85], color=MUTED, lw=1.8, zorder=1, solid_joinstyle="round")
    arrow(ax, (14.65, 0.85), (14.65, 3.5), MUTED)


def legend(ax: Axes) -> None:
    """What the two kinds of arrow mean."""
    arrow(ax, (10.75, 2.2), (11.35, 2.2))
    ax.text(11.5, 2.2, "forward", fontsize=11.5, color=INK, va="center")
    arrow(ax, (11.35, 1.7), (10.75, 1.7), ORANGE, 2.6)
    ax.text(11.5, 1.7, "gradient of the reward", fontsize=11.5, color=ORANGE, va="center")


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    figure = plt.figure(figsize=(WIDTH * INCH, HEIGHT * INCH), dpi=160, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    for draw in (sampling, denoiser, scoring, prompt, legend):
        draw(ax)
    ax.set(xlim=(0, WIDTH), ylim=(0.5, HEIGHT + 0.5), aspect="equal")
    ax.axis("off")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Software": None})


if __name__ == "__main__":
    main()
