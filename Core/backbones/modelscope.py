"""ModelScope text to video, 1.7B (Wang et al., 2023): noise prediction, sampled with DDIM, one latent per frame.

Axes: B batch, C channels, T frames, h, w latent rows and columns, F chosen frames, H, W pixels, L text tokens,
D text width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.modules.recompute import recomputed
from Core.modules.video_decode import decode_tiled
from Core.utils.options import video_option

from .base import Features, TextEncoder, gather_frames
from .ddim_family import DdimFamily
from .diffusers_base import DiffusersSettings, Published
from .diffusers_files import component_config

SIZE = 5_980_000_000  # denoiser and VAE in float32
TEXT_SIZE = 1_360_000_000  # text encoder of CLIP ViT-H in float32
CLIP_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class ModelScopeSettings(DiffusersSettings):
    """Keys of ModelScope."""

    model_path: str = video_option(
        "damo-vilab/text-to-video-ms-1.7b",
        "hub id or local folder of the pipeline, in the layout of diffusers",
    )
    guidance_scale: float = video_option(9.0, "classifier-free guidance scale; 1 = off", minimum=1)
    max_sequence_length: int = video_option(CLIP_TOKENS, "text tokens", minimum=1, maximum=CLIP_TOKENS)


class ModelScope(DdimFamily):
    """ModelScope text to video in diffusers' layout; its VAE is an image VAE."""

    settings_class = ModelScopeSettings
    pipelines = ("TextToVideoSDPipeline",)
    denoiser_class = "UNet3DConditionModel"
    components = ("unet", "vae", "scheduler")
    published = {"damo-vilab/text-to-video-ms-1.7b": Published("CC-BY-NC-4.0", SIZE, TEXT_SIZE)}
    sizes = {"256p": {"1:1": (256, 256)}}
    time_factor = 1
    # Traced whole, with the right gradients (aot_eager); what inductor makes of it is yet to be checked.
    obeys = DdimFamily.obeys - {"compile_blocks"}
    recomputations = (True, False)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    settings: ModelScopeSettings

    @classmethod
    def size_multiple(cls, folder: Path) -> int:
        return 2 ** (len(component_config(folder, "vae")["block_out_channels"]) - 1)

    # Networks

    def load_vae(self) -> nn.Module:
        from diffusers import AutoencoderKL

        return self.load_network(AutoencoderKL, "vae", self.vae_dtype)

    def text_encoder(self) -> TextEncoder:
        from transformers import CLIPTextModel

        # Padding counts, as the model was trained with it.
        return self.padded_text(CLIPTextModel, masked=False, trim=False)

    @property
    def blocks(self) -> list[nn.Module]:
        unet: Any = self.denoiser
        return [unet.transformer_in, *unet.down_blocks, unet.mid_block, *unet.up_blocks]

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        # The network of diffusers has no switch of its own.
        self.checkpointing = True
        for block in self.blocks:
            block.forward = recomputed(block.forward)

    # Sampling

    def latent_shape(self) -> tuple[int, int, int, int]:
        vae = self.read_config("vae")
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        return (
            vae["latent_channels"],
            self.video.num_frames,
            self.video.height // scale,
            self.video.width // scale,
        )

    def _scheduler(self) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(dict(self.read_config("scheduler")))

    def batch_text(self, text: Sequence[Features]) -> dict[str, Tensor]:
        return {"text": torch.stack([features["features"] for features in text]).to(self.device)}

    def predict(self, z: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = condition["text"].to(self.dtype)
        return self.denoiser(z.to(self.dtype), t - 1, text, return_dict=False)[0].to(z.dtype)

    # Pixels

    def decode(self, z: Tensor) -> Tensor:
        frames = torch.arange(z.shape[2]).expand(len(z), -1)
        return self.decode_frames(z, frames).transpose(1, 2)

    def decode_frames(self, z: Tensor, index: Tensor, context: str = "isolated", reach: int = 1) -> Tensor:
        """A frame is decoded from its latent alone, so that every context is the same."""
        decode = recomputed(self._decode) if self.checkpointing else self._decode
        pixels = [decode(latent) for latent in gather_frames(z, index).squeeze(2).split(1)]
        return torch.cat(pixels).unflatten(0, index.shape)

    def decode_at(self, z: Tensor, frames: Tensor, context: str = "whole", reach: int = 1) -> Tensor:
        return self.decode_frames(z, frames)

    def _decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] → pixels [B, 3, H, W]; tiled where asked."""
        vae = self.vae
        with torch.autocast(z.device.type, enabled=False):
            latents = z.to(vae.dtype) / vae.config.scaling_factor
            if not self.settings.vae_tiling:
                return self._decode_tile(latents).to(z.dtype)
            tile = vae.tile_latent_min_size
            stride = int(tile * (1 - vae.tile_overlap_factor))
            return decode_tiled(self._decode_tile, latents, tile, stride).to(z.dtype)

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(z))
