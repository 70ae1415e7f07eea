"""LTX-Video 0.9 (HaCohen et al., 2024): text to video by rectified flow, with a VAE of 32×32×8 pixels per latent.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels, L text tokens,
S tokens of the denoiser, T·h·w.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from Core.modules import lora_names
from Core.modules.video_decode import decode_tiled
from Core.sampling import guidance
from Core.sampling.guidance import Combine
from Core.utils.options import video_option

from .base import Features, TextEncoder
from .diffusers_base import DiffusersBackbone, DiffusersSettings, Published, pad_features
from .diffusers_files import component_config

# Of what the decoder mixes in, the same for every video: its pixels depend on its latent alone.
DECODE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class LtxSettings(DiffusersSettings):
    """Keys of LTX-Video."""

    model_path: str = video_option(
        "Lightricks/LTX-Video", "hub id or local folder of the pipeline, in the layout of diffusers"
    )
    guidance_scale: float = video_option(3.0, "classifier-free guidance scale; 1 = off", minimum=1)
    guidance_rescale: float = video_option(
        0.0,
        "how far the guided prediction's standard deviation is rescaled to the conditional one's, against overexposure",
        minimum=0,
        maximum=1,
    )
    max_sequence_length: int = video_option(128, "text tokens", minimum=1, maximum=1 << 16)
    decode_timestep: float = video_option(
        0.05, "noise level that the decoder of LTX 0.9.1 and later is told", minimum=0, maximum=1
    )
    decode_noise_scale: float = video_option(
        0.025,
        "share of noise that is mixed into latents for the decoder of LTX 0.9.1 and later",
        minimum=0,
        maximum=1,
    )


class Ltx(DiffusersBackbone):
    """LTX-Video 0.9 in diffusers' layout."""

    settings_class = LtxSettings
    pipelines = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
    denoiser_class = "LTXVideoTransformer3DModel"
    published = {
        "Lightricks/LTX-Video": Published(
            "LTX-Video licence, with a revenue limit", 9_400_000_000, 19_000_000_000
        )
    }
    sizes = {"512p": {"2:3": (512, 768), "3:2": (768, 512)}}
    time_factor = 8
    multiple = 32
    # Every frame depends on frames before and after it, so that none can be decoded without the others.
    decode_contexts = ("whole",)
    diffusers_component = "transformer"
    original_names = lora_names.LTX
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    settings: LtxSettings

    # Before anything loads

    @classmethod
    def size_multiple(cls, folder: Path) -> int:
        return compression(component_config(folder, "vae"))

    # Networks

    def load_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLLTXVideo

        return self.load_network(AutoencoderKLLTXVideo, "vae", self.vae_dtype)

    def text_encoder(self) -> TextEncoder:
        from transformers import T5EncoderModel

        return self.padded_text(T5EncoderModel, masked=False, trim=True)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        super().enable_checkpointing(keep_attention)
        self.vae.enable_gradient_checkpointing()

    # Sampling

    def latent_shape(self) -> tuple[int, int, int, int]:
        vae = self.read_config("vae")
        scale = compression(vae)
        frames = self.count_latent_frames(self.video.num_frames, self.settings)
        return vae["latent_channels"], frames, self.video.height // scale, self.video.width // scale

    def timesteps(self, batch: int) -> Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        config, steps = dict(self.read_config("scheduler")), self.settings.num_sampling_steps
        limits = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        _, frames, height, width = self.latent_shape()
        shift = calculate_shift(frames * height * width, *(scheduler.config[key] for key in limits))
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=shift)
        return scheduler.timesteps[:, None].expand(-1, batch).to(self.device)

    @property
    def combine(self) -> Combine | None:
        combine, amount = guidance.linear(self.settings.guidance_scale), self.settings.guidance_rescale
        return guidance.rescaled(combine, amount) if combine and amount else combine

    def batch_text(self, text: Sequence[Features]) -> dict[str, Tensor]:
        rows, length = [features["features"] for features in text], self.settings.max_sequence_length
        lengths = torch.tensor([len(row) for row in rows])
        return {
            "text": pad_features(rows, length, self.device),
            "mask": (torch.arange(length) < lengths[:, None]).to(self.device),
        }

    def predict(self, z: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        _, _, frames, height, width = z.shape
        pixels = self.vae.spatial_compression_ratio
        velocity = self.denoiser(
            z.flatten(2).transpose(1, 2).to(self.dtype),  # [B, S, C]
            condition["text"].to(self.dtype),
            t,
            condition["mask"],
            frames,
            height,
            width,
            (self.time_factor / self.video.fps, pixels, pixels),
            return_dict=False,
        )[0]
        return -velocity.transpose(1, 2).unflatten(2, (frames, height, width)).to(z.dtype)

    # Pixels

    def decode(self, z: Tensor) -> Tensor:
        vae = self.vae
        scale = vae.spatial_compression_ratio
        tile = (vae.tile_sample_min_height // scale, vae.tile_sample_min_width // scale)
        stride = (vae.tile_sample_stride_height // scale, vae.tile_sample_stride_width // scale)
        with torch.autocast(z.device.type, enabled=False), self._fixed_noise():
            latents, level = self._for_decoder(z.to(vae.dtype))
            decode = functools.partial(vae.decoder, temb=level)
            tiled = self.settings.vae_tiling
            pixels = decode_tiled(decode, latents, tile, stride) if tiled else decode(latents)
        return pixels.to(z.dtype)

    def _for_decoder(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents [B, C, T, h, w] as the VAE's decoder takes them, and their noise level [B] where it asks for it."""
        mean, std = (
            values.to(z).view(1, -1, 1, 1, 1) for values in (self.vae.latents_mean, self.vae.latents_std)
        )
        z = z * std / self.vae.config.scaling_factor + mean
        if not self.vae.config.timestep_conditioning:
            return z, None
        generator = torch.Generator().manual_seed(DECODE_SEED)
        noise = torch.randn(1, *z.shape[1:], generator=generator).to(z)
        z = torch.lerp(z, noise.expand_as(z), self.settings.decode_noise_scale)
        return z, z.new_full((len(z),), self.settings.decode_timestep)

    @contextmanager
    def _fixed_noise(self) -> Iterator[None]:
        """Within this context the noise that a decoder's layers draw is the same for every video."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(DECODE_SEED)
            yield

    def decode_frames(self, z: Tensor, index: Tensor, context: str = "whole", reach: int = 1) -> Tensor:
        # Of each latent frame's video frames the last.
        return self.decode_at(z, index * self.time_factor)


def compression(vae: Mapping) -> int:
    """Pixels per latent row and column, by the VAE's configuration."""
    given = vae.get("spatial_compression_ratio")
    return given or vae["patch_size"] * 2 ** sum(vae["spatio_temporal_scaling"])
