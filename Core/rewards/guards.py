"""Scorers without a network: cheap guards in a mixture against collapse, and monitors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from Core.rewards.base import ImageReward, Reward, RewardInfo, VideoReward
from Core.rewards.preprocess import luma

LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


class Guard(Reward):
    """Loss −score, or |score − target| with a target: "keep it near there"."""

    def __init__(self, *, target: float | None = None):
        super().__init__()
        self.target = target

    def loss(self, score: Tensor) -> Tensor:
        return -score if self.target is None else (score - self.target).abs()


class Motion(Guard, VideoReward):
    """Mean absolute pixel change between consecutive frames; loss −score, or |score − target|."""

    info = RewardInfo(
        name="motion",
        summary="amount of motion; guards against frozen videos",
        range="0 to 1",
    )
    min_frames = 2

    def score_clips(self, clips: Tensor, prompts: list[str]) -> Tensor:
        return clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


class Sharpness(Guard, ImageReward):
    """Standard deviation of the Laplacian of the luma, interior pixels; loss −score, or |score − target|."""

    info = RewardInfo(
        name="sharpness",
        summary="amount of fine detail; guards against blur",
        range="0 to about 3",
        paper="Pech-Pacheco et al. 2000 (variance of Laplacian)",
    )

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        response = F.conv2d(luma(images), images.new_tensor(LAPLACIAN).view(1, 1, 3, 3)).flatten(1)
        # The small constant keeps the gradient finite on a flat image.
        return (response.var(dim=1, unbiased=False) + 1e-8).sqrt()


class Saturation(Guard, ImageReward):
    """Mean HSV saturation, (max − min) / max over channels; loss −score, or |score − target|."""

    info = RewardInfo(
        name="saturation",
        summary="colourfulness; guards against washed-out or garish frames",
        range="0 to 1",
        paper="Smith 1978 (HSV)",
    )

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        low, high = torch.aminmax(images, dim=1)
        return ((high - low) / high.clamp_min(1e-3)).mean(dim=(1, 2))
