"""The sampling loop. It knows a velocity function, not a model.

Axes: B batch, C channels, T latent frames, H rows, W columns, N sampling steps.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm


class Velocity(Protocol):
    """dz/dt towards data at latent ``z`` [B, C, T, H, W] and timesteps ``t`` [B].

    ``generated`` [B, T] bool marks the frames that are generated; None means all of them.
    """

    def __call__(self, z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor: ...


def euler_sample(
    velocity: Velocity,
    z: Tensor,
    timesteps: Tensor,
    *,
    first_gradient_step: int | None = None,
    num_timesteps: int = 1000,
    mask: Tensor | None = None,
    noise_like: Callable[[Tensor], Tensor] = torch.randn_like,
    detach_input: bool = False,
    prefix: AbstractContextManager = nullcontext(),  # noqa: B008 (holds nothing)
    progress: bool = False,
) -> Tensor:
    """Integrate from noise to data: z ← z + v · (t_i − t_{i+1}) / num_timesteps.

    Args:
        z: noise [B, C, T, H, W]; frames that ``mask`` keeps hold their clean latents.
        timesteps: [N, B], falling.
        first_gradient_step: from this step on the graph is kept; earlier steps, or all when None, run
            without one.
        mask: [B, T] in [0, 1]: 1 generates a frame, 0 keeps it, a value in between keeps it until the noise
            level falls below that value.
        noise_like: draws the noise that a kept frame receives when it starts to be generated.
        detach_input: the velocity sees a detached latent, so that gradients reach earlier steps through the
            sum alone (DRTune, Wu et al., 2024).
        prefix: context in which the steps before the first gradient step run.
    """
    steps = len(timesteps)
    first = steps if first_gradient_step is None else first_gradient_step
    if mask is not None and bool((mask == 1).all()):
        mask = None
    following = torch.cat([timesteps[1:], torch.zeros_like(timesteps[:1])])
    widths = ((timesteps - following) / num_timesteps)[..., None, None, None, None]
    noised: Any = None if mask is None else mask == 1

    def advance(z: Tensor, i: int) -> Tensor:
        nonlocal noised
        generated = None
        if mask is not None:
            # A shifted first timestep may lie above num_timesteps by a rounding error: 1 generates regardless.
            generated = (mask == 1) | (mask * num_timesteps >= timesteps[i][:, None])
            z = _add_noise(z, timesteps[i] / num_timesteps, generated & ~noised, noise_like)
            noised = generated
        v = velocity(z.detach() if detach_input else z, timesteps[i], generated)
        moved = z + v * widths[i]
        return moved if generated is None else torch.where(_per_frame(generated), moved, z)

    with tqdm(total=steps, desc="sampling", disable=not progress, leave=False) as bar:
        with torch.no_grad(), prefix:
            for i in range(first):
                z = advance(z, i)
                bar.update()
        with torch.enable_grad():
            for i in range(first, steps):
                z = advance(z, i)
                bar.update()
    return z


def _add_noise(z: Tensor, level: Tensor, frames: Tensor, noise_like: Callable[[Tensor], Tensor]) -> Tensor:
    """Mix noise of ``level`` [B] into the chosen ``frames`` [B, T]; drawn every step, as upstream does."""
    level = level[:, None, None, None, None]
    return torch.where(_per_frame(frames), (1 - level) * z + level * noise_like(z), z)


def _per_frame(flags: Tensor) -> Tensor:
    return flags[:, None, :, None, None]
