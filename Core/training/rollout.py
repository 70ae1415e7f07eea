"""What objectives share: the draws of each video, its noise, its finished latent, and the frames to score.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, Features
from Core.modules import lora
from Core.sampling.euler import DenoisingStep, Predict, run_steps
from Core.sampling.frame_choice import choose_frames, frames_of_video
from Core.training.objectives.base import ObjectiveSettings
from Core.utils import rng
from Core.utils.options import option


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(ObjectiveSettings):
    """Keys of an objective that scores frames of the videos it samples."""

    decode_frame: str | int | list[int] = option(
        -1,
        "latent frames to score: -1 one at random, `fml` first, middle, last, `all`, `alt` every other, or an index; "
        "or frames of the finished video: `2fps` and `8frames`, evenly spaced, or a list of numbers",
    )
    decode_context: Literal["isolated", "causal", "whole"] = option(
        "isolated",
        "decode a scored frame from its latent frame alone (`isolated`, as in the reference), or as a frame of the "
        "finished video, with a gradient to its own latent frame (`causal`) or to all it depends on (`whole`)",
    )
    decode_reach: int = option(
        1,
        "latent frames that the gradient of a `causal` frame reaches: its own and those before it, where the family's "
        "VAE runs frame by frame",
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class GuidedSettings(ObjectiveSettings):
    """Keys of an objective whose gradient runs through guided predictions."""

    guidance_grad: Literal["both", "cond"] = option(
        "both", "guidance branches that keep gradients; `cond` saves the memory of the unconditional branch"
    )


@dataclass(frozen=True, kw_only=True)
class KlSettings(ObjectiveSettings):
    """Keys of an objective that can hold the adapter near the base model."""

    kl_weight: float = option(
        0.0,
        "weight of the squared difference between the predictions with and without the adapter",
        minimum=0,
    )


@dataclass(frozen=True, kw_only=True)
class NoisingSettings(ObjectiveSettings):
    """Keys of an objective that adds noise to finished videos and asks for predictions there."""

    levels_per_video: int = option(1, "random noise levels per video and optimiser step", minimum=1)


@contextmanager
def base_model(denoiser: Any) -> Iterator[None]:
    """Within this context predictions are the model's without the adapter, and keep no graph."""
    with torch.no_grad(), lora.base_only(denoiser):
        yield


class KlToBase:
    """Mean squared difference between the adapted prediction for the captions and the base model's.

    Observes the gradient steps of one sampling run. For Gaussian steps of equal width this is the KL divergence
    between the two samplers up to a factor (DPOK, Fan et al., 2023).

    Args:
        predict: for the captions alone, without guidance; must not have been called yet.
    """

    def __init__(self, denoiser: torch.nn.Module, predict: Predict):
        self.denoiser, self.predict = denoiser, predict
        self.terms: list[Tensor] = []

    def observe(self, z: Tensor, t: Tensor, prediction: Tensor) -> None:
        """Add a step: latent ``z`` [B, C, T, h, w], timesteps ``t`` [B], the adapted prediction like ``z``."""
        with base_model(self.denoiser):
            base = self.predict(z.detach(), t)
        self.terms.append(squared_distance(prediction, base))

    def per_sample(self) -> Tensor:
        """[B], averaged over the observed steps."""
        return torch.stack(self.terms).mean(0)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """[B]: squared difference of latents, averaged over a latent's elements."""
    return (a - b).square().flatten(1).mean(1)


class Rollout:
    """Videos of global sample numbers; every draw follows from the seed and a video's number."""

    def __init__(self, settings: Any, backbone: Backbone, seed: int):
        self.settings, self.backbone, self.seed = settings, backbone, seed

    def features(self, prompts: Sequence[EncodedPrompt]) -> list[Features]:
        return [self.backbone.features(encoded) for encoded in prompts]

    def noise(self, samples: Sequence[int]) -> Tensor:
        """[B, C, T, h, w], each video's own: where its sampling begins."""
        return self.normal("noise", samples)

    def normal(self, name: str, samples: Sequence[int], number: int = 0) -> Tensor:
        """Standard normal [B, C, T, h, w]: draw ``number`` of each video for a purpose."""
        drawn = rng.noise(self.generators(name, samples, number), self.backbone.latent_shape())
        return drawn.to(self.backbone.device)

    def uniform(self, name: str, samples: Sequence[int], number: int = 0) -> Tensor:
        """Uniform [B] in [0, 1), likewise; in float64, on the CPU."""
        generators = self.generators(name, samples, number)
        return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])

    def noising(self, name: str, samples: Sequence[int], number: int) -> tuple[Tensor, Tensor]:
        """Noise [B, C, T, h, w] and uniformly drawn timesteps [B] at which to add it to finished videos."""
        level = 1 - self.uniform(f"{name} level", samples, number)  # in (0, 1]
        t = self.backbone.process.timesteps_at(level.float().to(self.backbone.device))
        return self.normal(f"{name} noise", samples, number), t

    def generators(self, name: str, samples: Sequence[int], number: int = 0) -> list[torch.Generator]:
        return [rng.generator(self.seed, name, sample, number) for sample in samples]

    def frame_numbers(self, samples: Sequence[int]) -> Tensor:
        """Latent frames [B, F] to decode; on the CPU, where reading them waits for no GPU."""
        frames = self.backbone.latent_shape()[1]
        return choose_frames(self.settings.decode_frame, frames, self.generators("frame", samples))

    def frames(self, z: Tensor, samples: Sequence[int]) -> Tensor:
        """The frames [B, F, 3, H, W] of latents that are scored."""
        how = self.settings.decode_context, self.settings.decode_reach
        video = self.backbone.video
        if (times := frames_of_video(self.settings.decode_frame, video.num_frames, video.fps)) is not None:
            return self.backbone.decode_at(z, torch.tensor(times).expand(len(z), -1), *how)
        return self.backbone.decode_frames(z, self.frame_numbers(samples), *how)

    @torch.no_grad()
    def finished(self, predict: Predict, samples: Sequence[int]) -> Tensor:
        """Clean latents [B, C, T, h, w] of the deterministic sampler, without a graph."""
        timesteps = self.backbone.timesteps(len(samples))
        step = DenoisingStep(predict, self.backbone.process, timesteps)
        with self.backbone.no_grad_steps():
            return run_steps(step, self.noise(samples), 0, len(timesteps))
