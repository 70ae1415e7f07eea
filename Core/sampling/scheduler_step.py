"""Sampling steps of a scheduler of diffusers, for finished videos: no gradient passes through them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .euler import Predict


class SchedulerStep:
    """A multistep sampler in place of the Euler step.

    Args:
        predict: in the convention of ``RectifiedFlow``, whose velocity is the opposite of diffusers'.
        scheduler: of diffusers, with its timesteps set; keeps the steps before, so it serves one video batch.
        batch: videos at once.
    """

    def __init__(self, predict: Predict, scheduler: Any, batch: int):
        self.predict, self.scheduler = predict, scheduler
        self.timesteps = scheduler.timesteps[:, None].expand(-1, batch)

    def __call__(self, z: Tensor, i: int) -> Tensor:
        velocity = -self.predict(z, self.timesteps[i])
        return self.scheduler.step(velocity, self.scheduler.timesteps[i], z, return_dict=False)[0]


class DpmStep:
    """CogVideoX's DPM-Solver++ (2M), an SDE solver that draws noise at every step.

    Args:
        predict: in the convention of ``DDIM``.
        scheduler: ``CogVideoXDPMScheduler`` with its timesteps set.
        generators: of each video's noise, on the CPU.
    """

    def __init__(self, predict: Predict, scheduler: Any, generators: Sequence[torch.Generator]):
        self.predict, self.scheduler, self.generators = predict, scheduler, list(generators)
        # diffusers counts noise levels from 0, where DDIM has data.
        self.timesteps = (scheduler.timesteps + 1.0)[:, None].expand(-1, len(generators))
        self.x0: Tensor | None = None  # what the step before predicted

    def __call__(self, z: Tensor, i: int, generated: Tensor | None = None) -> Tensor:
        levels = self.scheduler.timesteps
        prediction = self.predict(z, self.timesteps[i].to(z.device))
        # Time first, as the pipeline has it: the noise is drawn in this layout.
        moved, self.x0 = self.scheduler.step(
            prediction.transpose(1, 2),
            self.x0,
            levels[i],
            levels[i - 1] if i else None,
            z.transpose(1, 2),
            generator=self.generators,
        )
        return moved.transpose(1, 2)
