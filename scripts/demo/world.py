"""The demo world: captioned videos of one coloured shape that moves over a background.

A scene is a pure function of ``(seed, index, split)``; its caption also depends on ``wording``. A video is
``uint8 [T=17, H=64, W=64, 3]`` at 24 fps.

The test split holds out one in eight (shape, colour, background, direction) combinations, chosen so that every pair of
attributes still occurs in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FRAMES, SIDE, FPS = 17, 64, 24
HELD_OUT_EVERY = 8

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 26, 28),
    "yellow": (245, 220, 20),
    "green": (25, 170, 45),
    "cyan": (20, 205, 215),
    "blue": (35, 65, 230),
    "purple": (185, 40, 215),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = ("dark", "light", "grey", "gradient", "striped")

# The first word of each tuple is the attribute's name; no word belongs to two attributes.
SHAPE_WORDS = {
    "circle": ("circle", "disc", "round dot"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
}
DIRECTION_WORDS = {
    "left": ("left", "to the left", "leftward"),
    "right": ("right", "to the right", "rightward"),
    "up": ("up", "upward", "to the top"),
    "down": ("down", "downward", "to the bottom"),
}
BACKGROUND_WORDS = {
    "dark": ("dark", "black"),
    "light": ("light", "pale"),
    "grey": ("grey",),
    "gradient": ("gradient", "shaded"),
    "striped": ("striped",),
}
TEMPLATES = (
    "a {colour} {shape} moves {direction} over a {background} background",
    "a {colour} {shape} moving {direction} on a {background} background",
    "a {colour} {shape} slides {direction} in front of a {background} wall",
    "a {colour} {shape} glides {direction} against a {background} backdrop",
    "the {colour} {shape} is going {direction} over a {background} backdrop",
    "a video of a {colour} {shape} that drifts {direction} on a {background} background",
    "{colour} {shape} travelling {direction}, {background} background",
    "on a {background} background a {colour} {shape} moves {direction}",
    "over a {background} wall, a {colour} {shape} floats {direction}",
    "one {colour} {shape} on {background} ground, moving {direction}",
    "a {shape} of {colour} colour moves {direction} over a {background} background",
    "a {shape} in {colour} glides {direction}, {background} backdrop",
    "moving {direction}: a {colour} {shape} on a {background} background",
    "a plain {background} scene with a {colour} {shape} going {direction}",
)


@dataclass(frozen=True)
class Scene:
    """Contents of one video; lengths in pixels, ``start`` = (x, y) of the centre, ``speed`` in pixels per frame."""

    shape: str
    colour: str
    background: str
    direction: str
    size: float
    start: tuple[float, float]
    speed: float


def held_out(shape: str, colour: str, background: str, direction: str) -> bool:
    """Whether the combination belongs to the test split."""
    code = (
        SHAPES.index(shape)
        + 3 * list(COLOURS).index(colour)
        + 5 * BACKGROUNDS.index(background)
        + 2 * list(DIRECTIONS).index(direction)
    )
    return code % HELD_OUT_EVERY == 0


def _draw_attributes(rng: np.random.Generator, test: bool) -> tuple[str, str, str, str]:
    while True:
        drawn = tuple(
            str(rng.choice(names)) for names in (SHAPES, list(COLOURS), BACKGROUNDS, list(DIRECTIONS))
        )
        if held_out(*drawn) == test:
            return drawn


def scene(seed: int, index: int, split: str = "train") -> Scene:
    """Scene ``index`` of a split (``train`` or ``test``); the shape stays inside the picture in all frames."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; use 'train' or 'test'.")
    rng = np.random.default_rng([seed, index, int(split == "test")])
    shape, colour, background, direction = _draw_attributes(rng, split == "test")
    size, speed = rng.uniform(21, 28), rng.uniform(1.0, 2.0)
    low, high = size / 2 + 1, SIDE - size / 2 - 1
    travel = speed * (FRAMES - 1)
    along = rng.uniform(low, high - travel)
    across = rng.uniform(low + 4, high - 4)
    dx, dy = DIRECTIONS[direction]
    forward = along if dx + dy > 0 else SIDE - along
    start = (forward, across) if dx else (across, forward)
    return Scene(shape, colour, background, direction, float(size), start, speed)


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside, y pointing down) from points to a shape centred at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    if shape == "triangle":
        # Upright, and lowered so that its bounding box is centred: the apex touches the circle of the given radius.
        sides = np.abs(x) * 0.894 - (y + radius) * 0.447
        return np.maximum(sides, y - 0.9 * radius)
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - radius, short - 0.32 * radius)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * radius) - 0.24 * radius
    return _star_distance(x, y, 1.08 * radius)


