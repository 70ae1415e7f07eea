"""Read colour, shape and direction of motion from a demo video with plain image processing.

It knows the palette and outlines of `scripts.demo.world` but not how a video was made, so it judges generated and true
videos alike. The background is grey, so chroma marks the shape.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from scripts.demo import world

MIN_AREA = 40  # pixels; anything smaller is not a shape
MIN_TRAVEL = 5.0  # pixels between the first and the last quarter of the video
GRID = 48  # side of the normalised image in which outlines are compared
SOFTENINGS = (0, 6)  # passes of a small blur over the outlines


def read(video: np.ndarray) -> dict[str, str | None] | None:
    """Attributes of a video ``uint8 [T, H, W, 3]``, or None if no frame shows a coloured shape.

    Returns ``{"colour", "shape", "direction"}``; ``direction`` is None if the shape hardly moves.
    """
    found = [(frame, seen) for frame in video.astype(np.float32) / 255 if (seen := _find(frame)) is not None]
    if not found:
        return None
    frames = [frame for frame, _ in found]
    covers, centres = zip(*(seen for _, seen in found), strict=True)
    return {
        "colour": _colour(frames, covers),
        "shape": _shape(covers),
        "direction": _direction(np.array(centres)),
    }


def _find(frame: np.ndarray) -> tuple[np.ndarray, tuple[float, float]] | None:
    """Soft coverage ``[H, W]`` of the shape and its centre (x, y), or None."""
    chroma = frame.max(-1) - frame.min(-1)
    strongest = np.sort(chroma, axis=None)[-MIN_AREA]
    if strongest < 0.25:
        return None
    cover = np.clip(chroma / strongest, 0, 1)
    cover[cover < 0.3] = 0
    ys, xs = np.mgrid[0 : frame.shape[0], 0 : frame.shape[1]] + 0.5
    total = cover.sum()
    return cover, (float((cover * xs).sum() / total), float((cover * ys).sum() / total))


def _colour(frames: Sequence[np.ndarray], covers: Sequence[np.ndarray]) -> str:
    """The palette colour whose hue is closest to the median colour of well-covered pixels."""
    inside = np.concatenate([frame[cover > 0.85] for frame, cover in zip(frames, covers, strict=True)])
    hues = {name: _hue_vector(np.array(rgb) / 255) for name, rgb in world.COLOURS.items()}
    seen = _hue_vector(np.median(inside, axis=0))
    return max(hues, key=lambda name: float(hues[name] @ seen))


def _hue_vector(rgb: np.ndarray) -> np.ndarray:
    """Unit vector of a colour's hue in the plane orthogonal to grey."""
    red, green, blue = rgb
    plane = np.array([red - (green + blue) / 2, (green - blue) * np.sqrt(3) / 2])
    return plane / (np.linalg.norm(plane) + 1e-6)


@cache
def _outlines() -> dict[str, list[np.ndarray]]:
    """Each shape's normalised images, sharp and with the soft corners of a lossy decoder."""
    ys, xs = np.mgrid[0 : world.SIDE, 0 : world.SIDE] + 0.5 - world.SIDE / 2
    covers = {s: np.clip(0.5 - world.distance(s, xs, ys, 12.5), 0, 1) for s in world.SHAPES}
    return {name: [_normalised(_softened(cover, n)) for n in SOFTENINGS] for name, cover in covers.items()}


def _softened(cover: np.ndarray, times: int) -> np.ndarray:
    """Coverage after ``times`` passes of the binomial filter 1-2-1 along rows and columns."""
    for _ in range(times):
        for axis in (0, 1):
            cover = (np.roll(cover, 1, axis) + 2 * cover + np.roll(cover, -1, axis)) / 4
    return cover


def _normalised(cover: np.ndarray) -> np.ndarray:
    """Coverage resampled (bilinear) to a GRID² image around its bounding box, with zero mean and unit norm."""
    rows, columns = (np.flatnonzero((cover > 0.5).sum(axis) > 0) for axis in (1, 0))
    centre_y, centre_x = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    half = max(np.ptp(rows), np.ptp(columns)) / 2 + 1.5
    steps = np.linspace(-half, half, GRID)
    picture = _sample(cover, centre_y + steps, centre_x + steps)
    picture -= picture.mean()
    return picture / (np.linalg.norm(picture) + 1e-6)


def _sample(image: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Bilinear samples on the grid ``ys × xs``; zero outside the image."""
    padded = np.pad(image, 1)
    ys, xs = (np.clip(v + 1, 0, n - 1.001) for v, n in zip((ys, xs), padded.shape, strict=True))
    y0, x0 = ys.astype(int), xs.astype(int)
    fy, fx = (ys - y0)[:, None], (xs - x0)[None]
    top = padded[np.ix_(y0, x0)] * (1 - fx) + padded[np.ix_(y0, x0 + 1)] * fx
    bottom = padded[np.ix_(y0 + 1, x0)] * (1 - fx) + padded[np.ix_(y0 + 1, x0 + 1)] * fx
    return top * (1 - fy) + bottom * fy


def _shape(covers: Sequence[np.ndarray]) -> str:
    """The outline that correlates best with the frames' mean normalised image."""
    mean = np.mean([_normalised(cover) for cover in covers], axis=0)
    likeness = {name: max(float((o * mean).sum()) for o in soft) for name, soft in _outlines().items()}
    return max(likeness, key=likeness.__getitem__)


def _direction(centres: np.ndarray) -> str | None:
    """The main axis of motion from the first to the last quarter of the frames."""
    quarter = max(1, len(centres) // 4)
    dx, dy = centres[-quarter:].mean(0) - centres[:quarter].mean(0)
    if max(abs(dx), abs(dy)) < MIN_TRAVEL:
        return None
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"
