"""Latent frames that are given and not generated.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .euler import DenoisingStep


class KeptFrames:
    """A sampling step that leaves the given frames of the latent as they are.

    Args:
        mask: [B, T] in [0, 1]: 1 generates a frame, 0 keeps it, a value in between keeps it until the noise level
            falls below that value.
        noise_like: draws the noise that a kept frame receives when it starts to be generated.
    """

    def __init__(
        self,
        step: DenoisingStep,
        mask: Tensor,
        noise_like: Callable[[Tensor], Tensor] = torch.randn_like,
    ):
        self.step, self.mask, self.noise_like = step, mask, noise_like
        self.noised = mask == 1

    def __call__(self, z: Tensor, i: int) -> Tensor:
        t = self.step.timesteps[i]
        # A shifted first timestep may lie above num_timesteps by a rounding error: 1 generates regardless.
        generated = (self.mask == 1) | (self.mask * self.step.process.num_timesteps >= t[:, None])
        # Noise is drawn at every step, as upstream does.
        noised = self.step.process.add_noise(z, self.noise_like(z), t)
        z = torch.where(_per_frame(generated & ~self.noised), noised, z)
        self.noised = generated
        return torch.where(_per_frame(generated), self.step(z, i, generated), z)


def keep_frames(
    step: DenoisingStep, mask: Tensor | None, noise_like: Callable[[Tensor], Tensor] = torch.randn_like
) -> DenoisingStep | KeptFrames:
    """``step`` with a conditioning mask; a mask that keeps no frame costs nothing."""
    return step if mask is None or bool((mask == 1).all()) else KeptFrames(step, mask, noise_like)


def _per_frame(flags: Tensor) -> Tensor:
    return flags[:, None, :, None, None]