def _star_distance(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Five-pointed star: fold the plane into one half-point and measure to the line tip → inner corner."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    r = np.hypot(x, y)
    px, py = r * np.sin(angle), r * np.cos(angle)
    inner = 0.45 * radius
    corner_x, corner_y = inner * np.sin(sector / 2), inner * np.cos(sector / 2)
    edge_x, edge_y = corner_x, corner_y - radius
    return ((py - radius) * edge_x - px * edge_y) / np.hypot(edge_x, edge_y)


def _background(name: str) -> np.ndarray:
    """``float [H, W, 3]`` in 0…255, with low saturation so that only the shape is coloured."""
    rows = np.arange(SIDE, dtype=float)[:, None]
    tone = {
        "dark": np.full((SIDE, 1), 22.0),
        "light": np.full((SIDE, 1), 226.0),
        "grey": np.full((SIDE, 1), 120.0),
        "gradient": 40 + 150 * rows / (SIDE - 1),
        "striped": np.where((rows // 8) % 2 == 0, 75.0, 135.0),
    }[name]
    return np.broadcast_to(tone[:, :, None], (SIDE, SIDE, 3)).copy()


def centres(scene: Scene, frames: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the shape's centre at each frame; after frame 16 it may reach a border and turn around."""
    dx, dy = DIRECTIONS[scene.direction]
    low, high = scene.size / 2 + 1, SIDE - scene.size / 2 - 1
    walked = scene.speed * np.asarray(frames)
    places = []
    for start, step in zip(scene.start, (dx, dy), strict=True):
        along = (start - low + step * walked) % (2 * (high - low))
        places.append(low + np.minimum(along, 2 * (high - low) - along))
    return places[0], places[1]


def render(
    scene: Scene,
    frames: Sequence[int] = range(FRAMES),
    towards: Scene | None = None,
    shape: float = 0.0,
    colour: float = 0.0,
    fade: float = 0.0,
) -> np.ndarray:
    """The selected frames of a scene, ``uint8 [T, H, W, 3]``, antialiased by the distance to the shape's outline.

    ``shape`` and ``colour`` (0 to 1) blend the outline and colour towards those of ``towards``. ``fade`` is the share
    of grey in the colour.
    """
    towards = towards or scene
    ys, xs = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    x, y = (
        axis[None] - place[:, None, None]
        for axis, place in zip((xs, ys), centres(scene, frames), strict=True)
    )
    radius = scene.size / 2
    outline = (1 - shape) * distance(scene.shape, x, y, radius) + shape * distance(
        towards.shape, x, y, radius
    )
    cover = np.clip(0.5 - outline, 0, 1)[..., None]
    paint = (1 - colour) * np.array(COLOURS[scene.colour]) + colour * np.array(COLOURS[towards.colour])
    paint = (1 - fade) * paint + fade * paint.mean()
    video = _background(scene.background) * (1 - cover) + paint * cover
    return np.round(video).astype(np.uint8)


def caption(scene: Scene, wording: int) -> str:
    """One of the scene's captions, lower case; ``wording`` picks the template and the synonyms."""
    rng = np.random.default_rng(wording)
    words = {
        "shape": rng.choice(SHAPE_WORDS[scene.shape]),
        "direction": rng.choice(DIRECTION_WORDS[scene.direction]),
        "background": rng.choice(BACKGROUND_WORDS[scene.background]),
        "colour": scene.colour,
    }
    return str(rng.choice(TEMPLATES)).format(**words)


def parse_caption(text: str) -> dict[str, str]:
    """Attributes a caption names: ``{"shape", "colour", "background", "direction"}``, each present if named."""
    padded = " " + text.lower().replace(",", " ").replace(":", " ") + " "
    tables = {
        "shape": SHAPE_WORDS,
        "colour": {name: (name,) for name in COLOURS},
        "background": BACKGROUND_WORDS,
        "direction": {
            **DIRECTION_WORDS,
            "up": ("up", "upward", "top"),
            "down": ("down", "downward", "bottom"),
        },
    }
    found = {}
    for attribute, table in tables.items():
        for name, words in table.items():
            if any(f" {word} " in padded for word in words):
                found[attribute] = name
    return found


def wrong_attribute(scene: Scene, rng: np.random.Generator, attribute: str) -> Scene:
    """The scene with ``attribute`` (``colour`` or ``shape``) replaced by another value."""
    names = list(COLOURS) if attribute == "colour" else list(SHAPES)
    return replace(
        scene, **{attribute: str(rng.choice([n for n in names if n != getattr(scene, attribute)]))}
    )


def noisy_caption(scene: Scene, rng: np.random.Generator, noise: float) -> str:
    """A caption like those found on the web: with probability ``noise``, its colour or shape is wrong."""
    wording = int(rng.integers(1 << 31))
    if rng.random() < noise:
        scene = wrong_attribute(scene, rng, str(rng.choice(["colour", "shape"])))
    return caption(scene, wording)
