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

logger = logging.getLogger("vader")


@torch.no_grad()
def generate(
    backbone: Backbone,
    samples: Sequence[Sample],
    texts: Sequence[EncodedPrompt],
    progress: bool = False,
) -> Tensor:
    """Videos [B, 3, frames, H, W] in [-1, 1], float32 on the CPU.

    Args:
        texts: the prompts of the samples, encoded.
        progress: show the sampling steps.
    """
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
        with backbone.no_grad_steps():
            z = run_steps(step, z, 0, count, progress)
        clips.append(backbone.decode(z).clamp(-1, 1))
    video = conditions.join(clips) if conditions else clips[0]
    return video.float().cpu().contiguous()


def _condition_noise(samples: Sequence[Sample], clip: int) -> Callable[[Tensor], Tensor]:
    """Noise for kept frames that start to be generated, drawn per sample so that batching changes nothing."""
    generators = [s.generator("condition", clip) for s in samples]
    return lambda z: rng.noise(generators, z.shape[1:]).to(z)


@dataclass(frozen=True)
class Video:
    """A generated video: its sample, its file, and its pixels [3, frames, H, W] on the CPU."""

    sample: Sample
    path: Path
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
) -> Iterator[Video]:
    """Generate ``samples`` into ``folder`` and record each in its manifest.

    A sample that cannot be made is reported and left out; the rest goes on.

    Args:
        texts: the prompts of the samples, encoded.
        settings: recorded with each video.
        files: frame rate and kind of the files.
        batch_size: videos generated at once.
    """
    pairs = list(zip(samples, texts, strict=True))
    for start in range(0, len(pairs), batch_size):
        for sample, pixels in generate_each(backbone, pairs[start : start + batch_size], progress):
            path = write_sample(pixels, folder, sample.name, files.file_fps, files.save_gif)
            entry = {**sample.identity, "copy": sample.copy, "file": path.name, **settings}
            append_line(folder / MANIFEST, json.dumps(entry))
            publish(path)
            yield Video(sample, path, pixels)


def generate_each(
    backbone: Backbone, pairs: Sequence[tuple[Sample, EncodedPrompt]], progress: bool
) -> list[tuple[Sample, Tensor]]:
    """Samples with their pixels; when a batch fails, each is tried alone, so that only the faulty one is lost."""
    samples, texts = zip(*pairs, strict=True)
    try:
        videos = generate(backbone, samples, texts, progress)
        if not torch.isfinite(videos).all():
            raise ValueError("its pixels are not finite numbers; try dtype='bf16' or 'fp32'")
        return list(zip(samples, videos, strict=True))
    except (ValueError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        if len(samples) == 1:
            logger.error("no video for %s: %s", samples[0].name, error)
            return []
    return [made for pair in pairs for made in generate_each(backbone, [pair], progress)]


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
