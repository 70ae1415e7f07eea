"""CogVideoX 2B and 5B (Yang et al., 2024): text to video by v-prediction, sampled with DDIM from zero terminal SNR.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, H, W pixels, L text tokens, D text width.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from Core.modules.video_decode import Cache, Size
from Core.sampling import guidance
from Core.sampling.euler import Predict, per_video
from Core.sampling.guidance import Combine
from Core.sampling.scheduler_step import DpmStep
from Core.utils.options import video_option

from .base import Features, TextEncoder
from .causal_decode import CausalDecode
from .ddim_family import DdimFamily
from .diffusers_base import DiffusersSettings, Published
from .diffusers_files import component_config

TEXT_SIZE = 9_500_000_000  # encoder of T5 v1.1 XXL in 16 bits
CUSTOM_LICENCE = "CogVideoX licence: free for research, commercial use after registration"


@dataclass(frozen=True, kw_only=True)
class CogVideoXSettings(DiffusersSettings):
    """Keys of CogVideoX."""

    model_path: str = video_option(
        "THUDM/CogVideoX-2b", "hub id or local folder of the pipeline, in the layout of diffusers"
    )
    guidance_scale: float = video_option(6.0, "classifier-free guidance scale; 1 = off", minimum=1)
    max_sequence_length: int = video_option(226, "text tokens", minimum=1, maximum=1 << 16)
    sampler: Literal["ddim", "dpm"] = video_option(
        "ddim",
        "sampler of finished videos; `dpm`, which draws noise at every step, is CogVideoX's own DPM-Solver++; training "
        "and its validation take `ddim`",
    )
    use_dynamic_cfg: bool = video_option(
        False, "vary the guidance scale over the timesteps, by the formula of diffusers' pipeline"
    )


class CogVideoX(DdimFamily, CausalDecode):
    """CogVideoX 2B and 5B in diffusers' layout."""

    settings_class = CogVideoXSettings
    pipelines = ("CogVideoXPipeline",)
    denoiser_class = "CogVideoXTransformer3DModel"
    published = {
        "THUDM/CogVideoX-2b": Published("Apache-2.0", 3_800_000_000, TEXT_SIZE),
        "THUDM/CogVideoX-5b": Published(CUSTOM_LICENCE, 11_600_000_000, TEXT_SIZE),
    }
    sizes = {"480p": {"2:3": (480, 720)}}
    latent_group = 2
    diffusers_component = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    settings: CogVideoXSettings

    # Before anything loads

    @classmethod
    def pipeline_errors(cls, folder: Path, settings: CogVideoXSettings) -> list[str]:
        config = component_config(folder, "transformer")
        if config.get("patch_size_t") is not None:
            return [
                f"model_path: {settings.model_path!r} is a CogVideoX 1.5 model, which is not supported; use CogVideoX "
                "2B or 5B"
            ]
        tokens = config.get("max_text_seq_length", 226)
        if settings.max_sequence_length != tokens:
            return [
                f"max_sequence_length must be {tokens}, which {settings.model_path!r} was trained with, got "
                f"{settings.max_sequence_length}"
            ]
        return []

    @classmethod
    def size_multiple(cls, folder: Path) -> int:
        blocks = component_config(folder, "vae").get("block_out_channels", (0,) * 4)
        return 2 ** (len(blocks) - 1) * component_config(folder, "transformer").get("patch_size", 2)

    # Networks

    def load_denoiser(self) -> nn.Module:
        network = super().load_denoiser()
        embed: Any = network.patch_embed
        if embed.use_positional_embeddings:
            # 2B's positions, which diffusers computes in float64 and turns to the tokens' dtype at every step.
            embed.pos_embedding = embed.pos_embedding.to(self.dtype)
        return network

    def load_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLCogVideoX

        return self.load_network(AutoencoderKLCogVideoX, "vae", self.vae_dtype)

    def text_encoder(self) -> TextEncoder:
        from transformers import T5EncoderModel

        return self.padded_text(T5EncoderModel, masked=False, trim=False)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        super().enable_checkpointing(keep_attention)
        self.vae.enable_gradient_checkpointing()
        # A chunk is recomputed as a whole, and then layer by layer; recomputing blocks between would save nothing.
        self.vae.decoder.gradient_checkpointing = False

    # Sampling

    def latent_shape(self) -> tuple[int, int, int, int]:
        vae = self.read_config("vae")
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        frames = self.count_latent_frames(self.video.num_frames, self.settings)
        return vae["latent_channels"], frames, self.video.height // scale, self.video.width // scale

    def _scheduler(self) -> Any:
        from diffusers import CogVideoXDDIMScheduler

        return self._trailing(CogVideoXDDIMScheduler)

    def _trailing(self, kind: Any) -> Any:
        # Zero terminal SNR takes effect where sampling starts at the last level.
        return kind.from_config(dict(self.read_config("scheduler")), timestep_spacing="trailing")

    def inference_step(self, predict: Predict, generators: Sequence[torch.Generator]) -> Any:
        if self.settings.sampler == "ddim":
            return super().inference_step(predict, generators)
        from diffusers import CogVideoXDPMScheduler

        scheduler = self._trailing(CogVideoXDPMScheduler)
        scheduler.set_timesteps(self.settings.num_sampling_steps)
        return DpmStep(predict, scheduler, generators)

    @property
    def combine(self) -> Combine | None:
        scale = self.settings.guidance_scale
        if scale > 1 and self.settings.use_dynamic_cfg:
            return dynamic_guidance(scale, self.settings.num_sampling_steps)
        return guidance.linear(scale)

    def batch_text(self, text: Sequence[Features]) -> dict[str, Tensor]:
        return {"text": torch.stack([features["features"] for features in text]).to(self.device)}

    @functools.cached_property
    def _rotary(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the tokens' positions; None where positions are added to the tokens (2B)."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config = self.read_config("transformer")
        if not config["use_rotary_positional_embeddings"]:
            return None
        _, frames, *sides = self.latent_shape()
        grid = tuple(side // config["patch_size"] for side in sides)
        trained = (config[side] // config["patch_size"] for side in ("sample_width", "sample_height"))
        crop = get_resize_crop_region_for_grid(grid, *trained)
        return get_3d_rotary_pos_embed(config["attention_head_dim"], crop, grid, frames, device=self.device)

    def predict(self, z: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        out = self.denoiser(
            z.transpose(1, 2).to(self.dtype),
            condition["text"].to(self.dtype),
            t - 1,
            image_rotary_emb=self._rotary,
            return_dict=False,
        )[0]
        return out.transpose(1, 2).to(z.dtype)

    # Pixels

    def _to_vae(self, z: Tensor) -> Tensor:
        return z / self.vae.config.scaling_factor

    def _chunks(self, frames: int) -> list[int]:
        size = self.vae.num_latent_frames_batch_size
        rest = max(frames // size, 1) - 1
        return [frames - rest * size] + [size] * rest

    @property
    def _tiles(self) -> tuple[Size, Size]:
        vae = self.vae
        tile = (vae.tile_latent_min_height, vae.tile_latent_min_width)
        factors = (vae.tile_overlap_factor_height, vae.tile_overlap_factor_width)
        height, width = (int(side * (1 - factor)) for side, factor in zip(tile, factors, strict=True))
        return tile, (height, width)

    def _decode_step(self, z: Tensor, cache: Cache, last: bool = False) -> tuple[Tensor, Cache]:
        pixels, cache = self.vae.decoder(z, conv_cache=cache)
        return pixels, None if last else _read_later(cache)


def _read_later(cache: Mapping[str, Any]) -> dict[str, Any]:
    """A decoder's cache without the copies of the upsampled latents, which its convolutions of width 1 never read."""
    return {
        name: _read_later(entry) if isinstance(entry, Mapping) else entry
        for name, entry in cache.items()
        if name not in ("conv_y", "conv_b")
    }


def dynamic_guidance(scale: float, num_steps: int) -> Combine:
    """Guidance whose scale varies between 1 and 1 + ``scale`` with the timestep, by diffusers' formula.

    It divides a timestep of 1000 by the number of steps, so that the scale jumps from step to step; videos of the
    pipeline with ``use_dynamic_cfg`` are made so.
    """

    def combine(text: Tensor, null: Tensor, t: Tensor) -> Tensor:
        progress = (num_steps - (t.double() - 1)) / num_steps
        varied = 1 + scale * (1 - torch.cos(math.pi * progress**5)) / 2
        return null + per_video(varied).to(text.dtype) * (text - null)

    return combine
