"""LeapAlign (arXiv:2604.15311): reach any sampling step through two leaps over the trajectory.

The video is sampled without a graph. From its latent at a random time k one leap leads to a random time j < k, another
to the finished video. Each leap's end takes the value of the real latent and keeps the leap's gradient, so that the
reward is the real video's, and two network evaluations keep a graph whatever the number of steps.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from Core.backbones import EncodedPrompt
from Core.rewards import RewardOutput
from Core.sampling.euler import DenoisingStep, per_video
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .gradient import GradientObjective, GradientSettings


@dataclass(frozen=True, kw_only=True)
class LeapSettings(GradientSettings):
    """Keys of LeapAlign."""

    nested_grad: float = option(
        1.0,
        "share of the gradient that passes through the second leap's network to the first leap",
        minimum=0,
        maximum=1,
    )
    leap_error_weight: float = option(
        1.0,
        "weight a video by exp(−this × relative squared error of its leaps); 0 weights all videos equally",
        minimum=0,
    )


class Leap(GradientObjective):
    """Two leaps with a graph over a trajectory without one."""

    settings_class = LeapSettings
    settings: LeapSettings

    @classmethod
    def step_errors(cls, settings: LeapSettings, sampling_steps: int) -> list[str]:
        if sampling_steps > 1:
            return []
        return ["objective='leap' leaps from one sampling step to another; take at least 2 sampling steps"]

    def loss(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> RewardOutput:
        timesteps = self.backbone.timesteps(len(samples))
        steps = self.leap_steps(samples, len(timesteps))
        predict, kl = self.rollout.predictor(prompts)
        start, middle, end = self.trajectory(
            DenoisingStep(predict, self.backbone.process, timesteps), samples, steps
        )
        timer.lap("prefix")
        t_start, t_middle = timesteps.gather(0, steps.to(timesteps.device))
        process, share = self.backbone.process, self.settings.nested_grad
        leap = process.step(start, predict(start, t_start), t_start, process.arrival(t_middle))
        reached = connect(middle, leap)
        seen = share * reached + (1 - share) * reached.detach()
        finish = process.arrival(torch.zeros_like(t_middle))
        last_leap = process.step(reached, predict(seen, t_middle), t_middle, finish)
        z = connect(end, last_leap)
        timer.lap("gradient_steps")
        reward = self.score(z, prompts, samples, timer)
        error = (relative_error(leap, middle) + relative_error(last_leap, end)) / 2
        weight = torch.exp(-self.settings.leap_error_weight * error)
        parts = {**reward.parts, "leap_error": error}
        return self.with_kl(RewardOutput(reward.score, weight * reward.loss, parts), kl)

    def leap_steps(self, samples: Sequence[int], count: int) -> Tensor:
        """[2, B]: for each video two different sampling steps, in order."""
        drawn = [torch.randperm(count, generator=g)[:2] for g in self.rollout.generators("leap", samples)]
        return torch.stack(drawn, dim=1).sort(dim=0).values

    @torch.no_grad()
    def trajectory(
        self, step: DenoisingStep, samples: Sequence[int], steps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents before each video's two ``steps``, and the finished ones."""
        z = self.rollout.noise(samples)
        first, second, steps = z, z, steps.to(z.device)
        with self.backbone.no_grad_steps():
            for i in range(len(step.timesteps)):
                begins, goes_on = steps == i
                first = torch.where(per_video(begins), z, first)
                second = torch.where(per_video(goes_on), z, second)
                z = step(z, i)
        return first, second, z


def connect(real: Tensor, leap: Tensor) -> Tensor:
    """The value of ``real`` with the gradient of ``leap``."""
    return real + (leap - leap.detach())


def relative_error(leap: Tensor, real: Tensor) -> Tensor:
    """[B]: squared error of a leap relative to the squared norm of the latent it should have reached; no gradient."""
    error = (leap.detach() - real).square().flatten(1).sum(1)
    return error / real.square().flatten(1).sum(1)
