"""Exponential moving average of the adapter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Follows ``parameters`` with ``average ← decay · average + (1 − decay) · parameter``.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the first steps are not
    averaged with the untrained adapter for long.

    Args:
        decay: in (0, 1); the average looks back about 1 / (1 − decay) steps.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters = dict(parameters)
        self.decay = decay
        self.updates = 0
        self.average = {key: p.detach().clone() for key, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, parameter in self.parameters.items():
            self.average[key].lerp_(parameter, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters hold the average."""
        own = {key: p.detach().clone() for key, p in self.parameters.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for key, parameter in self.parameters.items():
            parameter.copy_(values[key])
        torch.clear_autocast_cache()  # which holds casts of the values before

    def state(self) -> dict:
        return {"updates": self.updates, "average": {k: v.cpu() for k, v in self.average.items()}}

    def load(self, state: dict) -> None:
        self.updates = state["updates"]
        for key, value in state["average"].items():
            self.average[key].copy_(value)
