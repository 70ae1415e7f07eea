"""Compare estimated seconds with those that authors report: `python scripts/check_reported_speed.py [--json FILE]`.

For one video on one card, as a model's authors describe it. Nothing is measured here: it is the only comparison with
real cards that needs none.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.config import load_config  # noqa: E402
from Core.estimate.cards import CARDS  # noqa: E402
from Core.estimate.fake_run import fake_run  # noqa: E402
from Core.utils.files import write_whole  # noqa: E402

# What the estimate would do beside making the video: a step of one backward pass.
FLAGS = ("--gradient-accumulation-steps", "1", "--val-batch-size", "1")


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What a model's authors say.

    seconds: of one video, or a ``bound`` of them. words: as the source has them. config: what makes the video here.
    """

    model: str
    card: str
    seconds: float
    words: str
    bound: bool = False
    source: str
    config: str
    steps: int = 50


def of_cogvideox(size: str, card: str, seconds: float) -> Reported:
    return Reported(
        model=f"CogVideoX {size}, 480p, 6 s",
        card=card,
        seconds=seconds,
        words=f"about {seconds:.0f} seconds",
        source=f"https://huggingface.co/THUDM/CogVideoX-{size.lower()}",
        config=f"cogvideox/{size.lower()}",
    )


REPORTED = (
    Reported(
        model="Wan 2.1 1.3B, 480p, 81 frames",
        card="rtx4090",
        seconds=240,
        words="about 4 minutes",
        source="https://github.com/Wan-Video/Wan2.1",
        config="wan/t2v_1_3b",
    ),
    Reported(
        model="Wan 2.2 TI2V-5B, 704p, 121 frames",
        card="rtx4090",
        seconds=540,
        words="under 9 minutes",
        bound=True,
        source="https://github.com/Wan-Video/Wan2.2",
        config="wan/ti2v_5b",
    ),
    of_cogvideox("2B", "a100", 90),
    of_cogvideox("2B", "h100", 45),
    of_cogvideox("5B", "a100", 180),
    of_cogvideox("5B", "h100", 90),
)


def compare() -> list[dict[str, Any]]:
    """What is reported, with ``estimated`` seconds of sampling, decoding and scoring it."""
    works, found = {}, []
    for one in REPORTED:
        if one.config not in works:
            flags = (*FLAGS, "--num-sampling-steps", str(one.steps))
            run = fake_run(load_config([str(ROOT / "configs" / f"{one.config}.py"), *flags]))
            works[one.config] = run.phases["validation"].work
        found.append({**asdict(one), "estimated": CARDS[one.card].seconds(works[one.config])})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures into it")
    args = parser.parse_args()
    found = compare()
    for one in found:
        print(
            f"{one['model']:34} {one['card']:8} estimated {one['estimated']:4.0f} s, reported {one['words']} "
            f"({one['estimated'] / one['seconds'] - 1:+.0%})"
        )
    if args.json:
        write_whole(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
