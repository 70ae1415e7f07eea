"""Diffusion-DPO on a file of preferred pairs: no video is sampled and no reward is asked.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, H, W pixels.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, Prompt, VideoSpec
from Core.data.video import read_video, stated_size
from Core.rewards import Reward, RewardOutput
from Core.training.rollout import Rollout
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .base import Objective
from .dpo import PreferenceLoss, PreferenceSettings, shares_right

KEYS = ("prompt", "better", "worse")


@dataclass(frozen=True, kw_only=True)
class DPOPairsSettings(PreferenceSettings):
    """Keys of DPO on a file of pairs."""

    pairs: str | None = option(
        None,
        'file with one pair per line, {"prompt": …, "better": file, "worse": file}; files relative to it, of the '
        "size and length of the run's videos",
        path=True,
    )


@dataclass(frozen=True)
class Pair:
    """Two videos of a prompt."""

    prompt: str
    better: Path
    worse: Path


@functools.cache
def read_pairs(path: str) -> tuple[Pair, ...]:
    """The pairs of a file of JSON lines.

    Raises:
        ValueError: it cannot be read, is empty, or names files that are not there.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"pairs: {path!r} cannot be read: {error}") from error
    pairs = tuple(
        _pair(line, f"pairs: line {number} of {path!r}", file.parent)
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not pairs:
        raise ValueError(f"pairs: {path!r} is empty; give one pair per line")
    return pairs


def _pair(line: str, place: str, folder: Path) -> Pair:
    try:
        entry = json.loads(line)
        prompt, better, worse = (str(entry[key]) for key in KEYS)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{place} must be a JSON object with the keys {', '.join(KEYS)}") from error
    for name in (better, worse):
        if not (folder / name).is_file():
            raise ValueError(f"{place} names {name!r}, which is not in {str(folder)!r}")
    return Pair(prompt, folder / better, folder / worse)


class DPOPairs(Objective):
    """Each video number draws one of its prompt's pairs; the score is the share of pairs that are ranked right."""

    needs_reward_gradient = False
    settings_class = DPOPairsSettings
    settings: DPOPairsSettings

    def __init__(self, settings: DPOPairsSettings, backbone: Backbone, reward: Reward, seed: int):
        super().__init__(settings, backbone, reward, seed)
        self.rollout = Rollout(settings, backbone, seed)
        self.loss_of_pairs = PreferenceLoss(self.rollout, settings.dpo_beta)
        self.pairs: dict[str, list[Pair]] = {}
        for pair in read_pairs(str(settings.pairs)):
            for file in (pair.better, pair.worse):
                self.refuse_other_size(file, stated_size(file))
            self.pairs.setdefault(pair.prompt, []).append(pair)
        self.encoded: dict[Path, Tensor] = {}  # on the CPU

    @classmethod
    def count_scored_frames(cls, settings: Any, latent_frames: int, video: VideoSpec) -> int:
        return video.num_frames  # the reward judges the videos of validation alone

    @classmethod
    def config_errors(cls, settings: Any, sampling_steps: int | None, latent_frames: int | None) -> list[str]:
        if settings.pairs is None:
            return ["pairs is missing; objective='dpo_pairs' learns from a file of preferred pairs"]
        try:
            read_pairs(settings.pairs)
        except ValueError as error:
            return [str(error)]
        return []

    @classmethod
    def contents(cls, settings: Any) -> dict[str, str]:
        lines = [f"{p.prompt}\0{p.better.name}\0{p.worse.name}" for p in read_pairs(settings.pairs)]
        return {"pairs (sha256)": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]}

    @classmethod
    def prompt_errors(cls, settings: Any, prompts: Sequence[Prompt]) -> list[str]:
        known = {pair.prompt for pair in read_pairs(settings.pairs)}
        lacking = [prompt.written for prompt in prompts if prompt.written not in known]
        if not lacking:
            return []
        return [
            f"pairs: {settings.pairs!r} has no pair for {len(lacking)} of the {len(prompts)} training prompts, such as "
            f"{lacking[0]!r}; add pairs or remove the prompts"
        ]

    def losses(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> Iterator[RewardOutput]:
        pairs = [self.draw(*named) for named in zip(prompts, samples, strict=True)]
        better = torch.stack([self.latent(pair.better) for pair in pairs]).to(self.backbone.device)
        worse = torch.stack([self.latent(pair.worse) for pair in pairs]).to(self.backbone.device)
        timer.lap("encode")
        count = self.settings.levels_per_video
        for number in range(count):
            loss, margin = self.loss_of_pairs(better, worse, prompts, samples, number)
            right = shares_right(margin)
            yield RewardOutput(right, loss / count, {"pairs_right": right})
            timer.lap("gradient_steps")

    def draw(self, encoded: EncodedPrompt, sample: int) -> Pair:
        """One of the prompt's pairs."""
        own = self.pairs[encoded.prompt.written]
        (generator,) = self.rollout.generators("pair", [sample])
        return own[int(torch.randint(len(own), (), generator=generator))]

    @torch.no_grad()
    def latent(self, file: Path) -> Tensor:
        """[C, T, h, w] of a video file, encoded once.

        Raises:
            ValueError: it is of another size than the run's videos.
        """
        if file not in self.encoded:
            pixels = read_video(file)
            self.refuse_other_size(file, tuple(pixels.shape[1:]))
            self.encoded[file] = self.backbone.encode(pixels[None])[0].cpu()
        return self.encoded[file]

    def refuse_other_size(self, file: Path, size: tuple[int, int, int]) -> None:
        """Raise ValueError where (frames, height, width) are not the run's; 0 frames are not compared."""
        video = self.backbone.video
        wanted = (video.num_frames, video.height, video.width)
        if (size[0] or wanted[0], *size[1:]) != wanted:
            raise ValueError(
                f"pairs: {str(file)!r} has {_size(*size)}, but the run's videos have {_size(*wanted)}; convert it, or "
                "change num_frames and the size"
            )


def _size(frames: int, height: int, width: int) -> str:
    return f"{frames} frame{'s' * (frames != 1)} of {width}×{height}"
