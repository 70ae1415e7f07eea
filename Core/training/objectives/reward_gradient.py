"""Reward gradient (VADER, Prabhudesai et al., 2024): backpropagate the reward through decoder and last sampling steps.

Axes: B batch, F frames, H, W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from Core.backbones import Backbone, EncodedPrompt
from Core.rewards import Reward, RewardOutput
from Core.sampling.frame_choice import check_decode_frame, choose_frames
from Core.sampling.gradient_window import first_gradient_step
from Core.training.rollout import Rollout, RolloutSettings
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .base import Objective


@dataclass(frozen=True, kw_only=True)
class RewardGradientSettings(RolloutSettings):
    """Keys of the reward-gradient objective."""

    decode_context: Literal["isolated", "causal"] = option(
        "isolated",
        "decode a scored frame from its latent frame alone (`isolated`, as in the reference), or as a frame of the "
        "finished video (`causal`)",
    )


class RewardGradient(Objective):
    """Sample with a gradient window, decode some frames, score them, and minimise the reward's loss."""

    settings_class = RewardGradientSettings

    def __init__(self, settings: RewardGradientSettings, backbone: Backbone, reward: Reward, seed: int):
        super().__init__(settings, backbone, reward, seed)
        self.rollout = Rollout(settings, backbone, seed)
        self.first_grad_step = 0

    @classmethod
    def config_errors(
        cls, settings: RewardGradientSettings, sampling_steps: int | None, latent_frames: int | None
    ) -> list[str]:
        errors = []
        try:
            if sampling_steps:
                mode, count = settings.backprop_mode, settings.backprop_steps
                first_gradient_step(mode, sampling_steps, lambda n: 0, count)
        except ValueError as error:
            errors.append(str(error))
        try:
            if latent_frames:
                check_decode_frame(settings.decode_frame, latent_frames)
        except ValueError as error:
            errors.append(str(error))
        return errors

    @classmethod
    def scored_frames(cls, settings: RewardGradientSettings, latent_frames: int) -> int:
        return choose_frames(settings.decode_frame, latent_frames, [torch.Generator()]).shape[1]

    def begin_step(self, step: int) -> None:
        self.first_grad_step = self.rollout.first_grad_step(step)

    def loss(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> RewardOutput:
        z, kl = self.rollout.sample(prompts, samples, self.first_grad_step, timer)
        index = self.rollout.frame_numbers(samples)
        frames = self.backbone.decode_frames(z, index, self.settings.decode_context)
        timer.lap("decode")
        reward = self.reward(frames, [encoded.prompt.reward_text for encoded in prompts])
        timer.lap("reward")
        self.frames = frames.detach()
        if kl is None:
            return reward
        loss = reward.loss + self.settings.kl_weight * kl
        return RewardOutput(reward.score, loss, {**reward.parts, "base_distance": kl.detach()})
