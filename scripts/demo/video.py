"""Stage ``stdit``: train the small STDiT3 with the rectified-flow loss on partly wrong captions, in three phases.

``stdit`` uses good clips, ``stdit_poor`` equal numbers of good and poor clips, ``stdit_faded`` faded clips. The VAE was
trained on full colours only and reconstructs faded ones as unsteady, so the base model generates unsteady videos: a
common fault for the reward to correct. In the last phase it also learns to continue given frames, on good clips: their
own first frames, or frames from the middle of a longer clip.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
from opensora.schedulers.rf.rectified_flow import RFlowScheduler
from scripts.demo import text, vae, world
from scripts.demo.common import SEED, WORK, LossFn, fit, save, to_pixels

SIZES = dict(
    depth=4, hidden_size=128, num_heads=4, caption_channels=text.WIDTH, model_max_length=text.MAX_TOKENS
)
CAPTION_NOISE = 0.2  # share of pretraining captions with a wrong colour or shape: the base model's headroom
BATCH = 32
EXTRA = 1536  # additional scenes, used as poor and faded clips
POOR_CLIPS, FADED_CLIPS, WINDOWS = 3, 4, 5  # random streams, separate from the scenes' (world.scene)
FADE = (0.2, 0.8)  # share of grey in the colours of a faded clip
# Timesteps are shifted towards noise: in a video this small, colour, position and motion are decided above 0.8.
TIME_SHIFT, TIME_SPREAD = 0.8, 1.2
# Share of batches whose first one or two latent frames are given, as for an image or a long video.
CONTINUED, CONTINUED_AT_LAST = 0.2, 0.5
LONGEST_WAIT = 48  # a window into a longer clip starts before this frame


def sizes(n: int) -> dict[str, Tensor]:
    """STDiT3's size conditioning for ``n`` demo videos."""
    values = dict(height=world.SIDE, width=world.SIDE, num_frames=world.FRAMES, fps=world.FPS, ar=1.0)
    return {name: torch.full((n,), float(value)) for name, value in values.items()}


@torch.no_grad()
def encode(texts: list[str], t5, tokens) -> dict[str, Tensor]:
    """Captions as STDiT3 expects them: ``{"y": [B, 1, L, D], "mask": [B, L]}``."""
    batch = tokens(
        texts, padding="max_length", max_length=text.MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    hidden = t5.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return {"y": hidden[:, None], "mask": batch.attention_mask}


def generated_frames(rng: np.random.Generator, count: int, continued: float) -> Tensor | None:
    """Which of ``count`` latent frames are generated, bool ``[BATCH, count]``; None for all of them."""
    if rng.random() >= continued:
        return None
    return (torch.arange(count) >= int(rng.integers(1, 3))).expand(BATCH, count)


def poor_clip(index: int) -> np.ndarray:
    """The clip with its shape melted towards a circle, faded to grey, or both; about one in ten unchanged."""
    scene, rng = extra_scene(index), np.random.default_rng([SEED, index, POOR_CLIPS])
    melted, faded = rng.random(2) * (rng.random(2) < 0.7)
    return world.render(scene, towards=replace(scene, shape="circle"), shape=melted, fade=faded)


def faded_clip(index: int) -> np.ndarray:
    """The clip in faded colours."""
    return world.render(
        extra_scene(index), fade=np.random.default_rng([SEED, index, FADED_CLIPS]).uniform(*FADE)
    )


def window(index: int) -> np.ndarray:
    """A clip to continue from its first frames; every second one starts in the middle of a longer clip.

    There the shape may have turned at a border and move against its caption's direction, as the given frames show.
    """
    wait = np.random.default_rng([SEED, index, WINDOWS]).integers(1, LONGEST_WAIT) if index % 2 else 0
    return world.render(extra_scene(index), range(wait, wait + world.FRAMES))


@torch.no_grad()
def latents_of(name: str, clip: Callable[[int], np.ndarray]) -> Tensor:
    """Latents ``[EXTRA, 4, 5, 8, 8]`` of the scenes after those of the good clips; cached on disk."""
    path = WORK / f"{name}_latents.pt"
    if not path.exists():
        pipeline, parts = vae.train_decoder(), []
        for start in range(0, EXTRA, 32):
            clips = np.stack([clip(i) for i in range(start, start + 32)])
            parts.append(pipeline.encode(to_pixels(clips).transpose(1, 2)))
        save(torch.cat(parts), path)
    return torch.load(path, weights_only=True)


def extra_scene(index: int) -> world.Scene:
    return world.scene(SEED, vae.CLIPS + index)


@dataclass(frozen=True)
class Lesson:
    """Training data of a phase: clips of ``scenes`` and, in a share ``continued`` of batches, clips to continue."""

    scenes: list[world.Scene]
    latents: Tensor
    continued_latents: Tensor
    continued: float


def flow_loss(model: STDiT3, t5, tokens, lesson: Lesson) -> LossFn:
    """Rectified flow on cached latents, with new (partly wrong) captions at every step."""
    flow = RFlowScheduler(sample_method="logit-normal", loc=TIME_SHIFT, scale=TIME_SPREAD)

    def loss_fn(rng: np.random.Generator):
        rows = rng.integers(len(lesson.scenes), size=BATCH)
        captions = [world.noisy_caption(lesson.scenes[i], rng, CAPTION_NOISE) for i in rows]
        kwargs = {**encode(captions, t5, tokens), **sizes(BATCH)}
        mask = generated_frames(rng, lesson.latents.shape[2], lesson.continued)
        latents = lesson.latents if mask is None else lesson.continued_latents
        losses = flow.training_losses(model, latents[torch.from_numpy(rows)], kwargs, mask=mask)["loss"]
        return losses.mean(), {}

    return loss_fn


def lessons() -> dict[str, Lesson]:
    """Training data of the three phases."""
    good, _, _ = vae.normalised_latents()
    scenes, extra = [world.scene(SEED, i) for i in range(len(good))], [extra_scene(i) for i in range(EXTRA)]
    mixed = torch.cat([good[:EXTRA], latents_of("poor", poor_clip)])
    faded = latents_of("faded", faded_clip)
    return {
        "stdit": Lesson(scenes, good, good, CONTINUED),
        "stdit_poor": Lesson(scenes[:EXTRA] + extra, mixed, mixed, CONTINUED),
        "stdit_faded": Lesson(extra, faded, latents_of("continued", window), CONTINUED_AT_LAST),
    }


def train() -> STDiT3:
    """Train the denoiser in its three phases."""
    taught = lessons()
    t5, tokens = text.train()
    torch.manual_seed(2)
    model = STDiT3(STDiT3Config(**SIZES))

    def turn(name: str, **settings: float) -> None:
        loss = flow_loss(model, t5, tokens, taught[name])
        fit(name, model, loss, weight_decay=0.01, ema_decay=0.998, **settings)

    turn("stdit", steps=5400, lr=1.5e-3)
    turn("stdit_poor", steps=2000, lr=1e-3, muon_lr=4e-3)
    turn("stdit_faded", steps=1200, lr=5e-4, muon_lr=2e-3)
    return model.eval()


def export(folder: Path) -> None:
    """Save the denoiser in the Hub's layout, in half precision."""
    train().half().save_pretrained(folder)
