"""Open-Sora 1.2, through the public names that upstream's own package has too.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, L text tokens, D text width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.acceleration.checkpoint import set_grad_checkpoint
from opensora.models.text_encoder.t5 import text_preprocessing
from opensora.registry import MODELS, build_module
from opensora.schedulers.rf.rectified_flow import timestep_transform
from opensora.utils.inference_utils import append_score_to_prompts, prepare_multi_resolution_info

from .base import Backbone, TextEncoder, VideoSpec, gather_frames, pad_text

ENCODE_BATCH = 8


def rflow_timesteps(
    steps: int,
    batch: int,
    info: dict[str, Tensor] | None,
    *,
    num_timesteps: int = 1000,
    discrete: bool = False,
) -> Tensor:
    """[steps, batch] from ``num_timesteps`` down; ``info`` (height, width, num_frames) shifts them, None not."""
    t = torch.tensor([(1.0 - i / steps) * num_timesteps for i in range(steps)])
    t = (t.round() if discrete else t)[:, None].expand(steps, batch)
    if info is None:
        return t
    return torch.stack([timestep_transform(row, info, num_timesteps=num_timesteps) for row in t])


def guided_velocity(
    model: nn.Module,
    y: Tensor,
    y_null: Tensor,
    mask: Tensor,
    info: dict[str, Tensor],
    *,
    guidance_scale: float,
    checkpoint_steps: bool = False,
) -> Callable[..., Tensor]:
    """v_null + scale · (v_text − v_null), both branches in one batch; one branch alone at scale 1.

    Args:
        y, y_null: text features [B, 1, L, D]; mask [B, L].
        info: multi-resolution info, each entry [B]. Height and width stay on the CPU, where reading them
            costs no synchronisation.
        checkpoint_steps: recompute a whole gradient step in the backward pass.
    """
    branches = 1 if guidance_scale == 1 else 2
    text = {"y": y if branches == 1 else torch.cat([y, y_null]), "mask": mask}
    args = {key: value.repeat(branches) for key, value in info.items()}
    args |= {key: args[key].cpu() for key in ("height", "width") if key in args}
    contexts: dict[bool, dict[str, Any]] = {}

    def text_arguments() -> dict[str, Any]:
        """Text keys and values, computed once without and once with a graph, where the model offers it."""
        if not hasattr(model, "encode_text"):
            return text
        graph = torch.is_grad_enabled()
        if graph not in contexts:
            contexts[graph] = {"y": model.encode_text(**text)}
        return contexts[graph]

    def velocity(z: Tensor, t: Tensor, generated: Tensor | None = None) -> Tensor:
        kwargs = {**text_arguments(), **args}
        if generated is not None:
            kwargs["x_mask"] = generated.repeat(branches, 1)
        inputs = z.repeat(branches, 1, 1, 1, 1), t.repeat(branches)
        if checkpoint_steps and torch.is_grad_enabled():
            out = checkpoint(model, *inputs, use_reentrant=False, **kwargs)
        else:
            out = model(*inputs, **kwargs)
        v = out[:, : z.shape[1]]
        if branches == 1:
            return v
        v_text, v_null = v.chunk(2)
        return v_null + guidance_scale * (v_text - v_null)

    return velocity


class OpenSoraText(TextEncoder):
    """T5 features of captions."""

    def __init__(self, entry: dict, device: torch.device, dtype: torch.dtype):
        self.entry = entry
        self.t5 = build_module(entry, MODELS, device=device, dtype=dtype)

    @property
    def identity(self) -> str:
        return f"{self.entry['from_pretrained']} {self.entry['model_max_length']} {self.t5.dtype}"

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        features = []
        for start in range(0, len(captions), ENCODE_BATCH):
            out = self.t5.encode(list(captions[start : start + ENCODE_BATCH]))
            features += [y[0, m != 0] for y, m in zip(out["y"].cpu(), out["mask"].cpu(), strict=True)]
        return features


class OpenSora(Backbone):
    """Open-Sora 1.2: STDiT3, its video VAE and a T5 encoder.

    Args:
        model, vae, text_encoder, scheduler: the entries of the config file.
        video: what to make.
        multi_resolution: kind of size conditioning, ``STDiT2`` for the released weights.
        scores: ``aes``, ``flow``, ``camera_motion`` suffixes of every caption.
        dtype: of the frozen weights.
    """

    lora_targets = ("qkv", "q_linear", "kv_linear")

    def __init__(
        self,
        *,
        model: dict,
        vae: dict,
        text_encoder: dict,
        scheduler: dict,
        video: VideoSpec,
        multi_resolution: str | None,
        scores: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.entries = {"model": model, "vae": vae, "text_encoder": text_encoder}
        self.video = video
        self.multi_resolution = multi_resolution
        self.scores = scores
        self.device, self.dtype = device, dtype
        self.num_sampling_steps = scheduler["num_sampling_steps"]
        self.guidance_scale = scheduler["cfg_scale"]
        self.transform = scheduler.get("use_timestep_transform", False)
        self.discrete = scheduler.get("use_discrete_timesteps", False)
        self.checkpoint_steps = False

    def caption(self, prompt: str) -> str:
        return text_preprocessing(append_score_to_prompts([prompt], **self.scores)[0])

    def text_encoder(self) -> OpenSoraText:
        return OpenSoraText(self.entries["text_encoder"], self.device, self.dtype)

    def load(self) -> None:
        self.vae = self._place(build_module(self.entries["vae"], MODELS))
        latent_size = self.vae.get_latent_size(self._frame_size())
        text = self.entries["text_encoder"]
        self.denoiser = self._place(
            build_module(
                self.entries["model"],
                MODELS,
                input_size=latent_size,
                in_channels=self.vae.out_channels,
                model_max_length=text["model_max_length"],
            )
        )

    def _place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype).eval().requires_grad_(False)

    def _frame_size(self) -> tuple[int, int, int]:
        return self.video.num_frames, self.video.height, self.video.width

    def latent_shape(self) -> tuple[int, int, int, int]:
        return (self.vae.out_channels, *self.vae.get_latent_size(self._frame_size()))

    def timesteps(self, batch: int) -> Tensor:
        info = self._info(batch) if self.transform else None
        return rflow_timesteps(
            self.num_sampling_steps,
            batch,
            info,
            num_timesteps=self.num_timesteps,
            discrete=self.discrete,
        ).to(self.device)

    def _info(self, batch: int) -> dict[str, Tensor]:
        size = (self.video.height, self.video.width)
        return prepare_multi_resolution_info(
            self.multi_resolution, batch, size, self.video.num_frames, self.video.fps, "cpu", torch.float32
        )

    def velocity(self, text: Sequence[Tensor]) -> Callable[..., Tensor]:
        features, mask = pad_text(text, self.device)
        null = self.denoiser.y_embedder.y_embedding[: features.shape[1]].to(features)
        info = self._info(len(text))
        return guided_velocity(
            self.denoiser,
            features[:, None],
            null.expand(len(text), 1, -1, -1),
            mask,
            {
                key: value if key in ("height", "width") else value.to(self.device)
                for key, value in info.items()
            },
            guidance_scale=self.guidance_scale,
            checkpoint_steps=self.checkpoint_steps,
        )

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(self.dtype), num_frames=self.video.num_frames).float()

    def decode_frames(self, z: Tensor, index: Tensor) -> Tensor:
        frames = self.vae.decode(gather_frames(z.to(self.dtype), index), num_frames=1)
        return frames.squeeze(2).unflatten(0, index.shape).float()

    def enable_checkpointing(self) -> None:
        set_grad_checkpoint(self.denoiser)
        set_grad_checkpoint(self.vae)
