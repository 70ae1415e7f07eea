"""Stage ``stdit``: the small STDiT3, pretrained by the rectified-flow loss on noisy captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
from opensora.schedulers.rf.rectified_flow import RFlowScheduler
from scripts.demo import text, vae, world
from scripts.demo.common import SEED, fit

SIZES = dict(
    depth=4, hidden_size=128, num_heads=4, caption_channels=text.WIDTH, model_max_length=text.MAX_TOKENS
)
CAPTION_NOISE = 0.2  # share of pretraining captions with a wrong colour or shape: the base model's headroom
BATCH = 32
# Timesteps lean towards noise: colour, place and motion of a video this small are decided above 0.8.
TIME_SHIFT, TIME_SPREAD = 0.8, 1.2


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
    latents, _, _ = vae.normalised_latents()
    t5, tokens = text.train()
    torch.manual_seed(2)
    model = STDiT3(STDiT3Config(**SIZES))
    scenes = [world.scene(SEED, i) for i in range(len(latents))]
    flow = RFlowScheduler(sample_method="logit-normal", loc=TIME_SHIFT, scale=TIME_SPREAD)

    def loss_fn(rng: np.random.Generator):
        rows = rng.integers(len(latents), size=BATCH)
        captions = [world.noisy_caption(scenes[i], rng, CAPTION_NOISE) for i in rows]
        kwargs = {**encode(captions, t5, tokens), **sizes(BATCH)}
        losses = flow.training_losses(model, latents[torch.from_numpy(rows)], kwargs)["loss"]
        return losses.mean(), {}

    fit("stdit", model, loss_fn, steps=5400, lr=1.5e-3, weight_decay=0.01, ema_decay=0.998)
    return model.eval()


def export(folder: Path) -> None:
    """The denoiser in the hub's layout, half precision."""
    train().half().save_pretrained(folder)
