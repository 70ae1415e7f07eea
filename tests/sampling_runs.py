"""Inference runs of the tiny twin, and the adapters and references they use."""

from pathlib import Path

import torch
import twin_runs
import twins

from Core.generation.manifest import read_manifest
from Core.modules import lora
from opensora.datasets import save_sample

# Two steps are enough for everything but the quality of a picture.
SCHEDULER = dict(type="rflow", use_timestep_transform=True, num_sampling_steps=2, cfg_scale=3.0)


def sample(twin: Path, folder: Path, *flags: str, **overrides) -> int:
    """Exit code of an inference run in ``folder``."""
    values = {"is_vader_training": False, "scheduler": SCHEDULER, **overrides}
    return twin_runs.start(twin, folder, *flags, **values)


def random_adapter(folder: Path, seed: int = 0, width: int = 64) -> str:
    """An adapter in PEFT's layout whose effect is large enough to be seen."""
    torch.manual_seed(seed)
    base = twins.stdit() if width == 64 else torch.nn.Sequential(torch.nn.Linear(width, width))
    targets = ("qkv", "q_linear", "kv_linear") if width == 64 else ("0",)
    model = lora.attach(base, targets, rank=4, alpha=4)
    for parameter in lora.parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    lora.save(model, folder)
    return str(folder)


def picture(path: Path, frames: int = 1, size: tuple[int, int] = (32, 32), seed: int = 0) -> str:
    """A smooth random picture or clip as a file; returns its path."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0].clamp(-1, 1)
    clip = torch.stack([image.roll(shift, -1) for shift in range(frames)], dim=1)
    return save_sample(clip, str(path), fps=24, verbose=False)


def contents(folder: Path, suffix: str = ".mp4") -> dict[str, bytes]:
    """File names and bytes of what a user sees."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"[!.]*{suffix}"))}


def entries(folder: Path) -> dict[str, dict]:
    """Manifest entries by sample name."""
    return {entry["name"]: entry for entry in read_manifest(folder)}
