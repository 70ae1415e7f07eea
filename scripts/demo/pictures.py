"""Pictures that the quickstart writes: a side-by-side video, a contact sheet and the reward curve."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from Core.data.video import save_video
from Core.utils.tables import read_table
from scripts.demo import world

ZOOM = 3
CAPTION_HEIGHT = 34
GAP = 6
INK, PAPER, MUTED = (28, 32, 40), (255, 255, 255), (120, 128, 140)


def enlarge(frames: np.ndarray) -> np.ndarray:
    """``uint8 [T, H, W, 3]`` enlarged by repeating pixels."""
    return frames.repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)


def label(text: str, width: int, colour: tuple[int, int, int] = INK) -> np.ndarray:
    """One or two centred lines of text, ``uint8 [CAPTION_HEIGHT, width, 3]``."""
    image = Image.new("RGB", (width, CAPTION_HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if draw.textlength(longer, font) > width - 4:
            lines, line = [*lines, line], word
        else:
            line = longer
    for row, content in enumerate([*lines, line][:2]):
        draw.text((width / 2, 2 + 15 * row), content, fill=colour, font=font, anchor="ma")
    return np.asarray(image)


def cell(caption: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Frames ``[T, H', W', 3]``: the caption above the two labelled videos."""
    gap = np.full((len(before), world.SIDE * ZOOM, GAP, 3), 255, np.uint8)
    pair = np.concatenate([enlarge(before), gap, enlarge(after)], axis=2)
    side = world.SIDE * ZOOM
    names = np.concatenate(
        [
            label("before", side, MUTED),
            np.full((CAPTION_HEIGHT, GAP, 3), 255, np.uint8),
            label("after", side, MUTED),
        ],
        1,
    )[:20]
    top = np.concatenate([label(caption, pair.shape[2]), names])
    return np.concatenate([np.repeat(top[None], len(pair), 0), pair], axis=1)


def grid(cells: list[np.ndarray], columns: int) -> np.ndarray:
    """Tile videos ``[T, h, w, 3]`` of one size into one video."""
    padded = [np.pad(c, ((0, 0), (GAP, GAP), (2 * GAP, 2 * GAP), (0, 0)), constant_values=255) for c in cells]
    rows = [np.concatenate(padded[i : i + columns], axis=2) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, axis=1)


def side_by_side(
    path: Path, captions: list[str], before: np.ndarray, after: np.ndarray, columns: int = 3
) -> Path:
    """An mp4 of the pairs, played twice at half speed."""
    count = len(captions) - len(captions) % columns
    video = grid([cell(*one) for one in zip(captions[:count], before, after, strict=False)], columns)
    pixels = torch.from_numpy(np.concatenate([video, video])).permute(3, 0, 1, 2) / 127.5 - 1
    return save_video(pixels, path.with_suffix(""), fps=world.FPS / 2)


def contact_sheet(path: Path, captions: list[str], before: np.ndarray, after: np.ndarray) -> Path:
    """A PNG with the first, middle and last frames of each pair, in two columns."""
    blocks = []
    for caption, one, two in zip(captions, before, after, strict=True):
        picks = [0, world.FRAMES // 2, world.FRAMES - 1]
        strips = [np.concatenate(list(enlarge(clip[picks])), axis=1) for clip in (one, two)]
        gap = np.full((strips[0].shape[0], 2 * GAP, 3), 255, np.uint8)
        pictures = np.concatenate([strips[0], gap, strips[1]], axis=1)
        blocks.append(np.concatenate([label(caption, pictures.shape[1]), pictures]))
    half = blocks[0].shape[1] // 2
    names = np.concatenate([label(text, half, MUTED) for text in ("before", "after")], axis=1)[:22]
    names = np.pad(names, ((0, 0), (0, blocks[0].shape[1] - names.shape[1]), (0, 0)), constant_values=255)
    columns = [np.concatenate([names, *blocks[i : len(blocks) // 2 * 2 : 2]]) for i in range(2)]
    gutter = np.full((len(columns[0]), 6 * GAP, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([columns[0], gutter, columns[1]], axis=1)).save(path, optimize=True)
    return path


def reward_curve(path: Path, run: Path) -> Path:
    """A PNG of the training reward (per step and smoothed) and the held-out reward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, held_out = read_table(run / "metrics.csv"), read_table(run / "validation.csv")
    steps, rewards = [row["step"] for row in train], np.array([row["reward"] for row in train])
    width = max(1, len(rewards) // 10)
    smooth = np.convolve(rewards, np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), dpi=130, layout="constrained")
    axes.plot(steps, rewards, color="#9db7d5", lw=1, label="training batch")
    axes.plot(steps[width - 1 :], smooth, color="#1f5fa8", lw=2, label=f"mean of {width} steps")
    axes.plot(
        [row["step"] for row in held_out],
        [row["reward"] for row in held_out],
        "o-", color="#d1603d", lw=2, label="held-out prompts",
    )  # fmt: skip
    axes.set(xlabel="optimiser step", ylabel="reward", title="Reward while training")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
    return path
