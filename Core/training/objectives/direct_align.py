"""Direct-Align (SRPO, Shen et al., 2025, arXiv:2509.06942): reward gradients at any noise level from a single step.

A finished video is noised with known noise; one short denoising step keeps a graph; what is left of the known noise is
taken away exactly, so that only the step's own error stays. Its reward is followed at several levels per video, weighed
in favour of little noise.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from Core.backbones import EncodedPrompt
from Core.rewards import RewardOutput
from Core.sampling.euler import Predict
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .gradient import GradientObjective, GradientSettings


@dataclass(frozen=True, kw_only=True)
class DirectAlignSettings(GradientSettings):
    """Keys of Direct-Align."""

    levels_per_video: int = option(2, "random noise levels per video", minimum=1)
    align_width: float = option(
        0.1, "width of the denoising step, as a share of the time axis", above=0, below=1
    )
    level_decay: float = option(
        1.0, "weight noise level s, in [0, 1], by exp(−this × s); 0 weights all equally", minimum=0
    )


class DirectAlign(GradientObjective):
    """One denoising step from known noise."""

    settings_class = DirectAlignSettings
    settings: DirectAlignSettings

    def losses(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> Iterator[RewardOutput]:
        predict, _ = self.rollout.predictor(prompts)
        x0 = self.rollout.finished(predict, samples)
        timer.lap("prefix")
        for number in range(self.settings.levels_per_video):
            yield self.aligned(x0, prompts, samples, number, timer)

    def aligned(
        self,
        x0: Tensor,
        prompts: Sequence[EncodedPrompt],
        samples: Sequence[int],
        number: int,
        timer: Stopwatch,
    ) -> RewardOutput:
        """The mean's share of the level with this number of each video."""
        level = self.levels(samples, number).to(x0.device)
        noise = self.rollout.normal("align", samples, number)
        predict, kl = self.rollout.predictor(prompts)
        z = self.denoised(predict, x0, noise, level)
        timer.lap("gradient_steps")
        reward = self.score(z, prompts, samples, timer)
        weighed = torch.exp(-self.settings.level_decay * level) * reward.loss
        output = self.with_kl(RewardOutput(reward.score, weighed, reward.parts), kl)
        return RewardOutput(output.score, output.loss / self.settings.levels_per_video, output.parts)

    def levels(self, samples: Sequence[int], number: int) -> Tensor:
        """Noise levels [B], uniform where a whole step fits."""
        width = self.settings.align_width
        return (width + (1 - width) * self.rollout.uniform("level", samples, number)).float()

    def denoised(self, predict: Predict, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The clean latents after one step from ``level`` [B], and their known noise taken away."""
        process = self.backbone.process
        t = process.timesteps_at(level)
        t_next = process.timesteps_at((level - self.settings.align_width).clamp_min(0))
        z = process.add_noise(x0, noise, t)
        return process.remove_noise(process.step(z, predict(z, t), t, t_next), noise, t_next)
