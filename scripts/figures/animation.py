"""Draw assets/before_after.webp: held-out prompts of a quickstart run, base model and adapter side by side, playing.

``python scripts/figures/animation.py [runs/quickstart]``: the first prompts of the run's gallery, not chosen by any
score.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.data.video import read_video  # noqa: E402
from Core.evaluation.gallery import Card, read_evaluation  # noqa: E402
from Core.utils.files import write_whole  # noqa: E402
from scripts.demo.common import to_uint8  # noqa: E402
from scripts.demo.pictures import cell, grid  # noqa: E402

TARGET = ROOT / "assets" / "before_after.webp"
PROMPTS, COLUMNS = 6, 3
FRAME_MS, LAST_MS = 83, 700  # half speed; the last frame stays, so that the end is seen
QUALITY = 80
LIMIT = 1_500_000  # bytes that a README may ask of its readers


def frames(card: Card) -> list[np.ndarray]:
    """The first two videos of a card, ``uint8 [T, H, W, 3]``."""
    return [to_uint8(read_video(film.file).transpose(0, 1)) for film in card.films[:2]]


def animation(run: Path) -> bytes:
    """A looping WebP.

    Raises:
        FileNotFoundError: the run has no evaluation.
    """
    cards = sorted(read_evaluation(run / "evaluation").cards, key=lambda card: card.place)[:PROMPTS]
    video = grid([cell(card.prompt, *frames(card)) for card in cards], COLUMNS)
    first, *rest = [Image.fromarray(frame) for frame in video]
    durations = [FRAME_MS] * len(rest) + [LAST_MS]
    out = io.BytesIO()
    first.save(
        out, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=QUALITY, method=6
    )
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "quickstart")
    content = animation(parser.parse_args().run)
    if len(content) > LIMIT:
        raise SystemExit(
            f"the animation has {len(content):,} bytes, more than {LIMIT:,}; lower QUALITY or PROMPTS"
        )
    write_whole(TARGET, content)
    print(f"{TARGET}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
