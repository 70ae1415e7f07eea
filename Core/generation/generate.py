"""Videos from prompts, without gradients: one path for validation, inference and evaluation.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, H, W pixels.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, VideoSettings
from Core.data.video import animated_gif, save_video
from Core.generation.manifest import MANIFEST, PARTIAL, Sample, append_line
from Core.sampling.euler import run_steps
from Core.utils import rng
from Core.utils.errors import without_frames

logger = logging.getLogger("vader")


class Turns:
    """The sampling runs of one batch, one for each clip; where the denoiser is split they run on every process."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.left = backbone, backbone.settings.clips_per_video
        self.running = False

    def sample(self, step: Any, z: Tensor, count: int, progress: bool = False) -> Tensor:
        self.running = True
        with self.backbone.no_grad_steps():
            z = run_steps(step, z, 0, count, progress)
        self.running = False
        self.left -= 1
        return z

    @torch.no_grad()
    def finish(self, texts: Sequence[EncodedPrompt]) -> None:
        """Run those that a failure between them has left out, on zeros."""
        for _ in range(self.left):
            predict = self.backbone.predictor([self.backbone.features(text) for text in texts])
            step: Any = self.backbone.inference_step(predict, [torch.Generator() for _ in texts])
            z = torch.zeros(len(texts), *self.backbone.latent_shape(), device=self.backbone.device)
            self.sample(step, z, len(step.timesteps))


@torch.no_grad()
def generate(
    backbone: Backbone,
    samples: Sequence[Sample],
    texts: Sequence[EncodedPrompt],
    progress: bool = False,
    turns: Turns | None = None,
) -> Tensor:
    """Videos [B, 3, frames, H, W] in [-1, 1], float32 on the CPU.

    Args:
        texts: the prompts of the samples, encoded.
        progress: show the sampling steps.
        turns: of this batch, for a caller that goes on where it fails.
    """
    turns = turns or Turns(backbone)
    conditions = backbone.conditions([sample.prompt for sample in samples])
    clips: list[Tensor] = []
    for clip in range(backbone.settings.clips_per_video):
        if clips and conditions:
            conditions.follow(clips[-1], clip)
        z = rng.noise([s.generator("noise", clip) for s in samples], backbone.latent_shape())
        z = z.to(backbone.device)
        predict = backbone.predictor([backbone.features(text, clip) for text in texts])
        step: Any = backbone.inference_step(predict, [s.generator("sampler", clip) for s in samples])
        count = len(step.timesteps)
        if conditions:
            step = conditions.condition(step, z, clip, _condition_noise(samples, clip))
        z = turns.sample(step, z, count, progress)
        clips.append(backbone.decode(z).clamp(-1, 1))
    video = conditions.join(clips) if conditions else clips[0]
    return video.float().cpu().contiguous()


def _condition_noise(samples: Sequence[Sample], clip: int) -> Callable[[Tensor], Tensor]:
    """Noise for kept frames that start to be generated, drawn per sample so that batching changes nothing."""
    generators = [s.generator("condition", clip) for s in samples]
    return lambda z: rng.noise(generators, z.shape[1:]).to(z)


@dataclass(frozen=True)
class Lockstep:
    """What keeps the processes of a split denoiser together: each runs it, and what scores its videos, as often.

    length: videos that each process makes. spare: one to fill up with. agree: whether a flag is raised on some process.
    """

    length: int
    spare: tuple[Sample, EncodedPrompt]
    agree: Callable[[bool], bool]

    def fill(self, pairs: list[tuple[Sample, EncodedPrompt]]) -> list[tuple[Sample, EncodedPrompt]]:
        return pairs + [self.spare] * (self.length - len(pairs))


@dataclass(frozen=True)
class Video:
    """A generated video: its sample, its file, and its pixels [3, frames, H, W] on the CPU.

    Without a path it stands in for one that this process has not, or could not make, so that all have as many.
    """

    sample: Sample
    path: Path | None
    pixels: Tensor


