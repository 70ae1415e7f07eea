"""HunyuanVideo 1.5 (Tencent, 2025): text to video.

A caption is encoded twice: by Qwen2.5-VL inside a chat template, and what it quotes by ByT5, which knows letters.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, L text tokens, G letters of quoted text,
D text width, S positions of the video, N sampling steps.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Core.modules.video_decode import Cache
from Core.utils.options import video_option

from . import hunyuan_video15_vae
from .base import Features, TextEncoder, pad_text
from .causal_decode import CausalDecode
from .diffusers_base import DiffusersSettings, Published
from .diffusers_files import component_config

LICENCE = (
    "Tencent Hunyuan Community: not in the EU, the UK and South Korea; a licence of its own above 100M users"
)
SIZE = 19_200_000_000  # denoiser in bfloat16, VAE in bfloat16
TEXT_SIZE = 14_600_000_000  # Qwen2.5-VL-7B's language model and the ByT5 encoder in bfloat16
WIDE, TALL = "9:16", "16:9"  # height:width


@dataclass(frozen=True, kw_only=True)
class HunyuanVideo15Settings(DiffusersSettings):
    """Keys of HunyuanVideo 1.5."""

    model_path: str = video_option(
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        "hub id or local folder of the pipeline, in the layout of diffusers",
    )
    shift: float | None = video_option(
        None,
        "how far timesteps are shifted towards noise: 5 suits 480p, 9 suits 720p; None = the checkpoint's own",
        above=0,
    )
    guidance_scale: float = video_option(6.0, "classifier-free guidance scale; 1 = off", minimum=1)
    max_sequence_length: int = video_option(
        1000, "text tokens, those of the chat template not counted", minimum=1, maximum=1 << 16
    )


class HunyuanVideo15Text(TextEncoder):
    """Features of captions: ``text`` [L, D] from Qwen2.5-VL, ``glyphs`` [G, D'] of quoted text from ByT5, G ≥ 0."""

    def __init__(
        self, tokenizers: Sequence[Any], networks: Sequence[nn.Module], length: int, device: torch.device
    ):
        self.tokenizers, self.networks, self.length, self.device = tokenizers, networks, length, device

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Features]:
        # The pipeline's own functions: they hold the chat template, and how many of its tokens to leave out.
        from diffusers import HunyuanVideo15Pipeline as Pipeline

        (qwen, byt5), (qwen_tokens, byt5_tokens), texts = self.networks, self.tokenizers, list(captions)
        text = Pipeline._get_mllm_prompt_embeds(qwen, qwen_tokens, texts, self.device, self.length)
        glyphs = Pipeline._get_byt5_prompt_embeds(byt5_tokens, byt5, texts, self.device)
        return [
            {"text": row[mask.bool()].cpu(), "glyphs": letters[letters_mask.bool()].cpu()}
            for row, mask, letters, letters_mask in zip(*text, *glyphs, strict=True)
        ]


class UnmaskedAttention:
    """Joint attention of a block where every token is valid.

    That of diffusers builds masks over all pairs of positions: at 121 frames of 480p three of 2.4 GB, in each block.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: Any,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor]:
        """Video [B, S, D] and text [B, L, D] → what each takes from both."""
        from diffusers.models.embeddings import apply_rotary_emb

        query, key, value = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v))
        query, key = (
            apply_rotary_emb(x, image_rotary_emb, sequence_dim=1)
            for x in (attn.norm_q(query), attn.norm_k(key))
        )
        text = _heads(attn, encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        text = (attn.norm_added_q(text[0]), attn.norm_added_k(text[1]), text[2])
        joint = (
            torch.cat(pair, dim=1).transpose(1, 2) for pair in zip((query, key, value), text, strict=True)
        )
        out = F.scaled_dot_product_attention(*joint).transpose(1, 2).flatten(2)
        video, words = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](video), attn.to_add_out(words)


def _heads(attn: Any, x: Tensor, projections: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Projections of [B, S, D] as [B, S, heads, D/heads]."""
    return tuple(project(x).unflatten(2, (attn.heads, -1)) for project in projections)


