"""Stages ``latents`` and ``stdit``: the small STDiT3, pretrained by the rectified-flow loss on noisy captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
from opensora.schedulers.rf.rectified_flow import RFlowScheduler
from scripts.demo import text, vae, world
from scripts.demo.common import SEED, WORK, fit, save

SIZES = dict(
    depth=4, hidden_size=128, num_heads=4, caption_channels=text.WIDTH, model_max_length=text.MAX_TOKENS
)
CAPTION_NOISE = 0.35  # share of pretraining captions with a wrong colour or shape: the base model's headroom
BATCH = 32


@torch.no_grad()
def normalised_latents() -> tuple[Tensor, list[float], list[float]]:
    """Latents of the training clips ``[N, 4, 5, 8, 8]`` with unit spread, and the VAE's shift and scale."""
    path = WORK / "latents.pt"
    if not path.exists():
        pipeline = vae.train_temporal()
        spatial = vae.spatial_latents(pipeline.spatial_vae.module)
        raw = torch.cat([pipeline.temporal_vae.encode(part).mode() for part in spatial.split(32)])
        axes = (0, 2, 3, 4)
        shift, scale = raw.mean(axes), raw.std(axes)
        normal = (raw - shift.view(1, -1, 1, 1, 1)) / scale.view(1, -1, 1, 1, 1)
        save({"latents": normal, "shift": shift, "scale": scale}, path)
    saved = torch.load(path, weights_only=True)
    return saved["latents"], saved["shift"].tolist(), saved["scale"].tolist()


def sizes(n: int) -> dict[str, Tensor]:
    """What STDiT3 is told about ``n`` demo videos."""
    values = dict(height=world.SIDE, width=world.SIDE, num_frames=world.FRAMES, fps=world.FPS, ar=1.0)
    return {name: torch.full((n,), float(value)) for name, value in values.items()}


@torch.no_grad()
def encode(texts: list[str], t5, tokens) -> dict[str, Tensor]:
    """Captions as STDiT3 takes them: ``{"y": [B, 1, L, D], "mask": [B, L]}``."""
    batch = tokens(
        texts, padding="max_length", max_length=text.MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    hidden = t5.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return {"y": hidden[:, None], "mask": batch.attention_mask}


def train() -> STDiT3:
    """Rectified flow on the cached latents, with captions drawn anew (and in part wrong) at every step."""
    latents, _, _ = normalised_latents()
    t5, tokens = text.train()
    torch.manual_seed(2)
    model = STDiT3(STDiT3Config(**SIZES))
    scenes = [world.scene(SEED, i) for i in range(len(latents))]
    flow = RFlowScheduler(sample_method="logit-normal")

    def loss_fn(rng: np.random.Generator):
        rows = rng.integers(len(latents), size=BATCH)
        captions = [world.noisy_caption(scenes[i], rng, CAPTION_NOISE) for i in rows]
        kwargs = {**encode(captions, t5, tokens), **sizes(BATCH)}
        losses = flow.training_losses(model, latents[torch.from_numpy(rows)], kwargs)["loss"]
        return losses.mean(), {}

    fit("stdit", model, loss_fn, steps=2200, lr=1.5e-3, weight_decay=0.01, ema_decay=0.998)
    return model.eval()


def export(folder: Path) -> None:
    """The denoiser in the hub's layout, half precision."""
    train().half().save_pretrained(folder)
