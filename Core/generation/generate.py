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

from Core.backbones import Backbone
from Core.data.prompts import Prompt
from Core.sampling.euler import euler_sample
from Core.sampling.no_grad_steps import lean_steps
from Core.training.metric_logging import animated_gif
from Core.utils import rng as draws
from opensora.datasets import save_sample

logger = logging.getLogger("vader")
MANIFEST = "prompts.jsonl"
PARTIAL = ".partial_"  # prefix of files that are not complete


@dataclass(frozen=True)
class Sample:
    """One video to make. Its noise depends on ``seed`` and the prompt's text alone."""

    prompt: Prompt
    index: int
    copy: int
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix: number of the prompt, number of the copy, and the prompt's first words."""
        words = "".join(c if c.isalnum() else " " for c in self.prompt.reward_text).split()
        return f"{self.index:04d}_{self.copy}_{'_'.join(words)[:40]}"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this sample from others in a manifest."""
        prompt = self.prompt
        return {
            "name": self.name,
            "prompt": prompt.merged,
            "reference_path": prompt.reference,
            "mask_strategy": prompt.mask_strategy,
            "seed": self.seed,
        }

    def generator(self, purpose: str, loop: int) -> torch.Generator:
        return draws.generator(self.seed, purpose, self.prompt.text(), loop)


def plan_samples(prompts: Sequence[Prompt], copies: int, seed: int, first_index: int = 0) -> list[Sample]:
    """``copies`` videos of each prompt, with seeds from ``seed`` upwards."""
    return [
        Sample(prompt, first_index + number, copy, seed + copy)
        for number, prompt in enumerate(prompts)
        for copy in range(copies)
    ]


@torch.no_grad()
def generate(backbone: Backbone, text: Mapping[str, Tensor], config, samples: Sequence[Sample]) -> Tensor:
    """Videos [B, 3, frames, H, W] in [-1, 1], float32 on the CPU: ``config.loop`` clips of each sample in a row.

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
            prefix=lean_steps(backbone, compiled=config.compile_blocks),
            progress=config.verbose >= 2,
        )
        clips.append(backbone.decode(z).clamp(-1, 1))
    skip = backbone.overlap(config.condition_frame_length) if len(clips) > 1 else 0
    return torch.cat([clips[0], *(clip[:, :, skip:] for clip in clips[1:])], dim=2).float().cpu()


def _condition_noise(samples: Sequence[Sample], loop: int) -> Callable[[Tensor], Tensor]:
    """Noise for kept frames that start to be generated, drawn per sample so that batching changes nothing."""
    generators = [s.generator("condition", loop) for s in samples]
    return lambda z: draws.noise(generators, z.shape[1:]).to(z)


def captions_of(backbone: Backbone, prompts: Sequence[Prompt]) -> list[str]:
    """Every text the denoiser may be conditioned on for these prompts."""
    return [backbone.caption(text) for prompt in prompts for _, text in prompt.segments]


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
    settings: Mapping[str, Any],
) -> Iterator[Video]:
    """Generate ``samples`` into ``folder``, ``val_batch_size`` at a time, and record each in ``prompts.jsonl``.

    A sample that cannot be made is reported and left out; the rest goes on.
    """
    for start in range(0, len(samples), config.val_batch_size):
        for sample, pixels in generate_each(
            backbone, text, config, samples[start : start + config.val_batch_size]
        ):
            path = write_sample(pixels, folder, sample.name, config.file_fps, config.save_gif)
            entry = {**sample.identity, "copy": sample.copy, "file": path.name, **settings}
            append_line(folder / MANIFEST, json.dumps(entry))
            publish(path)
            yield Video(sample, path, pixels)


def generate_each(
    backbone: Backbone, text: Mapping[str, Tensor], config, samples: Sequence[Sample]
) -> list[tuple[Sample, Tensor]]:
    """Samples with their pixels; when a batch fails, each is tried alone, so that only the faulty one is lost."""
    try:
        videos = generate(backbone, text, config, samples)
        if not torch.isfinite(videos).all():
            raise ValueError("its pixels are not finite numbers; try dtype='bf16' or 'fp32'")
        return list(zip(samples, videos, strict=True))
    except (ValueError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        if len(samples) == 1:
            logger.error("no video for %s: %s", samples[0].name, error)
            return []
    return [made for sample in samples for made in generate_each(backbone, text, config, [sample])]


def write_sample(pixels: Tensor, folder: Path, name: str, fps: float, gif: bool) -> Path:
    """Write the files of a sample [3, frames, H, W] under hidden names; returns the path to ``publish``.

    An older video of that path goes, so that a record of the new one never points to it.
    """
    # Upstream's save_sample rescales in place what it is given.
    hidden = Path(save_sample(pixels.clone(), str(folder / f"{PARTIAL}{name}"), fps=fps, verbose=False))
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


def clear_partial(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for leftover in folder.glob(f".*{PARTIAL.lstrip('.')}*"):
        leftover.unlink()


def unfinished(samples: Sequence[Sample], folder: Path, settings: Mapping[str, Any]) -> list[Sample]:
    """Samples that are not in ``folder`` yet, made with the same ``settings``."""
    wanted = json.loads(json.dumps(dict(settings)))
    recorded = {entry["name"]: entry for entry in read_manifest(folder)}
    todo, replaced = [], 0
    for sample in samples:
        entry = recorded.get(sample.name)
        if entry is None:
            todo.append(sample)
        elif not (sample.identity | wanted).items() <= entry.items():
            todo.append(sample)
            replaced += 1
    if replaced:
        logger.warning(
            "%d videos in %s were made with other settings and will be replaced; choose another project_dir to "
            "keep them", replaced, folder,
        )  # fmt: skip
    return todo


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Entries of ``prompts.jsonl`` whose files are there, the newest of each name, by name."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return []
    lines = manifest.read_text(encoding="utf-8").splitlines()
    newest = {entry["name"]: entry for entry in map(_parse_line, lines) if entry}
    return [newest[name] for name in sorted(newest) if (folder / newest[name]["file"]).is_file()]


def _parse_line(line: str) -> dict[str, Any]:
    """An entry, or nothing where a crash cut the line short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def tidy_manifest(folder: Path) -> None:
    """Rewrite ``prompts.jsonl`` in the order of names, without entries whose files are gone."""
    entries = read_manifest(folder)
    partial = folder / f"{PARTIAL}{MANIFEST}"
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def append_line(path: Path, line: str) -> None:
    """Append a line in one system call, so that processes do not mix theirs and a crash leaves whole lines."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)