class HunyuanVideo15(CausalDecode):
    """HunyuanVideo 1.5 text to video, in diffusers' layout."""

    settings_class = HunyuanVideo15Settings
    pipelines = ("HunyuanVideo15Pipeline",)
    denoiser_class = "HunyuanVideo15Transformer3DModel"
    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    published = {
        "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v": Published(LICENCE, SIZE, TEXT_SIZE),
        "hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v": Published(LICENCE, SIZE, TEXT_SIZE),
    }
    sizes = {
        "480p": {WIDE: (480, 848), TALL: (848, 480), "1:1": (640, 640)},
        "720p": {WIDE: (720, 1280), TALL: (1280, 720), "1:1": (960, 960)},
    }
    diffusers_component = "transformer"
    # Each length of a caption would be a program of its own; one program for all lengths, by dynamic shapes, gave the
    # right predictions and wrong gradients (inductor of PyTorch 2.13 on a CPU; aot_eager gave both right).
    obeys = CausalDecode.obeys - {"compile_blocks"}
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    settings: HunyuanVideo15Settings

    @classmethod
    def size_multiple(cls, folder: Path) -> int:
        patch = component_config(folder, "transformer")["patch_size"]
        return component_config(folder, "vae")["spatial_compression_ratio"] * patch

    # Networks

    def load_denoiser(self) -> nn.Module:
        network: Any = super().load_denoiser()
        network.time_embed.timestep_embedder.register_forward_pre_hook(_in_dtype_of_weights)
        for block in network.transformer_blocks:
            block.attn.set_processor(UnmaskedAttention())
        return network

    def load_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLHunyuanVideo15

        return self.load_network(AutoencoderKLHunyuanVideo15, "vae", self.vae_dtype)

    def text_encoder(self) -> TextEncoder:
        from transformers import Qwen2_5_VLTextModel, T5EncoderModel

        tokenizers = [self.load_tokenizer("tokenizer"), self.load_tokenizer("tokenizer_2")]
        networks = [
            self.load_text_model(Qwen2_5_VLTextModel, "text_encoder"),
            self.load_text_model(T5EncoderModel, "text_encoder_2"),
        ]
        return HunyuanVideo15Text(tokenizers, networks, self.settings.max_sequence_length, self.text_device)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)

    # Sampling

    def latent_shape(self) -> tuple[int, int, int, int]:
        vae = self.read_config("vae")
        scale = vae["spatial_compression_ratio"]
        frames = self.count_latent_frames(self.video.num_frames, self.settings)
        return vae["latent_channels"], frames, self.video.height // scale, self.video.width // scale

    @functools.cached_property
    def shift(self) -> float:
        return self.settings.shift or self.read_config("scheduler").get("shift") or 1.0

    def timesteps(self, batch: int) -> Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(self.process.num_timesteps, shift=self.shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, self.settings.num_sampling_steps, endpoint=False))
        return scheduler.timesteps[:, None].expand(-1, batch).to(self.device)

    def batch_text(self, text: Sequence[Features]) -> dict[str, Tensor]:
        batch = {}
        for name in ("text", "glyphs"):
            batch[name], batch[f"{name}_mask"] = pad_text([row[name] for row in text], self.device)
        return batch

    def predict(self, z: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        # One video at a time: without padding attention needs no mask, and a video fills the device by itself.
        rows = []
        for i in range(len(z)):
            text, glyphs = (
                condition[name][i, condition[f"{name}_mask"][i]][None].to(self.dtype)
                for name in ("text", "glyphs")
            )
            rows.append(self._denoise(z[[i]], t[[i]], text, glyphs))
        return -torch.cat(rows).to(z.dtype)

    def _denoise(self, z: Tensor, t: Tensor, text: Tensor, glyphs: Tensor) -> Tensor:
        """The network's own velocity, noise − data, for one video."""
        config = self.read_config("transformer")
        # Channels of a given picture and of its mask, and no token of one.
        no_picture = z.new_zeros(1, config["in_channels"] - z.shape[1], *z.shape[2:])
        return self.denoiser(
            torch.cat([z, no_picture], dim=1).to(self.dtype),
            t,
            encoder_hidden_states=text,
            encoder_attention_mask=torch.ones_like(text[..., 0]),
            encoder_hidden_states_2=glyphs,
            encoder_attention_mask_2=torch.ones_like(glyphs[..., 0]),
            image_embeds=text.new_zeros(1, 0, config["image_embed_dim"]),
            return_dict=False,
        )[0]

    # Pixels

    def _to_vae(self, z: Tensor) -> Tensor:
        return z / self.vae.config.scaling_factor

    @property
    def _tiles(self) -> tuple[int, int]:
        tile = self.vae.tile_latent_min_height
        return tile, int(tile * (1 - self.vae.tile_overlap_factor))

    def _decode_step(self, z: Tensor, cache: Cache, last: bool = False) -> tuple[Tensor, Cache]:
        return hunyuan_video15_vae.decode_step(self.vae.decoder, z, cache, last)


def _in_dtype_of_weights(embedder: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sinusoid of a float32 timestep as the layers take it: a timestep in bfloat16 would be rounded to fours."""
    return (inputs[0].to(embedder.linear_1.weight.dtype), *inputs[1:])
