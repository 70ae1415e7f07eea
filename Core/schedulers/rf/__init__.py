"""Rectified-flow sampling with a gradient window, under the names upstream Open-Sora uses.

A patched upstream checkout imports this module from its own ``opensora.schedulers``, and so in the middle of
importing ``Core.backbones.opensora``; what is needed of that is therefore imported when it is called.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from Core.sampling.euler import Velocity, euler_sample
from Core.sampling.gradient_window import BACKPROP_MODES, first_gradient_step, thin_prefix
from opensora.registry import SCHEDULERS

__all__ = ["BACKPROP_MODES", "RFLOW", "Velocity", "euler_sample", "first_gradient_step", "thin_prefix"]


@SCHEDULERS.register_module("rflow")
class RFLOW:
    """Upstream's sampler for Open-Sora 1.2 models, which can keep the gradient of its last steps.

    Args:
        num_sampling_steps: Euler steps from noise to data.
        num_timesteps: length of the model's time axis.
        cfg_scale: classifier-free guidance scale.
        use_discrete_timesteps: round timesteps to whole numbers.
        use_timestep_transform: shift timesteps by resolution and length, as the model was trained.
        **kwargs: arguments of ``RFlowScheduler``, which matter to ``training_losses`` alone.
    """

    def __init__(
        self,
        num_sampling_steps: int = 10,
        num_timesteps: int = 1000,
        cfg_scale: float = 4.0,
        use_discrete_timesteps: bool = False,
        use_timestep_transform: bool = False,
        **kwargs,
    ):
        from opensora.schedulers.rf.rectified_flow import RFlowScheduler

        unknown = sorted(kwargs.keys() - inspect.signature(RFlowScheduler).parameters.keys())
        if unknown:
            raise ValueError(f"unknown keys in `scheduler`: {', '.join(unknown)}")
        self.num_sampling_steps = num_sampling_steps
        self.num_timesteps = num_timesteps
        self.cfg_scale = cfg_scale
        self.use_discrete_timesteps = use_discrete_timesteps
        self.use_timestep_transform = use_timestep_transform
        self.scheduler = RFlowScheduler(
            num_timesteps=num_timesteps,
            num_sampling_steps=num_sampling_steps,
            use_discrete_timesteps=use_discrete_timesteps,
            use_timestep_transform=use_timestep_transform,
            **kwargs,
        )

    def timesteps(self, batch: int, info: dict[str, Tensor]) -> Tensor:
        """[N, batch], from 1000 down; ``info`` holds height, width and num_frames, each [batch]."""
        from Core.backbones.opensora import rflow_timesteps

        return rflow_timesteps(
            self.num_sampling_steps,
            batch,
            info if self.use_timestep_transform else None,
            num_timesteps=self.num_timesteps,
            discrete=self.use_discrete_timesteps,
        )

    def sample(
        self,
        model: nn.Module,
        text_encoder,
        z: Tensor,
        prompts: list[str],
        device: torch.device | str,
        additional_args: dict[str, Tensor] | None = None,
        mask: Tensor | None = None,
        guidance_scale: float | None = None,
        progress: bool = True,
        backprop_mode: str | None = None,
        use_grad_checkpoint: bool = False,
    ) -> Tensor:
        """Latent [B, C, T, H, W] for ``prompts``, from noise ``z`` of that shape.

        Args:
            text_encoder: ``encode(prompts) -> {"y": [B, 1, L, D], "mask": [B, L]}``, ``null(n) -> [n, 1, L, D]``.
            additional_args: multi-resolution info of ``prepare_multi_resolution_info``.
            mask: [B, T], see ``euler_sample``.
            backprop_mode: None keeps no gradient; else see ``first_gradient_step``.
            use_grad_checkpoint: recompute each gradient step's activations in the backward pass.
        """
        from Core.backbones.opensora import guided_velocity

        info = additional_args or {}
        text = {key: value.to(device) for key, value in text_encoder.encode(prompts).items()}
        velocity = guided_velocity(
            model,
            text["y"],
            text_encoder.null(len(prompts)).to(device),
            text["mask"],
            info,
            guidance_scale=self.cfg_scale if guidance_scale is None else guidance_scale,
            checkpoint_steps=use_grad_checkpoint,
        )
        first = first_gradient_step(
            backprop_mode, self.num_sampling_steps, lambda n: int(torch.randint(n, ()))
        )
        return euler_sample(
            velocity,
            z.to(device),
            self.timesteps(len(prompts), info).to(device),
            first_gradient_step=first,
            num_timesteps=self.num_timesteps,
            mask=None if mask is None else mask.to(device),
            progress=progress,
        )

    def training_losses(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The rectified-flow loss of pretraining, see ``RFlowScheduler.training_losses``."""
        return self.scheduler.training_losses(*args, **kwargs)
