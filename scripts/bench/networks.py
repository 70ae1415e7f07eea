"""Open-Sora 1.2, Wan, T5 and HPS's ViT at any size, with random weights: a benchmark needs only the sizes.

Networks are made on the device itself, since a billion random numbers take long on a CPU.

Axes: B batch, N images, L text tokens, D text width.
"""

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from Core.backbones import BACKBONES, Features, TextEncoder
from Core.backbones.diffusers_files import INDEX, MARKERS
from Core.backbones.opensora import OpenSora, OpenSoraSettings
from Core.backbones.wan import Wan, WanSettings
from Core.modules.autocast import keep_out_of_autocast
from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.clip import ImageTower, unit
from Core.rewards.preprocess import ImageTransform
from Core.utils import rng
from Core.utils.options import video_option
from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
from opensora.models.vae.vae import (
    LATENT_SCALE,
    LATENT_SHIFT,
    VideoAutoencoderPipeline,
    VideoAutoencoderPipelineConfig,
)
from opensora.registry import MODELS

TEXT_TOKENS = 300  # padded length of a caption
CAPTION_TOKENS = 40  # a sentence with its score suffix


@MODELS.register_module("benchmark-stdit3")
def random_stdit3(
    depth: int,
    hidden_size: int,
    num_heads: int,
    caption_channels: int,
    input_size,
    in_channels,
    model_max_length,
) -> STDiT3:
    """An STDiT3 whose zero-initialised output layers are made nonzero, so that gradients are not trivial."""
    sizes = dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads, caption_channels=caption_channels)
    model = STDiT3(STDiT3Config(**sizes, in_channels=in_channels, model_max_length=model_max_length))
    outputs = [model.final_layer.linear]
    for block in model.temporal_blocks:
        outputs += [block.attn.proj, block.cross_attn.proj, block.mlp.fc2]
    for linear in outputs:
        nn.init.normal_(linear.weight, std=0.02)
    return model


@MODELS.register_module("benchmark-vae")
def random_vae(
    vae_2d: dict | None, vae_temporal: dict, micro_frame_size: int, micro_batch_size: int
) -> VideoAutoencoderPipeline:
    return VideoAutoencoderPipeline(
        VideoAutoencoderPipelineConfig(
            vae_2d=dict(type="VideoAutoencoderKL", config=vae_2d, micro_batch_size=micro_batch_size),
            vae_temporal=dict(type="VAE_Temporal", **vae_temporal),
            micro_frame_size=micro_frame_size,
            shift=LATENT_SHIFT,
            scale=LATENT_SCALE,
        )
    )


class RandomT5(TextEncoder):
    """T5's encoder on random tokens, padded like the real tokenizer's."""

    def __init__(self, sizes: dict, device: torch.device, dtype: torch.dtype):
        config = T5Config(feed_forward_proj="gated-gelu", **sizes)
        with device:
            self.model = T5EncoderModel(config).to(dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Features]:
        size = self.model.config.vocab_size
        rows = [
            torch.randint(2, size, (TEXT_TOKENS,), generator=rng.generator(0, "tokens", caption))
            for caption in captions
        ]
        tokens = torch.stack(rows).to(self.model.device)
        mask = torch.zeros_like(tokens)
        mask[:, :CAPTION_TOKENS] = 1
        features = self.model(tokens * mask, attention_mask=mask).last_hidden_state
        return [{"features": row.cpu()} for row in features[:, :CAPTION_TOKENS]]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(OpenSoraSettings):
    """Open-Sora's keys, whose entries hold sizes."""

    model: dict = video_option({}, "sizes of the denoiser")
    vae: dict = video_option({}, "sizes of the VAE")
    text_encoder: dict = video_option({}, "sizes of the text encoder")


