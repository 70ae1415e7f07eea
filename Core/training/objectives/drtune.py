"""DRTune (Wu et al., 2024, arXiv:2405.00760): gradients at steps spread over the whole trajectory.

Each of them sees a detached latent, so that its gradient reaches the finished video through the sampler's sum alone,
and the steps between need no graph. A trajectory may end early, at a random step from which one jump leads to the
clean latent.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from Core.backbones import EncodedPrompt
from Core.rewards import RewardOutput
from Core.sampling.euler import DenoisingStep, Predict
from Core.utils import rng
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .gradient import GradientObjective, GradientSettings


@dataclass(frozen=True, kw_only=True)
class DRTuneSettings(GradientSettings):
    """Keys of DRTune."""

    grad_steps: int = option(3, "sampling steps with a gradient, evenly spread", minimum=1)
    early_stop_steps: int = option(
        0, "end the trajectory up to this many sampling steps early, by a jump to the clean latent", minimum=0
    )


class DRTune(GradientObjective):
    """A few steps with a graph among many without."""

    settings_class = DRTuneSettings
    settings: DRTuneSettings
    steps_taken = 0  # of the current training step
    grad_steps: frozenset[int] = frozenset()

    @classmethod
    def step_errors(cls, settings: DRTuneSettings, sampling_steps: int) -> list[str]:
        wanted = settings.grad_steps + settings.early_stop_steps
        if wanted <= sampling_steps:
            return []
        return [
            f"grad_steps + early_stop_steps must be at most the {sampling_steps} sampling steps, got {wanted}"
        ]

    def begin_step(self, step: int) -> None:
        generator = rng.generator(self.seed, "drtune", step)
        cut = int(torch.randint(self.settings.early_stop_steps + 1, (), generator=generator))
        self.steps_taken = len(self.backbone.timesteps(1)) - cut
        count, stride = self.settings.grad_steps, self.steps_taken // self.settings.grad_steps
        first = int(torch.randint(self.steps_taken - (count - 1) * stride, (), generator=generator))
        self.grad_steps = frozenset(range(first, first + count * stride, stride))

    def loss(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> RewardOutput:
        predict, kl = self.rollout.predictor(prompts)
        z = self.sample(predict, samples)
        timer.lap("gradient_steps")
        return self.with_kl(self.score(z, prompts, samples, timer), kl)

    def sample(self, predict: Predict, samples: Sequence[int]) -> Tensor:
        """Clean latents [B, C, T, h, w] whose graph holds the steps of ``grad_steps``."""
        # The last of the steps taken leads to 0, however early it comes.
        timesteps = self.backbone.timesteps(len(samples))[: self.steps_taken]
        with_graph = DenoisingStep(predict, self.backbone.process, timesteps, detach_input=True)
        without = DenoisingStep(self.without_graph(predict), self.backbone.process, timesteps)
        z = self.rollout.noise(samples)
        for i in range(self.steps_taken):
            z = (with_graph if i in self.grad_steps else without)(z, i)
        return z

    def without_graph(self, predict: Predict) -> Predict:
        """The same predictions, as constants."""

        @torch.no_grad()
        def constant(z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
            with self.backbone.no_grad_steps():
                return predict(z, t, generated)

        return constant
