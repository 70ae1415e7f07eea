"""The sampling loop. It knows a step, not a model.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, N sampling steps.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from rich.progress import track
from torch import Tensor

from Core.utils.terminal import console

# (latent before step i, i) → latent after it
Step = Callable[..., Tensor]
# Noise levels this near to 1 are pure noise: schedules reach it up to a rounding error, and UniPC's up to 1e-6.
ROUNDING = 1e-5


class Predict(Protocol):
    """A model's prediction at latent ``z`` [B, C, T, h, w] and timesteps ``t`` [B], shaped as ``z``.

    ``generated`` [B, T] bool marks the latent frames that are generated; None means all of them.
    """

    def __call__(self, z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor: ...


class Process(Protocol):
    """A diffusion process: how latents, noise and a model's prediction hang together at timesteps ``t`` [B].

    Samplers and objectives ask it, and never read a prediction themselves: what a model predicts, and with which
    sign, is known here alone. Latents, noise and predictions are [B, C, T, h, w].
    """

    num_timesteps: int

    def step(self, z: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The deterministic step of ``z`` from ``t`` to ``t_next``; 0 is data."""

    def stochastic_step(
        self, z: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B] of a Gaussian step with the deterministic steps' marginals."""

    def step_std(self, t: Tensor, t_next: Tensor, noise_level: float) -> Tensor:
        """That standard deviation, for timesteps of any shape; 0 where the step has no noise to draw."""

    def arrival(self, t: Tensor) -> Tensor:
        """Where the sampler's step towards ``t`` ends: ``t`` itself, or beside it where its schedule has it so."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of a clean latent."""

    def remove_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The clean latent of x_t whose noise is known; ``t`` below pure noise."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should predict at ``add_noise(x0, noise, t)``."""

    def timesteps_at(self, fraction: Tensor) -> Tensor:
        """Timesteps [B] at fractions of the time axis, 0 being data and 1 noise."""


class RectifiedFlow:
    """The straight path x_t = (1 − t/n) x_0 + (t/n) ε, where the model predicts the velocity x_0 − ε.

    Papers mostly write the opposite velocity, ε − x_0. The sign is turned in the methods of this class and nowhere
    else.

    Args:
        num_timesteps: n, the length of the time axis.
    """

    def __init__(self, num_timesteps: int = 1000):
        self.num_timesteps = num_timesteps

    def step(self, z: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Euler step of ``z`` from timesteps ``t`` [B] to ``t_next`` [B]."""
        return z + velocity * per_video((t - t_next) / self.num_timesteps)

    def stochastic_step(
        self, z: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B] of a step of the SDE whose marginals are the ODE's (Flow-GRPO).

        With s = t/n, its noise is σ = ``noise_level`` · √(s / (1 − s)), which the ODE's drift makes up for by
        σ²/(2s) times the noise estimate.
        """
        precise = torch.promote_types(z.dtype, torch.float32)
        t, t_next = t.to(precise), t_next.to(precise)
        level, std = t / self.num_timesteps, self.step_std(t, t_next, noise_level)
        noise = z - (1 - per_video(level)) * velocity
        mean = self.step(z, velocity, t, t_next) - per_video(std.square() / (2 * level)) * noise
        return mean, std

    def step_std(self, t: Tensor, t_next: Tensor, noise_level: float) -> Tensor:
        """σ times the root of the step's length; at pure noise, where σ is infinite, that of the step's end."""
        level, end = t / self.num_timesteps, t_next / self.num_timesteps
        inner = torch.where(level < 1 - ROUNDING, level, end)
        return noise_level * (inner / (1 - inner) * (level - end)).sqrt()

    def arrival(self, t: Tensor) -> Tensor:
        """``t`` itself: the time axis is continuous."""
        return t

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t at timesteps ``t`` [B]."""
        level = per_video(t / self.num_timesteps)
        return (1 - level) * x0 + level * noise

    def remove_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_0 of x_t at timesteps ``t`` [B] below n."""
        level = per_video(t / self.num_timesteps)
        return (z - level * noise) / (1 - level)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity of the straight path."""
        return x0 - noise

    def timesteps_at(self, fraction: Tensor) -> Tensor:
        """[B], the time axis being continuous."""
        return self.num_timesteps * fraction


def per_video(values: Tensor) -> Tensor:
    """[B] → [B, 1, 1, 1, 1], to go with latents."""
    return values[:, None, None, None, None]


def step_ends(process: Process, timesteps: Tensor) -> Tensor:
    """Timesteps [N, B] at which the steps from ``timesteps`` [N, B] end."""
    return process.arrival(torch.cat([timesteps[1:], torch.zeros_like(timesteps[:1])]))


class DenoisingStep:
    """One deterministic sampling step: predict, then follow the process.

    Args:
        timesteps: [N, B], falling.
        detach_input: the model sees a detached latent, so that gradients reach earlier steps through the sum
            alone (DRTune, Wu et al., 2024).
    """

    def __init__(self, predict: Predict, process: Process, timesteps: Tensor, detach_input: bool = False):
        self.predict, self.process, self.timesteps = predict, process, timesteps
        self.next_timesteps = step_ends(process, timesteps)
        self.detach_input = detach_input

    def __call__(self, z: Tensor, i: int, generated: Tensor | None = None) -> Tensor:
        t = self.timesteps[i]
        prediction = self.predict(z.detach() if self.detach_input else z, t, generated)
        return self.process.step(z, prediction, t, self.next_timesteps[i])


def run_steps(step: Step, z: Tensor, start: int, stop: int, progress: bool = False) -> Tensor:
    """Sampling steps ``start`` to before ``stop``, from latent ``z``."""
    for i in track(range(start, stop), "sampling", console=console, transient=True, disable=not progress):
        z = step(z, i)
    return z