def write_videos(
    backbone: Backbone,
    samples: Sequence[Sample],
    texts: Sequence[EncodedPrompt],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    files: VideoSettings,
    batch_size: int,
    progress: bool = False,
    lockstep: Lockstep | None = None,
) -> Iterator[Video]:
    """Generate ``samples`` into ``folder`` and record each in its manifest.

    A sample that cannot be made is reported and left out; the rest goes on.

    Args:
        texts: the prompts of the samples, encoded.
        settings: recorded with each video.
        files: frame rate and kind of the files.
        batch_size: videos generated at once.
        lockstep: with other processes, which are then given as many videos, of which some may have no path.
    """
    own = list(zip(samples, texts, strict=True))
    pairs = lockstep.fill(own) if lockstep else own
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        made = generate_each(backbone, batch, progress, lockstep)
        for number, ((sample, _), pixels) in enumerate(zip(batch, made, strict=True), start):
            path = None
            if pixels is not None and number < len(own):
                path = _write(pixels, sample, folder, settings, files, lockstep is not None)
            if path or lockstep:
                yield Video(sample, path, _blank(backbone) if pixels is None else pixels)


def _write(
    pixels: Tensor,
    sample: Sample,
    folder: Path,
    settings: Mapping[str, Any],
    files: VideoSettings,
    go_on: bool,
) -> Path | None:
    """Write a video and record it; with ``go_on`` a disk that fails costs the video and a message."""
    try:
        path = write_sample(pixels, folder, sample.name, files.file_fps, files.save_gif)
        entry = {**sample.identity, "copy": sample.copy, "file": path.name, **settings}
        append_line(folder / MANIFEST, json.dumps(entry))
        publish(path)
        return path
    except OSError as error:
        if not go_on:
            raise
        logger.error("no video for %s: %s", sample.name, error)
        return None


def _blank(backbone: Backbone) -> Tensor:
    """A grey video [3, frames, H, W]."""
    return torch.zeros(3, backbone.video.num_frames, backbone.video.height, backbone.video.width)


def generate_each(
    backbone: Backbone,
    pairs: Sequence[tuple[Sample, EncodedPrompt]],
    progress: bool,
    lockstep: Lockstep | None = None,
) -> list[Tensor | None]:
    """Pixels of each sample; when a batch fails, each is tried alone, so that only the faulty one is None."""
    samples, texts = zip(*pairs, strict=True)
    turns, videos, fault = Turns(backbone), None, None
    try:
        videos = generate(backbone, samples, texts, progress, turns)
        if not torch.isfinite(videos).all():
            raise ValueError("its pixels are not finite numbers; try dtype='bf16' or 'fp32'")
    except (ValueError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        fault = without_frames(error)  # the retries need their memory
    if lockstep:
        _keep_step(turns, fault, [lockstep.spare[1]] * len(pairs))
    if fault and len(pairs) == 1:
        logger.error("no video for %s: %s", samples[0].name, fault)
        return [None]
    failed = fault is not None
    if len(pairs) > 1 and (lockstep.agree(failed) if lockstep else failed):
        alone = [generate_each(backbone, [pair], progress, lockstep)[0] for pair in pairs]
    return alone if fault or videos is None else list(videos)


def _keep_step(turns: Turns, fault: Exception | None, texts: Sequence[EncodedPrompt]) -> None:
    """Run what a failed batch has left out of a denoiser that is split over processes.

    Raises:
        ValueError, torch.OutOfMemoryError: it failed while the denoiser ran, which the others cannot do alone.
    """
    if isinstance(fault, torch.OutOfMemoryError):
        raise fault
    if fault and turns.running:
        raise ValueError(
            f"the denoiser, which is split over the processes, failed on one of them: {fault}; the same command goes "
            "on with what is missing"
        ) from fault
    turns.finish(texts)


def write_sample(pixels: Tensor, folder: Path, name: str, fps: float, gif: bool) -> Path:
    """Write the files of a sample [3, frames, H, W] under hidden names; returns the path to ``publish``.

    An older video of that path goes, so that a record of the new one never points to it.
    """
    hidden = save_video(pixels, folder / f"{PARTIAL}{name}", fps)
    if gif and hidden.suffix == ".mp4":
        hidden.with_suffix(".gif").write_bytes(animated_gif(hidden))
    path = folder / hidden.name.removeprefix(PARTIAL)
    path.unlink(missing_ok=True)
    return path


def publish(path: Path) -> None:
    """Move the finished files of a sample to where users look; the video comes last and tells it is complete."""
    hidden = path.with_name(f"{PARTIAL}{path.name}")
    if hidden.with_suffix(".gif").exists():
        os.replace(hidden.with_suffix(".gif"), path.with_suffix(".gif"))
    os.replace(hidden, path)
