"""Validation: videos of fixed prompts and seeds, and what the trained reward and the monitors say of them."""

import itertools
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from Core.backbones import Backbone, EncodedPrompt
from Core.config import Config
from Core.evaluation.metrics import diversity, dynamic_degree, means, motion, score_videos
from Core.generation.generate import Lockstep, Video, write_videos
from Core.generation.manifest import Sample, plan_samples
from Core.rewards import Reward
from Core.utils.distributed import Distributed

logger = logging.getLogger("vader")


@dataclass(frozen=True)
class ValidationResult:
    """Means over all videos, and the videos' (path, prompt)."""

    means: dict[str, float]
    videos: tuple[tuple[Path, str], ...]


class Validation:
    """Generates the same videos at every call, spread over the processes by prompt.

    Args:
        reward: the trained one; ``monitors``: others, scored beside it.
    """

    def __init__(
        self,
        config: Config,
        distributed: Distributed,
        backbone: Backbone,
        reward: Reward,
        monitors: Mapping[str, Reward],
        prompts: Sequence[EncodedPrompt],
    ):
        self.config, self.distributed, self.backbone, self.prompts = config, distributed, backbone, prompts
        self.reward, self.monitors = reward, monitors
        plain = [encoded.prompt for encoded in prompts]
        self.samples = plan_samples(plain, config.validation.num_val_seeds, config.run.seed)

    def run(self, step: int, folder: Path) -> ValidationResult:
        """Write the videos into ``folder``, emptied before, and score them.

        A full or read-only disk costs this validation, with a message; not the run.
        """
        if self.distributed.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        self.distributed.barrier()
        rows, videos = [], []
        try:
            for video_rows, made in self._by_prompt(step, folder):
                rows += video_rows
                videos += made
        except OSError as error:
            logger.error("validation of step %d is incomplete: %s; training goes on", step, error)
        rows, videos = self.distributed.gather_objects(rows), self.distributed.gather_objects(videos)
        return ValidationResult(_means(rows), tuple((Path(path), prompt) for path, prompt in sorted(videos)))

    def _by_prompt(self, step: int, folder: Path):
        """For each of this process's prompts: the values of its videos, and their files."""
        count, rank = self.distributed.num_processes, self.distributed.rank
        shares = [[sample for sample in self.samples if sample.index % count == n] for n in range(count)]
        self._make_folder(folder)
        made = write_videos(
            self.backbone, shares[rank], [self.prompts[sample.index] for sample in shares[rank]], folder,
            {"step": step}, files=self.config.video, batch_size=self.config.validation.val_batch_size,
            progress=self.config.run.verbose >= 2, lockstep=self._lockstep(shares),
        )  # fmt: skip
        for _, group in itertools.groupby(made, key=lambda video: video.sample.index):
            scored = [(video, self._score(video)) for video in group]
            videos = [video for video, _ in scored if video.path]
            rows = [row for video, row in scored if video.path]
            if len(videos) > 1:
                rows.append({"diversity": diversity(torch.stack([video.pixels for video in videos]))})
            yield rows, [(str(video.path), video.sample.prompt.reward_text) for video in videos]

    def _make_folder(self, folder: Path) -> None:
        """Make ``folder``; where the denoiser is split, one process that cannot is an OSError on all."""
        fault: OSError | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fault = error
        if self.backbone.mesh is not None and self.distributed.any(fault is not None):
            fault = fault or OSError(f"another process cannot write to {str(folder)!r}")
        if fault:
            raise fault

    def _lockstep(self, shares: Sequence[Sequence[Sample]]) -> Lockstep | None:
        """As many videos for each process as the one with the most, where the denoiser is split."""
        if self.backbone.mesh is None:
            return None
        spare = self.samples[0]
        return Lockstep(max(map(len, shares)), (spare, self.prompts[spare.index]), self.distributed.any)

    def _score(self, video: Video) -> dict[str, float]:
        """Reward, its parts, the monitors, and what is always measured unless a scorer of that name gives it."""
        pixels, prompt = video.pixels[None].to(self.distributed.device), [video.sample.prompt]
        fps = self.backbone.video.fps  # as in training, whatever the files play at
        output = score_videos(self.reward, pixels, prompt, fps)
        values = {"reward": output.score.item()} | {name: part.item() for name, part in output.parts.items()}
        for name, monitor in self.monitors.items():
            values[name] = score_videos(monitor, pixels, prompt, fps).score.item()
        if pixels.shape[2] > 1:
            values.setdefault("motion", motion(pixels).item())
            if "dynamic_degree" not in values:
                values["dynamic_degree"] = dynamic_degree(pixels, fps)
        return values


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each name over the rows that have it; the reward is NaN where no video could be made."""
    return {"reward": math.nan} | means(rows)
