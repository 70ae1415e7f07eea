"""Families that are sampled with DDIM, on the noise levels of a scheduler of diffusers.

Axes: N sampling steps.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from Core.sampling.ddim import DDIM, NOISE_LEVELS

from .diffusers_base import DiffusersBackbone


class DdimFamily(DiffusersBackbone):
    """A family whose process and timesteps are those of its scheduler."""

    key_bounds = {"noise_level": NOISE_LEVELS}

    @abstractmethod
    def _scheduler(self) -> Any:
        """The scheduler of diffusers, as the checkpoint configures it."""

    def load(self) -> None:
        super().load()
        self.process = DDIM.from_scheduler(self._set_scheduler())

    def _set_scheduler(self) -> Any:
        """The same with its timesteps set."""
        scheduler = self._scheduler()
        scheduler.set_timesteps(self.settings.num_sampling_steps)
        return scheduler

    def timesteps(self, batch: int) -> Tensor:
        # diffusers counts noise levels from 0, where DDIM has data.
        return (self._set_scheduler().timesteps + 1.0)[:, None].expand(-1, batch).to(self.device)
