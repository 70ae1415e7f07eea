"""Diffusion with a table of noise levels, and its deterministic steps (DDIM, Song et al., 2021).

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from Core.utils.options import Bounds

from .euler import per_video

PREDICTION_TYPES = ("epsilon", "v_prediction")
# η of a stochastic step. Above 1 a step from pure noise would draw more noise than the next level holds; a step from a
# lower level leaves a little room, which no run can use at all of its steps.
NOISE_LEVELS = Bounds(minimum=0, maximum=1)


class DDIM:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, where the model predicts ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0.

    As in ``RectifiedFlow``, timestep 0 is data and n the noisiest level. diffusers counts its n levels from 0, so a
    timestep here is one above that of its scheduler and of its models.

    Args:
        alphas_cumprod: ᾱ [n] as diffusers has it, falling. 0 in its last place is pure noise (zero terminal SNR).
        final_alpha: ᾱ of data.
        prediction_type: ``epsilon`` or ``v_prediction``.
        arrivals: timestep of the sampler → where the step before it ends, if beside it.

    Raises:
        ValueError: another prediction type, or ``epsilon`` where a level is pure noise, which says nothing of x_0.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        final_alpha: float = 1.0,
        prediction_type: str = "epsilon",
        arrivals: Mapping[int, int] | None = None,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be {' or '.join(PREDICTION_TYPES)}, got {prediction_type!r}; choose a scheduler "
                "of that kind"
            )
        if prediction_type == "epsilon" and not alphas_cumprod.all():
            raise ValueError(
                "prediction_type 'epsilon' cannot start from pure noise (rescale_betas_zero_snr); set one or the other"
            )
        self.num_timesteps = len(alphas_cumprod)
        self.prediction_type = prediction_type
        levels = alphas_cumprod.double().cpu()
        self.alphas_cumprod = torch.cat([levels.new_tensor([final_alpha]), levels])
        self.arrivals = torch.arange(self.num_timesteps + 1)
        for t, end in (arrivals or {}).items():
            self.arrivals[t] = end

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "DDIM":
        """The process of a DDIM-like scheduler of diffusers with its timesteps set, whose clipping of x_0 is left out.

        Its steps go down by a fixed number of levels, so that they end beside the next timestep where the levels do not
        divide evenly.

        Raises:
            ValueError: it predicts something else.
        """
        timesteps = [int(t) + 1 for t in scheduler.timesteps]
        stride = len(scheduler.alphas_cumprod) // len(timesteps)
        return cls(
            scheduler.alphas_cumprod,
            float(scheduler.final_alpha_cumprod),
            scheduler.config.prediction_type,
            {end: max(0, t - stride) for t, end in zip(timesteps, [*timesteps[1:], 0], strict=True)},
        )

    def arrival(self, t: Tensor) -> Tensor:
        """Where the sampler's step towards timesteps ``t`` of any shape ends."""
        self.arrivals = self.arrivals.to(t.device)
        return self.arrivals[t.round().long()].to(t.dtype)

    def step(self, z: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Step of ``z`` from timesteps ``t`` [B] to ``t_next`` [B] along the noise that is predicted."""
        x0, noise = self._parts(z, t, prediction)
        return self.add_noise(x0, noise, t_next)

    def stochastic_step(
        self, z: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B] of a step that draws part of the noise anew.

        Args:
            noise_level: η of DDIM: 0 is the deterministic step, 1 that of DDPM.

        Raises:
            ValueError: a noise level above 1, where the marginals are no longer the process's.
        """
        if errors := NOISE_LEVELS.errors("noise_level", noise_level):
            raise ValueError(errors[0])
        std, alpha_next = self.step_std(t, t_next, noise_level), self._alpha(t_next)
        x0, noise = self._parts(z, t, prediction)
        kept = (1 - alpha_next - std.square()).clamp_min(0).sqrt()
        mean = _scaled(alpha_next.sqrt(), x0) + _scaled(kept, noise)
        return mean, std.to(z)

    def step_std(self, t: Tensor, t_next: Tensor, noise_level: float) -> Tensor:
        """η times DDPM's, in float64. A step to data draws as one to the lowest level, and from there nothing."""
        alpha, drawn = self._alpha(t), self._alpha(t_next.clamp_min(1))
        return noise_level * ((1 - drawn) / (1 - alpha) * (1 - alpha / drawn)).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t at timesteps ``t`` [B]."""
        signal, spread = self._scales(t)
        return _scaled(signal, x0) + _scaled(spread, noise)

    def remove_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_0 of x_t at timesteps ``t`` [B] that are not pure noise."""
        signal, spread = self._scales(t)
        return _scaled(1 / signal, z - _scaled(spread, noise))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should predict at ``add_noise(x0, noise, t)``."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._scales(t)
        return _scaled(signal, noise) - _scaled(spread, x0)

    def timesteps_at(self, fraction: Tensor) -> Tensor:
        """Whole timesteps [B] at or above fractions of the time axis, 0 being data and 1 the noisiest level."""
        return (self.num_timesteps * fraction).ceil()

    def _parts(self, z: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latent and noise of ``z`` by a prediction, which may be of a lower precision."""
        prediction = prediction.to(z.dtype)
        if self.prediction_type == "epsilon":
            return self.remove_noise(z, prediction, t), prediction
        signal, spread = self._scales(t)
        x0 = _scaled(signal, z) - _scaled(spread, prediction)
        return x0, _scaled(signal, prediction) + _scaled(spread, z)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ) [B]."""
        alpha = self._alpha(t)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def _alpha(self, t: Tensor) -> Tensor:
        """ᾱ [B] in float64."""
        self.alphas_cumprod = self.alphas_cumprod.to(t.device)
        return self.alphas_cumprod[t.round().long()]


def _scaled(scale: Tensor, x: Tensor) -> Tensor:
    """``x`` [B, …] times ``scale`` [B], in its own dtype."""
    return per_video(scale).to(x.dtype) * x
