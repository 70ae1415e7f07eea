"""Rectified-flow maths of Open-Sora 1.2 (Liu et al., 2022; timestep transform after Esser et al., 2024).

A timestep t in [0, 1000] mixes data and noise: x_t = (1 − t/1000) · x_0 + (t/1000) · noise. The network
predicts the velocity x_0 − noise.
"""

import torch
from torch import Tensor
from torch.distributions import LogisticNormal

BASE_PIXELS = 512 * 512
CHUNK_FRAMES, CHUNK_LATENT_FRAMES = 17, 5


def timestep_transform(
    t: Tensor,
    model_kwargs: dict[str, Tensor],
    base_resolution: int = BASE_PIXELS,
    base_num_frames: int = 1,
    scale: float = 1.0,
    num_timesteps: int = 1,
) -> Tensor:
    """Shift timesteps towards noise for larger videos, which keep their content under more of it.

    Args:
        t: [B] in [0, num_timesteps].
        model_kwargs: ``height``, ``width`` (pixels) and ``num_frames`` of the video, each [B].
    """
    info = {key: model_kwargs[key].to(t.device) for key in ("height", "width", "num_frames")}
    frames = info["num_frames"]
    latent_frames = torch.where(frames == 1, 1, frames // CHUNK_FRAMES * CHUNK_LATENT_FRAMES)
    space = (info["height"] * info["width"] / base_resolution).sqrt()
    ratio = space * (latent_frames / base_num_frames).sqrt() * scale
    u = t / num_timesteps
    return ratio * u / (1 + (ratio - 1) * u) * num_timesteps


class RFlowScheduler:
    """Draws training timesteps, mixes data with noise, and computes the rectified-flow loss.

    Args:
        num_timesteps: length of the time axis.
        num_sampling_steps: kept for samplers that read it here.
        use_discrete_timesteps: draw whole numbers only.
        sample_method: ``uniform`` or ``logit-normal`` (with ``loc`` and ``scale``).
        use_timestep_transform: apply ``timestep_transform`` with ``transform_scale``.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        num_sampling_steps: int = 10,
        use_discrete_timesteps: bool = False,
        sample_method: str = "uniform",
        loc: float = 0.0,
        scale: float = 1.0,
        use_timestep_transform: bool = False,
        transform_scale: float = 1.0,
    ):
        if sample_method not in ("uniform", "logit-normal"):
            raise ValueError(f"sample_method must be 'uniform' or 'logit-normal', got {sample_method!r}")
        if use_discrete_timesteps and sample_method != "uniform":
            raise ValueError("use_discrete_timesteps needs sample_method='uniform'")
        self.num_timesteps = num_timesteps
        self.num_sampling_steps = num_sampling_steps
        self.use_discrete_timesteps = use_discrete_timesteps
        self.sample_method = sample_method
        self.logit_normal = LogisticNormal(torch.tensor([loc]), torch.tensor([scale]))
        self.use_timestep_transform = use_timestep_transform
        self.transform_scale = transform_scale

    def sample_timesteps(self, batch: int, device: torch.device, model_kwargs: dict | None = None) -> Tensor:
        """[batch] random timesteps."""
        if self.use_discrete_timesteps:
            t = torch.randint(0, self.num_timesteps, (batch,), device=device).float()
        elif self.sample_method == "uniform":
            t = torch.rand(batch, device=device) * self.num_timesteps
        else:
            t = self.logit_normal.sample((batch,))[:, 0].to(device) * self.num_timesteps
        if self.use_timestep_transform:
            t = timestep_transform(
                t, model_kwargs or {}, scale=self.transform_scale, num_timesteps=self.num_timesteps
            )
        return t

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of samples [B, C, T, H, W] at timesteps [B]."""
        u = (timesteps.float() / self.num_timesteps).view(-1, *[1] * (original_samples.dim() - 1))
        return (1 - u) * original_samples + u * noise

    def training_losses(
        self,
        model,
        x_start: Tensor,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        t: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Squared velocity error per sample.

        Args:
            x_start: latents [B, C, T, H, W].
            mask: [B, T] bool; False frames are given clean and do not count.
            weights: [B], factor of each sample's loss.
            t: [B] timesteps; drawn when None.

        Returns:
            ``{"loss": [B]}``.
        """
        model_kwargs = model_kwargs or {}
        if t is None:
            t = self.sample_timesteps(x_start.shape[0], x_start.device, model_kwargs)
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.add_noise(x_start, noise, t)
        if mask is not None:
            x_t = torch.where(mask[:, None, :, None, None], x_t, x_start)
            model_kwargs = {**model_kwargs, "x_mask": mask}
        velocity = model(x_t, t, **model_kwargs)[:, : x_start.shape[1]]
        error = (velocity - (x_start - noise)).square().mean(dim=(1, 3, 4))
        loss = error.mean(1) if mask is None else (error * mask).sum(1) / mask.sum(1).clamp(min=1)
        return {"loss": loss if weights is None else loss * weights}