class RandomOpenSora(OpenSora):
    """The family without files."""

    settings_class = BenchmarkSettings
    weights = {}
    text_weights = ()

    @classmethod
    def config_errors(cls, settings, models, video, training: bool) -> list[str]:
        return []

    @property
    def text_identity(self) -> str:
        return "random"

    def text_encoder(self) -> RandomT5:
        entry = self.settings.text_encoder
        sizes = {k: v for k, v in entry.items() if k not in ("type", "model_max_length")}
        return RandomT5(sizes, self.device, self.dtype)

    def load_vae(self) -> nn.Module:
        with self.device:
            return super().load_vae()

    def load_denoiser(self) -> nn.Module:
        with self.device:
            return super().load_denoiser()


class RandomFeatures(TextEncoder):
    """Features of the right shape without an encoder, which a training step does not run either."""

    def __init__(self, width: int, dtype: torch.dtype):
        self.width, self.dtype = width, dtype

    def encode(self, captions: Sequence[str]) -> list[Features]:
        shape = (CAPTION_TOKENS, self.width)
        drawn = [torch.randn(shape, generator=rng.generator(0, "features", caption)) for caption in captions]
        return [{"features": features.to(self.dtype)} for features in drawn]


@dataclass(frozen=True, kw_only=True)
class BenchmarkWanSettings(WanSettings):
    """Wan's keys, with the sizes of its networks."""

    components: dict = video_option({}, "component → its configuration, as diffusers keeps it")


class RandomWan(Wan):
    """The family without weights: its folder holds the configurations alone."""

    settings_class = BenchmarkWanSettings
    settings: BenchmarkWanSettings

    @classmethod
    def config_errors(cls, settings, models, video, training: bool) -> list[str]:
        return []

    @classmethod
    def prompt_errors(cls, prompts, settings, video, training: bool) -> list[str]:
        return []

    @property
    def text_identity(self) -> str:
        return "random"

    @functools.cached_property
    def folder(self) -> Path:
        self._kept = tempfile.TemporaryDirectory()  # deleted with this object
        return save_configs(Path(self._kept.name), self.settings.components)

    def text_encoder(self) -> RandomFeatures:
        return RandomFeatures(self.read_config("transformer")["text_dim"], self.dtype)

    def load_network(self, kind: type, component: str, dtype: torch.dtype) -> nn.Module:
        """A network in ``dtype`` except for what diffusers keeps in float32 when it loads one."""
        with self.device:
            network = kind.from_config(dict(self.read_config(component)))  # type: ignore[attr-defined]
        exact = set(getattr(network, "_keep_in_fp32_modules", None) or ())
        for name, parameter in network.named_parameters():
            if not exact & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        keep_out_of_autocast(network, exact)
        return network


def save_configs(folder: Path, components: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write configurations in diffusers' layout; ``index`` among them is that of the pipeline."""
    for name, values in components.items():
        file = folder / INDEX if name == "index" else folder / name / MARKERS.get(name, "config.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    return folder


def registered() -> AbstractContextManager:
    """Context that registers the model families ``backbone="benchmark"`` and ``"benchmark-wan"``."""
    return mock.patch.dict(BACKBONES, {"benchmark": RandomOpenSora, "benchmark-wan": RandomWan})


class RandomHPS(ImageReward):
    """HPS v2's image tower. Text features are random, since the text tower runs once per text and is then cached.

    Args:
        sizes: of the image tower.
        text: sizes of the text tower, which is there for its memory alone; None for none.
    """

    info = RewardInfo(name="benchmark", summary="ViT with random weights", range="-1 to 1")

    def __init__(self, sizes: dict, text: dict | None = None):
        super().__init__()
        self.text = CLIPTextModelWithProjection(CLIPTextConfig(**text)) if text else None
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_act="gelu", **sizes))
        side = sizes["image_size"]
        transform = ImageTransform(height=side, width=side, fit="pad")
        self.image = ImageTower(model.vision_model, model.visual_projection, transform)
        self.width = sizes["projection_dim"]

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        text = torch.stack([torch.randn(self.width, generator=rng.generator(0, "text", p)) for p in prompts])
        return (self.image(images) * unit(text.to(images.device))).sum(dim=-1)

    def loss(self, score: Tensor) -> Tensor:
        return 1 - score
