"""Scores of finished video files, whatever made them.

Axes: B videos, T frames, H, W pixels.
"""

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from Core.backbones import BACKBONES, Prompt
from Core.data.video import frame_rate, is_image, is_video, read_video
from Core.evaluation.metrics import diversity, motion, score_videos
from Core.generation.manifest import read_manifest
from Core.rewards import Reward, build_reward, check_reward_config
from Core.utils.errors import ConfigError
from Core.utils.files import write_whole
from Core.utils.tables import inert, read_text_table
from Core.utils.words import counted

logger = logging.getLogger("vader")
# Measured for every video, needing no weights; a reward of that name takes the measure's place.
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
            if name not in (*self.rewards, DIVERSITY):
                self.rewards[name] = build_reward(name, args.get(name, {}), device=device)

    @property
    def lower_is_better(self) -> set[str]:
        return {name for name, reward in self.rewards.items() if not reward.higher_is_better}

    def __call__(self, clips: Sequence[Clip]) -> list[dict[str, float]]:
        """Scores of the videos of one prompt, with the diversity of the group where several of one size make one.

        Raises:
            ValueError: a file cannot be read, or a reward cannot use it.
        """
        videos = [read_video(clip.path) for clip in clips]
        of_group = {}
        if len(videos) > 1 and len({video.shape for video in videos}) == 1:
            of_group[DIVERSITY] = diversity(torch.stack(videos))
        rows = []
        for clip, video in zip(clips, videos, strict=True):
            fps = frame_rate(clip.path)
            row = {
                name: score_videos(reward, video[None], [clip.prompt], fps).score.item()
                for name, reward in self.rewards.items()
            }
            # The rewards asked for come first, as in the tables that are made of this.
            if MOTION not in row:
                row[MOTION] = motion(video[None]).item()
            rows.append({name: float(f"{value:.{DIGITS}g}") for name, value in {**row, **of_group}.items()})
        return rows


def parse_reward_arguments(text: str) -> dict[str, Any]:
    """``--reward-arguments``: JSON of {reward: {argument: value}}.

    Raises:
        ConfigError: it is something else.
    """
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"--reward-arguments is no JSON ({error}): {text!r}"]) from error
    if not isinstance(given, dict) or not all(isinstance(value, dict) for value in given.values()):
        raise ConfigError([f"--reward-arguments must be {{reward: {{argument: value}}}}, got {text!r}"])
    return given


def check_scorers(names: Sequence[str], args: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with rewards and their arguments, without loading any."""
    errors = [error for name in names for error in check_reward_config(name, args.get(name, {}))]
    stray = [name for name in args if name not in names]
    return errors + [
        f"reward arguments are given for {name!r}, which is not among the rewards" for name in stray
    ]


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
    files = sorted(p for p in folder.iterdir() if (is_video(p) or is_image(p)) and not p.name.startswith("."))
    if not files:
        raise ValueError(f"{str(folder)!r} holds no videos; give a folder with .mp4 files")
    files = prefer_videos(files)
    named = _listed_prompts(prompts, files) if prompts else _own_prompts(folder, files)
    lacking = [file.name for file in files if file.name not in named]
    if lacking:
        raise ValueError(f"{len(lacking)} files have no prompt, such as {lacking[0]!r}; add them to the list")
    return [Clip(file, named[file.name]) for file in files]


def prefer_videos(files: Sequence[Path]) -> list[Path]:
    """Files without the GIFs that stand beside a video of the same name."""
    stems = {file.stem for file in files if file.suffix.lower() == ".mp4"}
    return [file for file in files if file.suffix.lower() != ".gif" or file.stem not in stems]


def _own_prompts(folder: Path, files: Sequence[Path]) -> dict[str, Prompt]:
    entries = read_manifest(folder)
    if entries:
        return {entry["file"]: _recorded_prompt(entry) for entry in entries}
    logger.warning(
        "%s has no prompts.jsonl: prompts are taken from the file names; --prompts gives them", folder
    )
    return {file.name: Prompt(prompt_from_name(file.stem)) for file in files}


def _recorded_prompt(entry: Mapping[str, Any]) -> Prompt:
    """The prompt of a manifest's entry, in the grammar of the model family that made the video."""
    # Open-Sora's videos were recorded without their family while there was only one.
    family = entry.get("backbone", "opensora" if "reference_path" in entry else None)
    text = entry["prompt"]
    return BACKBONES.resolve(family).parse_prompts([text])[0] if family in BACKBONES else Prompt(text)


def prompt_from_name(stem: str) -> str:
    """Words of a file name, without the numbers before and after them."""
    words = stem.replace("_", " ").replace("-", " ").split()
    while len(words) > 1 and words[0].isdigit():
        words = words[1:]
    while len(words) > 1 and words[-1].isdigit():
        words = words[:-1]
    return " ".join(words)


def _listed_prompts(path: Path, files: Sequence[Path]) -> dict[str, Prompt]:
    if not path.is_file():
        raise FileNotFoundError(f"prompt list {str(path)!r} does not exist; give a .txt, .jsonl or .csv file")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".txt":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) != len(files):
            raise ValueError(
                f"{str(path)!r} has {counted(len(lines), 'prompt')} for {counted(len(files), 'file')}; "
                "give one line each"
            )
        return {file.name: Prompt(line) for file, line in zip(files, lines, strict=True)}
    try:
        if path.suffix == ".csv":
            rows = read_text_table(path)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return {Path(row["file"]).name: Prompt(row["prompt"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); each row needs file and prompt"
        ) from error


def by_prompt(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Clips in groups of the same prompt, in order."""
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.prompt.written, []).append(clip)
    yield from groups.values()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table, with an empty cell where a row lacks a key; text that would be a formula is made inert."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: inert(cell) for key, cell in row.items()} for row in rows)
    write_whole(path, text.getvalue())


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def refuse(errors: Sequence[str]) -> None:
    """Raise all sentences together, if there are any."""
    if errors:
        raise ConfigError(list(errors))
