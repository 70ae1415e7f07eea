"""``vader score``: a folder of existing videos, from this or any other tool."""

import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from Core.commands.startup import Parser, importing
from Core.utils.errors import IncompleteError
from Core.utils.exit_codes import exit_code
from Core.utils.terminal import ConsoleHandler, progress_bar
from Core.utils.words import counted

HELP = """Scores a folder of videos, from this or any other tool: writes scores.csv (one row per video) and scores.json
(means). Prompts come from --prompts (.txt with one line per file, sorted by name; .jsonl or .csv with file and
prompt), the folder's prompts.jsonl, or the file names.

  vader score runs/videos --rewards hps,aesthetic"""
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
    import torch

    from Core.evaluation.metrics import means
    from Core.evaluation.score_videos import (
        Scorers,
        by_prompt,
        check_scorers,
        find_clips,
        refuse,
        write_csv,
        write_json,
    )

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
        raise IncompleteError(
            f"{failed} of {counted(len(clips), 'video')} could not be scored; the reasons are above"
        )
    return found


def main(argv: Sequence[str]) -> int:
    parser = Parser("score", HELP, "FOLDER [flags]")
    parser.add_argument("folder", type=Path, help="folder of videos")
    parser.add_argument(
        "--rewards", default="", help="comma-separated names (default: only motion, sharpness and diversity)"
    )
    parser.add_argument("--reward-arguments", default="{}", help="JSON: {reward: {argument: value}}")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="the prompt of each video")
    parser.add_argument("--out", type=Path, help="folder for the tables (default: FOLDER)")
    flags = parser.parse_args(argv)
    handler = ConsoleHandler(logging.INFO)
    logger.addHandler(handler)
    try:
        return exit_code(lambda: show(flags))
    finally:
        logger.removeHandler(handler)


def show(flags: Namespace) -> None:
    """Score, and print the means."""
    with importing():
        from Core.evaluation.score_videos import parse_reward_arguments

    rewards = [name for name in flags.rewards.split(",") if name]
    out = flags.out or flags.folder
    arguments = parse_reward_arguments(flags.reward_arguments)
    for name, mean in score_folder(flags.folder, rewards, arguments, flags.prompts, out).items():
        print(f"{name:<20} {mean:.5g}")
    print(f"written to {out / 'scores.csv'}")
