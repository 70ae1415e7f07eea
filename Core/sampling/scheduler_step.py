"""Sampling steps of a scheduler of diffusers, for finished videos: no gradient passes through them."""

from typing import Any

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
