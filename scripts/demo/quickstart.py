"""Train the demo with reward gradients, then show the same held-out prompts before and after.

``vader quickstart [--prompts 256] [flags]``; every key of its config is a flag.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.config import ConfigError, load_config  # noqa: E402
from Core.evaluation.gallery import write_gallery  # noqa: E402
from Core.evaluation.report import write_report  # noqa: E402
from scripts.demo.compare import Comparison, compare, save_evaluation, train  # noqa: E402
from scripts.demo.pictures import contact_sheet, reward_curve, side_by_side  # noqa: E402

CONFIG = ROOT / "Open-Sora/configs/opensora-v1-2/vader/vader_quickstart.py"
SHOWN = 12


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--prompts", type=int, default=256, help="held-out prompts to compare on (default 256)"
    )
    own, flags = parser.parse_known_args(argv)
    if own.prompts < SHOWN:
        parser.error(f"--prompts is {own.prompts}; give at least {SHOWN}, which the pictures show")
    try:
        config = load_config([str(CONFIG), "--resume", "never", *flags])
    except ConfigError as error:
        print("\n".join(f"error: {sentence}" for sentence in error.errors), file=sys.stderr)
        return 2
    started = time.perf_counter()
    folder = train(config)
    trained = time.perf_counter()
    result = compare(config, str(folder / "adapter"), own.prompts)
    seconds = {"training": trained - started, "generating and scoring": time.perf_counter() - trained}
    print(table(result, seconds))
    save_numbers(result, seconds, folder / "before_after.json")
    save_evaluation(result, config, str(folder / "adapter"), folder / "evaluation")
    show_paths(result, folder)
    return 0


def peak_memory() -> float:
    """Peak resident memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def table(result: Comparison, seconds: dict[str, float]) -> str:
    """Before, after and the paired change with its 95% interval."""
    rows = [("", "before", "after", "change (95% interval, paired)")]
    for name, title, scale, digits in (
        ("reward", "reward", 1, 1),
        ("colour_and_shape", "colour and shape right, %", 100, 1),
        ("direction", "motion right, %", 100, 1),
    ):
        gain = result.gain(name)
        means = [f"{scale * value:.{digits}f}" for value in (gain.before, gain.after)]
        span = [f"{scale * value:+.{digits}f}" for value in (gain.gain, gain.low, gain.high)]
        rows.append((title, *means, f"{span[0]}  ({span[1]} to {span[2]})"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return "\n".join(
        [
            f"\n{len(result.captions)} held-out prompts, the same noise before and after:",
            *map("  ".join, aligned),
            result.distance,
            f"{spent}; peak memory {peak_memory():.1f} GB",
        ]
    )


def save_numbers(result: Comparison, seconds: dict[str, float], path: Path) -> None:
    gains = {name: vars(result.gain(name)) for name in ("reward", "colour_and_shape", "direction", "motion")}
    numbers = {
        "prompts": len(result.captions),
        **gains,
        "true_reward": result.true_reward,
        "share_of_distance": result.share_of_distance,
        "seconds": seconds,
        "peak_memory_gb": peak_memory(),
    }
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def show_paths(result: Comparison, folder: Path) -> None:
    """Write the pictures and the pages, print their paths, and say what to do next."""
    shown = result.captions[:SHOWN], result.videos_before[:SHOWN], result.videos_after[:SHOWN]
    pictures = [
        side_by_side(folder / "before_after.mp4", *shown),
        contact_sheet(folder / "contact_sheet.png", *shown),
        reward_curve(folder / "reward_curve.png", folder),
    ]
    # The report comes last, since it shows what all the others say, and is the first to look at.
    gallery = write_gallery(folder / "evaluation")
    files = [write_report(folder), gallery, *pictures]
    print("\nlook at:", *(f"  {file}" for file in files), sep="\n")
    print(
        "\nnext, on a GPU with the real model (weights are fetched on first use):\n  vader train vader_train"
    )


if __name__ == "__main__":
    sys.exit(main())
