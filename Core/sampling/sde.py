"""Stochastic sampling: Gaussian steps whose probabilities are known, beside the deterministic loop.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, N sampling steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from Core.sampling.euler import DenoisingStep, Predict, Process, per_video


@dataclass(frozen=True)
class Gaussian:
    """Independent normals with one deviation for a whole latent.

    Log-probabilities and divergences are means over a latent's elements, as in Flow-GRPO: sums would make the ratio
    of two policies overflow any clip range as videos grow.

    Attributes:
        mean: [B, C, T, h, w].
        std: [B].
    """

    mean: Tensor
    std: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """The sample that standard normal ``noise`` stands for."""
        return self.mean + per_video(self.std) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """[B], per element."""
        deviation = (z - self.mean) / per_video(self.std)
        return -0.5 * deviation.square().flatten(1).mean(1) - self.std.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, other: "Gaussian") -> Tensor:
        """KL divergence [B] to another one of the same deviation, per element."""
        distance = ((self.mean - other.mean) / per_video(self.std)).square()
        return 0.5 * distance.flatten(1).mean(1)


class StochasticStep(DenoisingStep):
    """One step of the SDE that has the deterministic sampler's marginals.

    Args:
        noise_level: how much noise is added, relative to √(s / (1 − s)) at noise level s.
        noise: step number → standard normal [B, C, T, h, w].
    """

    def __init__(
        self,
        predict: Predict,
        process: Process,
        timesteps: Tensor,
        noise_level: float,
        noise: Callable[[int], Tensor],
    ):
        super().__init__(predict, process, timesteps)
        self.noise_level, self.noise = noise_level, noise

    def distribution(self, z: Tensor, i: int) -> Gaussian:
        """Where step ``i`` may lead from latent ``z``."""
        t = self.timesteps[i]
        prediction = self.predict(z, t)
        return Gaussian(
            *self.process.stochastic_step(z, prediction, t, self.next_timesteps[i], self.noise_level)
        )

    def __call__(self, z: Tensor, i: int, generated: Tensor | None = None) -> Tensor:
        return self.distribution(z, i).at(self.noise(i))
