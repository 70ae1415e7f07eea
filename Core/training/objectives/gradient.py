"""What objectives that follow the reward's gradient share: predictions with a graph, their score, distance to the base.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, VideoSpec
from Core.rewards import Reward, RewardOutput
from Core.sampling.euler import Predict
from Core.sampling.frame_choice import check_decode_frame, count_frames
from Core.training.rollout import GuidedSettings, KlSettings, KlToBase, Rollout, RolloutSettings
from Core.utils.timing import Stopwatch

from .base import Objective, refuse_missing_gradient


@dataclass(frozen=True, kw_only=True)
class GradientSettings(RolloutSettings, GuidedSettings, KlSettings):
    """Keys that all objectives with the reward's gradient have."""


class GradientRollout(Rollout):
    """A rollout whose predictions keep a graph where one is recorded."""

    settings: GradientSettings

    def predictor(self, prompts: Sequence[EncodedPrompt]) -> tuple[Predict, KlToBase | None]:
        """Guided predictions, and the distance to the base model of those with a graph if ``kl_weight`` asks for it."""
        backbone, features, kl = self.backbone, self.features(prompts), None
        if self.settings.kl_weight:
            kl = KlToBase(backbone.denoiser, backbone.predictor(features, guided=False))
        predict = backbone.predictor(
            features,
            null_grad=self.settings.guidance_grad == "both",
            observe=kl.observe if kl else None,
        )
        return predict, kl


class GradientObjective(Objective):
    """An objective that backpropagates the reward of decoded frames."""

    rollout_class: type[GradientRollout] = GradientRollout
    settings: GradientSettings

    def __init__(self, settings: GradientSettings, backbone: Backbone, reward: Reward, seed: int):
        super().__init__(settings, backbone, reward, seed)
        self.rollout = self.rollout_class(settings, backbone, seed)

    @classmethod
    def config_errors(cls, settings: Any, sampling_steps: int | None, latent_frames: int | None) -> list[str]:
        errors = cls.step_errors(settings, sampling_steps) if sampling_steps else []
        try:
            if latent_frames:
                check_decode_frame(settings.decode_frame, latent_frames)
        except ValueError as error:
            errors.append(str(error))
        return errors

    @classmethod
    def count_scored_frames(cls, settings: Any, latent_frames: int, video: VideoSpec) -> int:
        return count_frames(settings.decode_frame, latent_frames, video.num_frames, video.fps)

    @classmethod
    def step_errors(cls, settings: Any, sampling_steps: int) -> list[str]:
        """What is wrong with keys that count sampling steps."""
        return []

    def score(
        self, z: Tensor, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> RewardOutput:
        """The reward of clean latents [B, C, T, h, w].

        Raises:
            ValueError: it has no gradient.
        """
        frames = self.rollout.frames(z, samples)
        timer.lap("decode")
        reward = self.reward(frames, [encoded.prompt.reward_text for encoded in prompts])
        refuse_missing_gradient(reward, frames)
        timer.lap("reward")
        self.frames = frames.detach()
        return reward

    def with_kl(self, reward: RewardOutput, kl: KlToBase | None) -> RewardOutput:
        """The reward whose loss has the distance to the base model added, and which logs it."""
        if kl is None:
            return reward
        distance = kl.per_sample()
        loss = reward.loss + self.settings.kl_weight * distance
        return RewardOutput(reward.score, loss, {**reward.parts, "base_distance": distance.detach()})
