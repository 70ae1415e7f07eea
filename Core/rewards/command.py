"""A scorer that is a program of its own: it gets a folder of videos, and writes a number for each.

Axes: B videos, F frames of each, H rows, W columns.
"""

import csv
import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from Core.data.video import save_video
from Core.rewards.base import RewardInfo, VideoReward
from Core.utils.words import counted

PROMPTS, SCORES_JSON, SCORES_CSV = "prompts.json", "scores.json", "scores.csv"


class Command(VideoReward):
    """Scores that a program computes, outside Python if you like.

    The program is started with a folder as its last argument. The folder holds finished videos and
    ``prompts.json``, {file: prompt}. The program writes ``scores.json``, {file: number}, or ``scores.csv`` with the
    columns ``file`` and ``score``, and exits with 0.

    Args:
        command: the program and its first arguments, written as for a shell; no shell is started.
        timeout: seconds it may take for one batch of videos.
        fps: frames per second of the files.
    """

    info = RewardInfo(
        name="command",
        summary="a program of yours that scores a folder of videos",
        range="that of the program",
    )
    differentiable = False

    def __init__(self, *, command: str, timeout: float = 600.0, fps: float = 24.0):
        super().__init__()
        self.command, self.timeout, self.fps = shlex.split(command), timeout, fps

    @classmethod
    def config_errors(cls, args: Mapping[str, Any]) -> list[str]:
        if errors := super().config_errors(args):
            return errors
        label = "reward_args of 'command'"
        errors = [
            f"{label}: {key} must be above 0, got {args[key]}"
            for key in ("timeout", "fps")
            if args.get(key, 1) <= 0
        ]
        try:
            program = shlex.split(args["command"])[:1]
        except ValueError as error:
            return [*errors, f"{label}: command {args['command']!r} cannot be read: {error}"]
        if not program or shutil.which(program[0]) is None:
            name = program[0] if program else ""
            errors.append(
                f"{label}: there is no program {name!r}; give a path to one, or a name that PATH finds"
            )
        return errors

    def sample_frames(self, count: int, fps: float | None) -> Tensor:
        """All of them."""
        return torch.arange(count)

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        with tempfile.TemporaryDirectory(prefix="vader_scores_") as name:
            folder = Path(name)
            pixels = (clips.detach() * 2 - 1).transpose(1, 2)
            files = [
                save_video(video, folder / f"{number:04d}", self.fps).name
                for number, video in enumerate(pixels)
            ]
            texts = dict(zip(files, prompts, strict=True))
            (folder / PROMPTS).write_text(json.dumps(texts, indent=1), encoding="utf-8")
            self.run(folder)
            scores = read_scores(folder)
        missing = [file for file in files if file not in scores]
        if missing:
            raise ValueError(
                f"{self.label} gave no score for {missing[0]} ({len(missing)} of {counted(len(files), 'video')})"
            )
        return torch.tensor([scores[file] for file in files], device=clips.device)

    @property
    def label(self) -> str:
        return f"the reward command {shlex.join(self.command)!r}"

    def run(self, folder: Path) -> None:
        """Start the program and wait for it.

        Raises:
            ValueError: it cannot be started, fails, or takes too long.
        """
        try:
            done = subprocess.run(
                [*self.command, str(folder)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                start_new_session=True,  # Ctrl-C stops the run after its step, which needs the scores
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{self.label} took more than {self.timeout:g} seconds; raise timeout, or score fewer videos at once "
                "(slice_size)"
            ) from None
        except OSError as error:
            raise ValueError(f"{self.label} cannot be started: {error}") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"]
            raise ValueError(f"{self.label} failed with exit status {done.returncode}: {said[-1]}")


def read_scores(folder: Path) -> dict[str, float]:
    """Scores by file, from scores.json or scores.csv.

    Raises:
        ValueError: neither is there, or what is there has another form.
    """
    try:
        if (folder / SCORES_JSON).is_file():
            content = json.loads((folder / SCORES_JSON).read_text(encoding="utf-8"))
            return {str(file): float(score) for file, score in content.items()}
        if (folder / SCORES_CSV).is_file():
            with open(folder / SCORES_CSV, encoding="utf-8", newline="") as stream:
                return {row["file"]: float(row["score"]) for row in csv.DictReader(stream)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the scores of the reward command cannot be read ({type(error).__name__}: {error}); write {SCORES_JSON} "
            f"as {{file: number}}, or {SCORES_CSV} with the columns file and score"
        ) from error
    raise ValueError(
        f"the reward command wrote neither {SCORES_JSON} nor {SCORES_CSV} into the folder it was given"
    )
