"""Measure the exported demo models, loaded as in training.

``python -m scripts.demo.measure [--prompts 128] [--steps 12] [--guidance 1.75] [--sheet FILE.png]``
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from Core.rewards import build_reward
from Core.rewards.base import Reward
from Core.schedulers.rf import RFLOW
from opensora.models.stdit.stdit3 import STDiT3_XL_2
from opensora.models.text_encoder.t5 import T5Encoder
from opensora.models.vae.vae import OpenSoraVAE_V1_2
from scripts.demo import oracle, text, video, world
from scripts.demo.common import ASSETS, heldout, to_pixels, to_uint8

BATCH = 16
VAE_SCENES = 64  # true videos to pass through the VAE


class Models:
    """The exported models, ready to generate."""

    def __init__(self, folder: Path = ASSETS) -> None:
        self.vae = OpenSoraVAE_V1_2(from_pretrained=str(folder / "vae")).float().eval()
        self.model = STDiT3_XL_2(from_pretrained=str(folder / "stdit")).float().eval()
        self.encoder = T5Encoder(str(folder / "t5"), text.MAX_TOKENS, device="cpu")
        self.encoder.y_embedder = self.model.y_embedder

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], steps: int, guidance: float, seed: int, transform: bool = False
    ) -> Tensor:
        """Latents ``[B, 4, 5, 8, 8]`` for prompts."""
        noise = torch.randn(len(prompts), 4, 5, 8, 8, generator=torch.Generator().manual_seed(seed))
        sampler = RFLOW(num_sampling_steps=steps, cfg_scale=guidance, use_timestep_transform=transform)
        parts, done = [], 0
        for z in noise.split(BATCH):
            texts, info = list(prompts[done : done + len(z)]), video.sizes(len(z))
            parts.append(sampler.sample(self.model, self.encoder, z, texts, "cpu", info, progress=False))
            done += len(z)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pixels ``[B, 3, 17, 64, 64]``."""
        return torch.cat([self.vae.decode(part, num_frames=world.FRAMES) for part in z.split(4)])

    @torch.no_grad()
    def decode_alone(self, z: Tensor, seed: int) -> Tensor:
        """One random latent frame of each video, decoded alone: ``[B, 3, 1, 64, 64]``."""
        picks = torch.randint(z.shape[2], (len(z),), generator=torch.Generator().manual_seed(seed))
        single = torch.stack([latent[:, k : k + 1] for latent, k in zip(z, picks, strict=True)])
        return self.vae.decode(single, num_frames=1)


def accuracy(pixels: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Share of videos ``[B, 3, T, H, W]`` whose attributes, as the oracle reads them, match their captions."""
    hits = []
    for clip, caption in zip(to_uint8(pixels.transpose(1, 2)), captions, strict=True):
        said, seen = world.parse_caption(caption), oracle.read(clip) or {}
        hits.append([seen.get(name) == said[name] for name in ("colour", "shape", "direction")])
    colour, shape, direction = np.array(hits).T
    values = {"colour": colour, "shape": shape, "both": colour & shape, "direction": direction}
    return {name: float(value.mean()) for name, value in values.items()}


@torch.no_grad()
def rewards(scorer: Reward, pixels: Tensor, captions: Sequence[str]) -> float:
    """Mean score over three frames (or the only frame) of each video ``[B, 3, T, H, W]``."""
    frames = pixels[:, :, [0, 8, 16]] if pixels.shape[2] > 1 else pixels
    return float(scorer(frames.transpose(1, 2), list(captions)).score.mean())


def sheet(pixels: Tensor, path: str) -> None:
    """Contact sheet: five frames of each of 36 videos, three videos per row."""
    clips = to_uint8(pixels[:36].transpose(1, 2))
    strips = [np.concatenate(clip[[0, 4, 8, 12, 16]], axis=1) for clip in clips]
    rows = [np.concatenate(strips[i : i + 3], axis=1) for i in range(0, len(strips), 3)]
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ASSETS)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=1.75)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timestep-transform", action="store_true")
    parser.add_argument("--sheet")
    flags = parser.parse_args()

    models = Models(flags.folder)
    scenes, captions = heldout(flags.prompts)
    truth = to_pixels(np.stack([world.render(scene) for scene in scenes])).transpose(1, 2)
    z = models.generate(captions, flags.steps, flags.guidance, flags.seed, flags.timestep_transform)
    made, alone = models.decode(z), models.decode_alone(z, flags.seed)
    print("generated", {k: round(v, 3) for k, v in accuracy(made, captions).items()}, flush=True)
    with torch.no_grad():
        codes = torch.cat([models.vae.encode(part) for part in truth[:VAE_SCENES].split(4)])
    seen, seen_alone = models.decode(codes), models.decode_alone(codes, flags.seed)
    scorers = {
        "pick_score": build_reward("pick_score", {"model": str(flags.folder / "clip")}),
        "aesthetic": build_reward(
            "aesthetic",
            {"model": str(flags.folder / "clip"), "head": str(flags.folder / "aesthetic" / "head.pth")},
        ),
    }
    for label, clips in (("true", truth), ("true, through the VAE", seen)):
        print(label, {k: round(v, 3) for k, v in accuracy(clips, captions[: len(clips)]).items()}, flush=True)
    kinds = {"true": truth, "VAE": seen, "VAE alone": seen_alone, "generated": made, "generated alone": alone}
    for name, scorer in scorers.items():
        print(
            name,
            {label: round(rewards(scorer, x, captions[: len(x)]), 2) for label, x in kinds.items()},
            flush=True,
        )
    if flags.sheet:
        sheet(made, flags.sheet)


if __name__ == "__main__":
    main()
