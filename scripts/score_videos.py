"""Score a folder of existing videos, from this or any other tool.

    scripts/score_videos.py FOLDER --rewards hps,aesthetic [--prompts FILE] [--out FOLDER]

Writes scores.csv (one row per video) and scores.json (means). Prompts come from --prompts (.txt with one line per
file, sorted by name; .jsonl or .csv with file and prompt), the folder's prompts.jsonl, or the file names.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Import this checkout's packages from any working directory, installed or not.
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

import torch  # noqa: E402

from Core.cli import exit_code  # noqa: E402
from Core.evaluation.metrics import means  # noqa: E402
from Core.evaluation.score_videos import (  # noqa: E402
    Scorers,
    by_prompt,
    check_scorers,
    find_clips,
    parse_reward_arguments,
    refuse,
    write_csv,
    write_json,
)
from Core.utils.errors import IncompleteError  # noqa: E402
from Core.utils.terminal import progress_bar  # noqa: E402

logger = logging.getLogger("vader")


def score_folder(
    folder: Path,
    rewards: Sequence[str],
    arguments: Mapping[str, Mapping[str, Any]],
    prompts: Path | None,
    out: Path,
) -> dict[str, float]:
    """Score every video of ``folder``; returns the means.

    Raises:
        IncompleteError: some videos could not be scored; the others are in the table.
    """
    clips = find_clips(folder, prompts)
    refuse(check_scorers(rewards, arguments))
    scorers = Scorers(rewards, arguments, "cuda" if torch.cuda.is_available() else "cpu")
    rows, failed = [], 0
    with progress_bar() as bar:
        for group in bar.track(list(by_prompt(clips)), description="scoring"):
            try:
                scores = scorers(group)
            except ValueError as error:
                failed += len(group)
                logger.error("no score for %s: %s", [clip.path.name for clip in group], error)
                continue
            for clip, values in zip(group, scores, strict=True):
                rows.append(({"file": clip.path.name, "prompt": clip.prompt.reward_text}, values))
    found = means([scores for _, scores in rows])
    if rows:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "scores.csv", [named | scores for named, scores in rows])
        write_json(out / "scores.json", {"videos": len(rows), "failed": failed, "means": found})
    if failed:
        raise IncompleteError(f"{failed} of {len(clips)} videos could not be scored; the reasons are above")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--rewards", default="", help="comma-separated names (default: only motion, sharpness and diversity)"
    )
    parser.add_argument("--reward-arguments", default="{}", help="JSON: {reward: {argument: value}}")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the tables (default: FOLDER)")
    flags = parser.parse_args()
    logger.addHandler(logging.StreamHandler())
    arguments = parse_reward_arguments(flags.reward_arguments)
    rewards = [name for name in flags.rewards.split(",") if name]
    out = flags.out or flags.folder
    for name, mean in score_folder(flags.folder, rewards, arguments, flags.prompts, out).items():
        print(f"{name:<20} {mean:.5g}")
    print(f"written to {out / 'scores.csv'}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
