"""Scores of finished video files, whatever made them.

Axes: B videos, T frames, H, W pixels.
"""

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from Core.data.prompts import Prompt, parse_prompts
from Core.evaluation.metrics import diversity, motion, score_videos
from Core.generation.generate import read_manifest
from Core.rewards import Reward, build_reward, check_reward_config
from Core.utils.options import ConfigError
from opensora.datasets import is_img, is_vid

logger = logging.getLogger("vader")
# Measured for every video, needing no weights.
SHARPNESS, MOTION, DIVERSITY = "sharpness", "motion", "diversity"
DIGITS = 7


@dataclass(frozen=True)
class Clip:
    """A video or picture file and the prompt it was made for."""

    path: Path
    prompt: Prompt


class Scorers:
    """Rewards by name, and the measures that need none.

    Args:
        names: registered rewards, or ``path/to/file.py:Class``.
        args: arguments of each reward by name.
    """

    def __init__(
        self, names: Sequence[str], args: Mapping[str, Mapping[str, Any]], device: torch.device | str = "cpu"
    ):
        self.rewards: dict[str, Reward] = {}
        for name in [*names, SHARPNESS]:
            if name not in (*self.rewards, MOTION, DIVERSITY):
                self.rewards[name] = build_reward(name, args.get(name, {}), device=device)

    @property
    def lower_is_better(self) -> set[str]:
        return {name for name, reward in self.rewards.items() if not reward.higher_is_better}

    def __call__(self, clips: Sequence[Clip]) -> list[dict[str, float]]:
        """Scores of the videos of one prompt, with the diversity of the group where several of one size make one.

        Raises:
            ValueError: a file cannot be read, or a reward cannot use it.
        """
        videos = [read_clip(clip.path) for clip in clips]
        of_group = {}
        if len(videos) > 1 and len({video.shape for video in videos}) == 1:
            of_group[DIVERSITY] = diversity(torch.stack(videos))
        rows = []
        for clip, video in zip(clips, videos, strict=True):
            row = {
                name: score_videos(reward, video[None], [clip.prompt]).score.item()
                for name, reward in self.rewards.items()
            }
            row |= {MOTION: motion(video[None]).item()} | of_group
            rows.append({name: float(f"{value:.{DIGITS}g}") for name, value in row.items()})
        return rows


def check_scorers(names: Sequence[str], args: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with rewards and their arguments, without loading any."""
    errors = [error for name in names for error in check_reward_config(name, args.get(name, {}))]
    stray = [name for name in args if name not in names]
    return errors + [
        f"reward arguments are given for {name!r}, which is not among the rewards" for name in stray
    ]


def read_clip(path: Path) -> Tensor:
    """A video or picture file as [3, T, H, W] in [-1, 1], at its own size.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        if is_img(path):
            with Image.open(path) as image:
                frames = [np.asarray(image.convert("RGB"))]
        else:
            with av.open(str(path)) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}); remove it or make it again") from error
    if not frames:
        raise ValueError(f"{path} holds no frames; remove it or make it again")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float().div(127.5).sub(1)


def find_clips(folder: Path, prompts: Path | None = None) -> list[Clip]:
    """The videos and pictures of a folder with their prompts.

    Prompts come from ``prompts``: a .txt with one line per file in the order of their names, or a .jsonl or
    .csv with ``file`` and ``prompt``. Without it from the folder's ``prompts.jsonl``, or else from the file
    names, whose numbers and underscores are dropped.

    Raises:
        FileNotFoundError, ValueError: no such folder or file, no videos, or not one prompt for each.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}; give one with videos")
    files = sorted(p for p in folder.iterdir() if (is_vid(p) or is_img(p)) and not p.name.startswith("."))
    if not files:
        raise ValueError(f"{str(folder)!r} holds no videos; give a folder with .mp4 files")
    files = prefer_videos(files)
    named = _listed_prompts(prompts, files) if prompts else _own_prompts(folder, files)
    lacking = [file.name for file in files if file.name not in named]
    if lacking:
        raise ValueError(f"{len(lacking)} files have no prompt, such as {lacking[0]!r}; add them to the list")
    return [Clip(file, parse_prompts([named[file.name]])[0]) for file in files]


def prefer_videos(files: Sequence[Path]) -> list[Path]:
    """Files without the GIFs that stand beside a video of the same name."""
    stems = {file.stem for file in files if file.suffix.lower() == ".mp4"}
    return [file for file in files if file.suffix.lower() != ".gif" or file.stem not in stems]


def _own_prompts(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    entries = {entry["file"]: entry["prompt"] for entry in read_manifest(folder)}
    if entries:
        return entries
    logger.warning(
        "%s has no prompts.jsonl: prompts are taken from the file names; --prompts gives them", folder
    )
    return {file.name: prompt_from_name(file.stem) for file in files}


def prompt_from_name(stem: str) -> str:
    """Words of a file name, without the numbers before and after them."""
    words = stem.replace("_", " ").replace("-", " ").split()
    while len(words) > 1 and words[0].isdigit():
        words = words[1:]
    while len(words) > 1 and words[-1].isdigit():
        words = words[:-1]
    return " ".join(words)


def _listed_prompts(path: Path, files: Sequence[Path]) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"prompt list {str(path)!r} does not exist; give a .txt, .jsonl or .csv file")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".txt":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) != len(files):
            raise ValueError(
                f"{str(path)!r} has {len(lines)} prompts for {len(files)} files; give one line each"
            )
        return {file.name: line for file, line in zip(files, lines, strict=True)}
    try:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return {Path(row["file"]).name: row["prompt"] for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); each row needs file and prompt"
        ) from error


def by_prompt(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Clips in groups of the same prompt, in order."""
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.prompt.merged, []).append(clip)
    yield from groups.values()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table, with an empty cell where a row lacks a key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse(errors: Sequence[str]) -> None:
    """Raise all sentences together, if there are any."""
    if errors:
        raise ConfigError(list(errors))
