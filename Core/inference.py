"""Videos from prompts, without gradients: one path for validation, inference and evaluation.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, H, W pixels.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from Core import draws
from Core.backbones import Backbone
from Core.prompts import Prompt
from Core.schedulers.rf.euler import euler_sample
from opensora.datasets import save_sample

logger = logging.getLogger("vader")
MANIFEST = "prompts.jsonl"


@dataclass(frozen=True)
class Sample:
    """One video to make. Its noise depends on ``seed``, the prompt's text and ``copy`` alone."""

    prompt: Prompt
    index: int
    copy: int
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix: number of the prompt, number of the copy, and the prompt's first words."""
        words = "".join(c if c.isalnum() else " " for c in self.prompt.reward_text).split()
        return f"{self.index:04d}_{self.copy}_{'_'.join(words)[:40]}"

    def generator(self, purpose: str, loop: int) -> torch.Generator:
        return draws.generator(self.seed, purpose, self.prompt.text(), self.copy, loop)


def plan_samples(prompts: Sequence[Prompt], copies: int, seed: int, first_index: int = 0) -> list[Sample]:
    """``copies`` videos of each prompt."""
    return [
        Sample(prompt, first_index + number, copy, seed)
        for number, prompt in enumerate(prompts)
        for copy in range(copies)
    ]


@torch.no_grad()
def generate(backbone: Backbone, text: Mapping[str, Tensor], config, samples: Sequence[Sample]) -> Tensor:
    """Videos [B, 3, frames, H, W] in [-1, 1] of a batch of samples, ``config.loop`` clips each.

    ``text`` maps every caption of the samples to its features, see ``embed_captions``.
    """
    references: list[list[Tensor]] = [[] for _ in samples]
    if any(s.prompt.reference for s in samples):
        references = backbone.encode_references([s.prompt.reference for s in samples])
    strategies = [s.prompt.mask_strategy for s in samples]
    clips: list[Tensor] = []
    for loop in range(config.loop):
        if clips:
            length, edit = config.condition_frame_length, config.condition_frame_edit
            references, strategies = backbone.continue_clip(
                clips[-1], references, strategies, loop, length, edit
            )
        z = draws.noise([s.generator("noise", loop) for s in samples], backbone.latent_shape())
        z = z.to(backbone.device)
        mask = backbone.condition(z, references, strategies, loop, config.align)
        z = euler_sample(
            backbone.velocity([text[backbone.caption(s.prompt.text(loop))] for s in samples]),
            z,
            backbone.timesteps(len(samples)),
            num_timesteps=backbone.num_timesteps,
            mask=mask,
            noise_like=_condition_noise(samples, loop),
            progress=config.verbose >= 2,
        )
        clips.append(backbone.decode(z).clamp(-1, 1))
    skip = backbone.overlap(config.condition_frame_length) if len(clips) > 1 else 0
    return torch.cat([clips[0], *(clip[:, :, skip:] for clip in clips[1:])], dim=2)


def _condition_noise(samples: Sequence[Sample], loop: int) -> Callable[[Tensor], Tensor]:
    """Noise for kept frames that start to be generated, drawn per sample so that batching changes nothing."""
    generators = [s.generator("condition", loop) for s in samples]
    return lambda z: draws.noise(generators, z.shape[1:]).to(z)


def captions_of(backbone: Backbone, prompts: Sequence[Prompt]) -> list[str]:
    """Every text the denoiser may be conditioned on for these prompts."""
    return [backbone.caption(text) for prompt in prompts for _, text in prompt.segments]


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), size):
        yield list(samples[start : start + size])


@dataclass(frozen=True)
class Video:
    """A generated video: its sample, its file, and its pixels [3, frames, H, W] on the CPU."""

    sample: Sample
    path: Path
    pixels: Tensor


def write_videos(
    backbone: Backbone,
    text: Mapping[str, Tensor],
    config,
    samples: Sequence[Sample],
    folder: Path,
    settings: Mapping[str, object],
    description: str = "generating",
    reuse: bool = True,
) -> Iterator[Video]:
    """Generate ``samples`` into ``folder``, batch by batch, and record each in ``prompts.jsonl``.

    With ``reuse``, a sample that is recorded with the same ``settings`` and whose file exists is not made
    again. A batch that fails with a ValueError is reported and the rest goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _recorded(folder, settings) if reuse else set()
    todo = [sample for sample in samples if sample.name not in done]
    bar = tqdm(total=len(samples), initial=len(samples) - len(todo), desc=description, unit="video")
    bar.disable = bar.disable or config.verbose < 1
    for batch in batches(todo, config.val_batch_size):
        try:
            videos = generate(backbone, text, config, batch).float().cpu()
        except ValueError as error:
            logger.error("no video for %s: %s", [sample.name for sample in batch], error)
            continue
        for sample, pixels in zip(batch, videos, strict=True):
            path = save_sample(pixels, str(folder / sample.name), fps=config.file_fps, verbose=False)
            _record(folder, sample, Path(path).name, settings)
            yield Video(sample, Path(path), pixels)
        bar.update(len(batch))
    bar.close()


def _record(folder: Path, sample: Sample, file: str, settings: Mapping[str, object]) -> None:
    entry = {
        "name": sample.name,
        "file": file,
        "prompt": sample.prompt.reward_text,
        "copy": sample.copy,
        "seed": sample.seed,
        **settings,
    }
    with open(folder / MANIFEST, "a", encoding="utf-8") as manifest:
        manifest.write(json.dumps(entry) + "\n")


def _recorded(folder: Path, settings: Mapping[str, object]) -> set[str]:
    """Names of samples already made with these settings, their files still there."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return set()
    entries = [
        json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.endswith("}")
    ]
    wanted = json.loads(json.dumps(dict(settings)))
    return {
        entry["name"]
        for entry in entries
        if wanted.items() <= entry.items() and os.path.isfile(folder / entry["file"])
    }
