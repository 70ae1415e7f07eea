"""Reward gradient (VADER, Prabhudesai et al., 2024): backpropagate the reward through decoder and last sampling steps.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt
from Core.rewards import Reward, RewardOutput
from Core.sampling.euler import DenoisingStep, run_steps
from Core.sampling.gradient_window import first_gradient_step, thin_no_grad_steps
from Core.training.rollout import KlToBase
from Core.utils import rng
from Core.utils.options import option
from Core.utils.timing import Stopwatch

from .gradient import GradientObjective, GradientRollout, GradientSettings


@dataclass(frozen=True, kw_only=True)
class RewardGradientSettings(GradientSettings):
    """Keys of the reward-gradient objective."""

    backprop_mode: Literal["last", "rand", "specific"] = option(
        "last",
        "sampling steps that keep gradients: the `last` ones, from a uniformly drawn step on (`rand`), or from step 15 "
        "on (`specific`)",
    )
    backprop_steps: int = option(1, "number of gradient steps of backprop_mode `last`", minimum=1)
    detach_input: bool = option(False, "stop the gradient at each step's latent input (DRTune)")
    prefix_steps: int | None = option(
        None, "number of no-gradient steps, spread evenly over those of the schedule; None = all", minimum=1
    )


class WindowRollout(GradientRollout):
    """Sampling with a gradient window."""

    settings: RewardGradientSettings

    def first_grad_step(self, step: int) -> int:
        """First sampling step with a gradient; one draw per optimiser step, the same on every process."""
        generator = rng.generator(self.seed, "window", step)
        return first_gradient_step(
            self.settings.backprop_mode,
            len(self.backbone.timesteps(1)),
            lambda n: int(torch.randint(n, (), generator=generator)),
            self.settings.backprop_steps,
        )

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        samples: Sequence[int],
        first_grad_step: int,
        timer: Stopwatch,
    ) -> tuple[Tensor, KlToBase | None]:
        """Latents [B, C, T, h, w] whose graph begins at step ``first_grad_step``, and their distance to the base model.

        There is no distance unless ``kl_weight`` asks for it.
        """
        timesteps, first = thin_no_grad_steps(
            self.backbone.timesteps(len(samples)), first_grad_step, self.settings.prefix_steps
        )
        predict, kl = self.predictor(prompts)
        step = DenoisingStep(predict, self.backbone.process, timesteps, self.settings.detach_input)
        with torch.no_grad(), self.backbone.no_grad_steps():
            z = run_steps(step, self.noise(samples), 0, first)
        timer.lap("prefix")
        z = run_steps(step, z, first, len(timesteps))
        timer.lap("gradient_steps")
        return z, kl


class RewardGradient(GradientObjective):
    """Sample with a gradient window, decode some frames, score them, and minimise the reward's loss."""

    settings_class = RewardGradientSettings
    rollout_class = WindowRollout
    rollout: WindowRollout

    def __init__(self, settings: RewardGradientSettings, backbone: Backbone, reward: Reward, seed: int):
        super().__init__(settings, backbone, reward, seed)
        self.first_grad_step = 0

    @classmethod
    def step_errors(cls, settings: RewardGradientSettings, sampling_steps: int) -> list[str]:
        try:
            first_gradient_step(settings.backprop_mode, sampling_steps, lambda n: 0, settings.backprop_steps)
        except ValueError as error:
            return [str(error)]
        return []

    def begin_step(self, step: int) -> None:
        self.first_grad_step = self.rollout.first_grad_step(step)

    def loss(
        self, prompts: Sequence[EncodedPrompt], samples: Sequence[int], timer: Stopwatch
    ) -> RewardOutput:
        z, kl = self.rollout.sample(prompts, samples, self.first_grad_step, timer)
        return self.with_kl(self.score(z, prompts, samples, timer), kl)
