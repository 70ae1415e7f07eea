"""Open-Sora's guided velocity and timesteps, and its sampler under upstream's name.

Importing this module puts the sampler into the registry as ``rflow``, in place of upstream's own.

Axes: B batch, C channels, T latent frames, H, W latent rows and columns, L text tokens, D text width,
N sampling steps.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from Core.sampling import guidance
from Core.sampling.euler import DenoisingStep, Predict, RectifiedFlow, run_steps
from Core.sampling.gradient_window import first_gradient_step
from Core.sampling.guidance import PredictionObserver
from Core.sampling.kept_frames import keep_frames
from opensora.registry import SCHEDULERS
from opensora.schedulers.rf.rectified_flow import RFlowScheduler, timestep_transform


def rflow_timesteps(
    steps: int,
    batch: int,
    info: dict[str, Tensor] | None,
    *,
    num_timesteps: int = 1000,
    discrete: bool = False,
) -> Tensor:
    """[steps, batch] from ``num_timesteps`` down, shifted by ``info`` (height, width, num_frames) if given."""
    t = torch.tensor([(1.0 - i / steps) * num_timesteps for i in range(steps)])
    t = (t.round() if discrete else t)[:, None].expand(steps, batch)
    if info is None:
        return t
    info = {key: value.cpu() for key, value in info.items()}
    return torch.stack([timestep_transform(row, info, num_timesteps=num_timesteps) for row in t])


class Branch:
    """Velocity of a model for one batch of text features, whose keys and values are computed once.

    Args:
        y: text features [B, 1, L, D]; mask [B or fewer, L].
        info: multi-resolution info, each entry [B]. Height and width stay on the CPU, where reading them
            costs no synchronisation.
        checkpoint_steps: recompute a whole gradient step in the backward pass.
    """

    def __init__(
        self, model: nn.Module, y: Tensor, mask: Tensor, info: dict[str, Tensor], checkpoint_steps: bool
    ):
        self.model, self.y, self.mask = model, y, mask
        self.info = info | {key: info[key].cpu() for key in ("height", "width") if key in info}
        self.checkpoint_steps = checkpoint_steps
        self.contexts: dict[bool, dict[str, Any]] = {}

    def text_arguments(self) -> dict[str, Any]:
        """Text keys and values, computed once without and once with a graph, where the model offers it."""
        text = {"y": self.y, "mask": self.mask}
        if not getattr(self.model, "accepts_text_context", False):
            return text
        graph = torch.is_grad_enabled()
        if graph not in self.contexts:
            self.contexts[graph] = {"y": self.model.encode_text(**text)}
        return self.contexts[graph]

    def __call__(self, z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        kwargs = {**self.text_arguments(), **self.info}
        if generated is not None:
            kwargs["x_mask"] = generated
        if self.checkpoint_steps and torch.is_grad_enabled():
            out = checkpoint(self.model, z, t, use_reentrant=False, **kwargs)
        else:
            out = self.model(z, t, **kwargs)
        return out[:, : z.shape[1]]


def guided_velocity(
    model: nn.Module,
    y: Tensor,
    y_null: Tensor,
    mask: Tensor,
    info: dict[str, Tensor],
    *,
    guidance_scale: float,
    checkpoint_steps: bool = False,
    null_grad: bool = True,
    observe: PredictionObserver | None = None,
) -> Predict:
    """v_null + scale · (v_text − v_null), both branches in one batch; the text branch alone at scale 1.

    Args:
        y, y_null: text features [B, 1, L, D]; mask [B, L].
        info, checkpoint_steps: see ``Branch``.
        null_grad, observe: see ``guided``.
    """
    text = Branch(model, y, mask, info, checkpoint_steps)
    null = Branch(model, y_null, mask, info, checkpoint_steps)
    doubled = {key: value.repeat(2) for key, value in info.items()}
    both = Branch(model, torch.cat([y, y_null]), mask, doubled, checkpoint_steps)

    combine = guidance.linear(guidance_scale)
    return guidance.guided(text, null, both, combine, null_grad=null_grad, observe=observe)


@SCHEDULERS.register_module("rflow", force=True)
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
            mask: [B, T], see ``KeptFrames``.
            backprop_mode: None keeps no gradient; else see ``first_gradient_step``.
            use_grad_checkpoint: recompute each gradient step's activations in the backward pass.
        """
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
        timesteps = self.timesteps(len(prompts), info).to(device)
        step = DenoisingStep(velocity, RectifiedFlow(self.num_timesteps), timesteps)
        kept = keep_frames(step, None if mask is None else mask.to(device))
        count = self.num_sampling_steps
        first = first_gradient_step(backprop_mode, count, lambda n: int(torch.randint(n, ())))
        with torch.no_grad():
            z = run_steps(kept, z.to(device), 0, first, progress)
        with torch.enable_grad():
            return run_steps(kept, z, first, count, progress)

    def training_losses(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The rectified-flow loss of pretraining, see ``RFlowScheduler.training_losses``."""
        return self.scheduler.training_losses(*args, **kwargs)
