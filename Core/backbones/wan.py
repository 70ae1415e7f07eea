"""Wan 2.1 and 2.2 (Wan Team, 2025): text to video, and image to video where the checkpoint takes a first frame.

Three kinds of checkpoint share one pipeline of diffusers: one denoiser (2.1; 2.2 TI2V-5B, with a finer VAE and a
timestep per token), and two denoisers that take turns at a noise level (2.2 A14B).

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels,
L text tokens, D text width, S tokens of the denoiser.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Core.modules import lora, lora_names
from Core.modules.frozen_conv import convolve_input
from Core.modules.recompute import recomputed
from Core.modules.sharding import raised_anywhere
from Core.sampling import guidance
from Core.sampling.euler import Predict, per_video
from Core.sampling.guidance import Combine
from Core.sampling.scheduler_step import SchedulerStep
from Core.utils.damage import read_settings
from Core.utils.hub import present
from Core.utils.options import option, video_option

from .base import EncodedPrompt, Features, ModelSettings, TextEncoder, VideoSettings, VideoSpec
from .causal_decode import CausalDecode
from .diffusers_base import DiffusersSettings, Published, clean_caption, pad_features
from .diffusers_files import INDEX, component_config
from .image_prompts import ImagePrompt, first_frame, parse_image_prompts, picture_errors

TEXT_SIZE = 22_700_000_000  # UMT5-XXL in float32
KEPT_PICTURES = 256  # whose latents wait on the CPU
BLOCK_CACHES = 2  # of a residual block of the VAE, one for each convolution
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
WIDE, TALL = "9:16", "16:9"  # height:width


@dataclass(frozen=True, kw_only=True)
class WanSettings(DiffusersSettings):
    """Keys of Wan."""

    model_path: str = video_option(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "hub id or local folder of the pipeline, in the layout of diffusers",
    )
    vae_dtype: Literal["bf16", "fp32"] = video_option(
        "fp32",
        "dtype of the VAE where dtype is `bf16` or `fp8`; with `fp16` and `fp32` it computes in float32",
    )
    shift: float | None = video_option(
        None,
        "how far timesteps are shifted towards noise: 3 suits 480p, 5 suits 720p; None = the checkpoint's own",
        above=0,
    )
    sampler: Literal["euler", "unipc"] = video_option(
        "euler", "sampler of finished videos; training and its validation take `euler`"
    )
    schedule: Literal["euler", "unipc"] = video_option(
        "euler",
        "noise levels of `euler` steps: those of diffusers' Euler scheduler, whose last step is very short, or those "
        "of its UniPC, evenly spread before the shift, which give the last steps more to do in training",
    )
    guidance_scale_2: float | None = video_option(
        None, "guidance scale of A14B's low-noise expert; None = guidance_scale", minimum=1
    )
    train_experts: Literal["both", "high_noise", "low_noise"] = option(
        "both", "experts of A14B that get an adapter"
    )


class Experts(nn.Module):
    """Two denoisers that take turns: one above a noise level, the other below it.

    Args:
        in_step: an expert that any process asks runs on all, since they are split over the processes.
    """

    def __init__(self, high_noise: nn.Module, low_noise: nn.Module, boundary: float, in_step: bool = False):
        super().__init__()
        self.high_noise, self.low_noise, self.boundary = high_noise, low_noise, boundary
        self.in_step = in_step

    def save_pretrained(self, folder: Path) -> None:
        """Each expert into the folder that a pipeline has for it."""
        for name, component in EXPERTS.items():
            getattr(self, name).save_pretrained(Path(folder) / component)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.high_noise.blocks, *self.low_noise.blocks]

    def forward(self, hidden_states: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        """hidden_states [B, C, T, h, w], timestep [B], conditions [B, …] → velocity [B, C', T, h, w]."""
        high = timestep >= self.boundary
        asked = torch.stack([high.any(), ~high.all()])
        asks_high, asks_low = (raised_anywhere(asked) if self.in_step else asked).tolist()
        if not asks_low:
            return self.high_noise(hidden_states, timestep, **condition)[0]
        if not asks_high:
            return self.low_noise(hidden_states, timestep, **condition)[0]
        # An expert that is asked elsewhere alone runs on the first row, whose result is left out.
        rows = [torch.nonzero(own)[:, 0] if own.any() else high.new_zeros(1).long() for own in (high, ~high)]
        parts = [
            expert(
                hidden_states[own], timestep[own], **{key: value[own] for key, value in condition.items()}
            )[0]
            for expert, own in zip((self.high_noise, self.low_noise), rows, strict=True)
        ]
        places = torch.where(high, high.cumsum(0), len(rows[0]) + (~high).cumsum(0)) - 1
        return torch.cat(parts)[places]


def picture_fault(folder: Path, given: bool) -> str:
    """What is wrong with giving a first frame, or none, to the pipeline in ``folder``; '' where nothing is."""
    index, denoiser = read_settings(folder / INDEX), component_config(folder, "transformer")
    needed = denoiser["in_channels"] > component_config(folder, "vae")["z_dim"]
    if needed and not given:
        return 'this model makes videos of pictures: end every prompt in {"reference_path": "picture.png"}'
    if given and not needed and not index.get("expand_timesteps"):
        return "this model takes no first frame; remove reference_path, or use Wan 2.2 TI2V-5B or I2V-A14B"
    return ""


class Wan(CausalDecode):
    """Wan 2.1 T2V, 2.2 TI2V and 2.2 A14B, in diffusers' layout."""

    settings_class = WanSettings
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    denoiser_class = "WanTransformer3DModel"
    optional_components = ("transformer_2",)
    published = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published("Apache-2.0", 6_200_000_000, TEXT_SIZE),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": Published("Apache-2.0", 57_700_000_000, TEXT_SIZE),
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": Published("Apache-2.0", 22_800_000_000, TEXT_SIZE),
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": Published("Apache-2.0", 114_900_000_000, TEXT_SIZE),
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": Published("Apache-2.0", 114_900_000_000, TEXT_SIZE),
    }
    sizes = {
        "480p": {WIDE: (480, 832), TALL: (832, 480), "1:1": (624, 624)},
        "704p": {WIDE: (704, 1280), TALL: (1280, 704)},
        "720p": {WIDE: (720, 1280), TALL: (1280, 720), "1:1": (960, 960)},
    }
    original_names = lora_names.WAN
    diffusers_component = "transformer"
    experts = tuple(EXPERTS)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    settings: WanSettings

    def __init__(self, settings: WanSettings, models: ModelSettings, video: VideoSpec, device: torch.device):
        super().__init__(settings, models, video, device)
        self._pictures: dict[str, Tensor] = {}

    # Before anything loads

    @classmethod
    def pipeline_errors(cls, folder: Path, settings: WanSettings) -> list[str]:
        if component_config(folder, "transformer").get("image_dim") is not None:
            return [
                f"model_path: {settings.model_path!r} is a Wan 2.1 image-to-video model, which is not supported; use "
                "Wan 2.2 TI2V-5B or I2V-A14B"
            ]
        if len(cls.denoiser_parts(folder)) > 1:
            return []
        given = {"train_experts": settings.train_experts, "guidance_scale_2": settings.guidance_scale_2}
        defaults = WanSettings()
        return [
            f"{key}={value!r} has an effect on Wan 2.2 A14B alone, which has two experts; remove it"
            for key, value in given.items()
            if value != getattr(defaults, key)
        ]

    @classmethod
    def size_multiple(cls, folder: Path) -> int:
        patch = component_config(folder, "transformer")["patch_size"][1]
        return component_config(folder, "vae").get("scale_factor_spatial", 8) * patch

    @classmethod
    def denoiser_parts(cls, folder: Path) -> Mapping[str, str]:
        if read_settings(folder / INDEX).get("boundary_ratio") is None:
            return super().denoiser_parts(folder)
        return {f"{expert}.": component for expert, component in EXPERTS.items()}

    @classmethod
    def parse_prompts(cls, texts: Sequence[str], settings: Any = None) -> list[ImagePrompt]:
        return parse_image_prompts(texts)

    @classmethod
    def prompt_errors(
        cls, prompts: Sequence[Any], settings: WanSettings, video: VideoSettings, training: bool
    ) -> list[str]:
        weight = cls.weights_of(settings)["model_path"]
        folder = present(weight)
        if errors := picture_errors(prompts):
            return errors
        # Of a repository that is yet to be fetched the same is said when it is loaded.
        known = folder and not weight.lacks(folder)
        error = picture_fault(folder, any(p.reference for p in prompts)) if folder and known else ""
        return [error] if error else []

    # Networks

    @functools.cached_property
    def index(self) -> Mapping[str, Any]:
        return read_settings(self.folder / INDEX)

    @functools.cached_property
    def is_two_experts(self) -> bool:
        return len(self.denoiser_parts(self.folder)) > 1

    @property
    def expands_timesteps(self) -> bool:
        """Whether the denoiser takes a timestep per token, so that a given first frame has no noise."""
        return bool(self.index.get("expand_timesteps"))

    @property
    def partly_adapted(self) -> bool:
        return self.settings.train_experts != "both"

    @property
    def boundary(self) -> float:
        """The timestep from which on the high-noise expert is asked."""
        return self.index["boundary_ratio"] * self.process.num_timesteps

    def load_denoiser(self) -> nn.Module:
        first, *second = map(self.load_denoiser_part, self.denoiser_parts(self.folder).values())
        return Experts(first, second[0], self.boundary, self.mesh is not None) if second else first

    def load_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLWan

        return self.load_network(AutoencoderKLWan, "vae", self.vae_dtype)

    def load(self) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        super().load()
        for module in self.vae.modules():
            if isinstance(module, WanCausalConv3d):
                module.forward = functools.partial(_convolve, module)

    def text_encoder(self) -> TextEncoder:
        from transformers import UMT5EncoderModel

        return self.padded_text(UMT5EncoderModel, masked=True, trim=True)

    def caption(self, text: str) -> str:
        return clean_caption(text)  # as the pipeline does

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.blocks)

    def adapter_targets(self, suffixes: Sequence[str]) -> list[str]:
        expert = self.settings.train_experts
        if expert == "both" or not self.is_two_experts:
            return list(suffixes)
        layers = [name for name, module in self.denoiser.named_modules() if isinstance(module, lora.ADAPTED)]
        own = [name for name in layers if name.startswith(f"{expert}.")]
        if errors := [error for suffix in suffixes if (error := lora.target_error(suffix, own))]:
            raise ValueError(f"{errors[0]}, in the expert that train_experts={expert!r} names")
        return [name for name in own if any(name == s or name.endswith(f".{s}") for s in suffixes)]

    def enable_checkpointing(self, keep_attention: bool = False) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

        super().enable_checkpointing(keep_attention)
        for block in self.vae.decoder.modules():
            if isinstance(block, WanResidualBlock):
                block.forward = functools.partial(_recomputed_block, block.forward)

    # Sampling

    def latent_shape(self) -> tuple[int, int, int, int]:
        vae = self.read_config("vae")
        scale = vae.get("scale_factor_spatial", 8)
        frames = self.count_latent_frames(self.video.num_frames, self.settings)
        return vae["z_dim"], frames, self.video.height // scale, self.video.width // scale

    @functools.cached_property
    def shift(self) -> float:
        config = self.read_config("scheduler")
        return self.settings.shift or config.get("flow_shift") or config.get("shift") or 1.0

    def timesteps(self, batch: int) -> Tensor:
        return self._timesteps[:, None].expand(-1, batch)

    @functools.cached_property
    def _timesteps(self) -> Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        if self.settings.schedule == "unipc":
            return self._unipc().sigmas[:-1].to(self.device) * self.process.num_timesteps
        scheduler = FlowMatchEulerDiscreteScheduler(self.process.num_timesteps, shift=self.shift)
        scheduler.set_timesteps(self.settings.num_sampling_steps, device=self.device)
        return scheduler.timesteps

    def _unipc(self) -> Any:
        from diffusers import UniPCMultistepScheduler

        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": self.shift}
        scheduler = UniPCMultistepScheduler.from_config(dict(self.read_config("scheduler")), **flow)
        scheduler.set_timesteps(self.settings.num_sampling_steps, device=self.device)
        return scheduler

    def inference_step(self, predict: Predict, generators: Sequence[torch.Generator]) -> Any:
        if self.settings.sampler == "euler":
            return super().inference_step(predict, generators)
        return SchedulerStep(predict, self._unipc(), len(generators))

    @property
    def combine(self) -> Combine | None:
        high, low = self.settings.guidance_scale, self.settings.guidance_scale_2
        if low is None or low == high or not self.is_two_experts:
            return guidance.linear(high)

        def by_expert(text: Tensor, null: Tensor, t: Tensor) -> Tensor:
            scale = torch.where(t >= self.boundary, high, low).to(text.dtype)
            return null + per_video(scale) * (text - null)

        return by_expert

    @property
    def is_guided(self) -> bool:
        return max(self.settings.guidance_scale, self.settings.guidance_scale_2 or 1) > 1

    def features(self, encoded: EncodedPrompt, clip: int = 0) -> Features:
        features, picture = super().features(encoded, clip), encoded.prompt.reference  # type: ignore[attr-defined]
        return features if picture is None else {**features, "image": self._image_latents(picture)}

    def batch_text(self, text: Sequence[Features]) -> dict[str, Tensor]:
        rows = [features["features"] for features in text]
        batch = {"text": pad_features(rows, self.settings.max_sequence_length, self.device)}
        images = [features["image"] for features in text if "image" in features]
        if fault := picture_fault(self.folder, bool(images)):
            raise ValueError(fault)
        if images:
            batch["image"] = torch.stack(images).to(self.device)
        return batch

    @torch.no_grad()
    def _image_latents(self, picture: str) -> Tensor:
        """Latents that hold a first frame, [C, 1 or T, h, w], on the CPU; those of the last pictures are kept."""
        if picture in self._pictures:
            return self._pictures[picture]
        image = first_frame(picture, (self.video.height, self.video.width)).to(self.device)
        frames = image[None, :, None]
        if not self.expands_timesteps:
            frames = F.pad(frames, (0, 0, 0, 0, 0, self.video.num_frames - 1))
        with torch.autocast(self.device.type, enabled=False):
            z = self.vae.encode(frames.to(self.vae.dtype)).latent_dist.mode().float()
        mean, std = self._latent_statistics(z)
        if len(self._pictures) >= KEPT_PICTURES:
            self._pictures.clear()
        self._pictures[picture] = ((z - mean) / std)[0].cpu()
        return self._pictures[picture]

    def predict(self, z: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        if "image" in condition and self.expands_timesteps:
            return self._predict_after_image(z, t, condition["text"], condition["image"])
        x = z
        if "image" in condition:
            given = torch.zeros_like(z[:, :4])
            given[:, :, 0] = 1
            x = torch.cat([z, given, condition["image"].to(z)], dim=1)
        return -self._denoise(x, t, condition["text"]).to(z.dtype)

    def _predict_after_image(self, z: Tensor, t: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """Velocity where the first latent frame is given: the network sees it without noise, and it is led to.

        Its velocity goes straight from the latent to the image, so that sampling ends in the image exactly.
        """
        height, width = (side // 2 for side in z.shape[-2:])
        tokens = t[:, None].repeat(1, z.shape[2])
        tokens[:, 0] = 0
        x = torch.cat([image.to(z), z[:, :, 1:]], dim=2)
        velocity = -self._denoise(x, tokens.repeat_interleave(height * width, dim=1), text).to(z.dtype)
        to_image = (image.to(z) - z[:, :, :1]) / per_video(self._noise_levels(t))
        return torch.cat([to_image, velocity[:, :, 1:]], dim=2)

    def _noise_levels(self, t: Tensor) -> Tensor:
        """Noise levels in [0, 1] of the latents at timesteps ``t`` [B]."""
        exact = t / self.process.num_timesteps
        if t.is_floating_point():
            return exact
        # Integers are those of UniPC's sampler, which steps from the levels that they were rounded from.
        timesteps, levels = self._unipc_levels
        own = t[:, None] == timesteps
        return torch.where(own.any(1), levels[own.int().argmax(1)], exact)

    @functools.cached_property
    def _unipc_levels(self) -> tuple[Tensor, Tensor]:
        """Whole timesteps and exact noise levels [N] of UniPC's steps."""
        scheduler = self._unipc()
        return scheduler.timesteps, scheduler.sigmas[:-1].to(self.device)

    def _denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The network's own velocity, noise − data."""
        out = self.denoiser(x.to(self.dtype), t, encoder_hidden_states=text.to(self.dtype))
        return out if isinstance(out, Tensor) else out[0]

    # Pixels

    def _latent_statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        return tuple(
            torch.tensor(v).to(z).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )

    def _to_vae(self, z: Tensor) -> Tensor:
        mean, std = self._latent_statistics(z)
        return z * std + mean

    @property
    def _tiles(self) -> tuple[int, int]:
        scale = self.vae.spatial_compression_ratio
        return self.vae.tile_sample_min_height // scale, self.vae.tile_sample_stride_height // scale

    def _to_pixels(self, decoded: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        return unpatchify(decoded, self.vae.config.patch_size or 1)

    def _decode_step(self, z: Tensor, cache: Any, last: bool = False) -> tuple[Tensor, Any]:
        """One latent frame's pixels, in the VAE's own patches, and the cache for the next."""
        # The decoder writes into the list it is given; a copy leaves the caller's cache as it was.
        given = cache or [None] * self.vae._cached_conv_counts["decoder"]
        kept = _Unwritten(given) if last else list(given)
        pixels = self.vae.decoder(
            self.vae.post_quant_conv(z), feat_cache=kept, feat_idx=[0], first_chunk=cache is None
        )
        return pixels, None if last else tuple(kept)


def _convolve(conv: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """A causal convolution of the VAE over [B, C, T, h, w], and over the frames before where they are given.

    diffusers pads rows and columns beforehand, which copies every frame once more.
    """
    columns, _, rows, _, past, _ = conv._padding
    if cache_x is not None and past:
        x, past = torch.cat([cache_x, x], dim=2), past - cache_x.shape[2]
    if past:
        x = F.pad(x, (0, 0, 0, 0, past, 0))
    return convolve_input(conv, x, (0, rows, columns))


class _Unwritten(list):
    """The cache of a latent frame that none follows: the decoder reads it, and what it writes is let go."""

    def __setitem__(self, place: Any, value: Any) -> None:
        """Keep nothing."""


def _recomputed_block(
    forward: Callable[..., Tensor], x: Tensor, feat_cache: list[Any], feat_idx: list[int]
) -> Tensor:
    """A residual block of the decoder, recomputed by itself: a whole latent frame's graph is larger than the denoiser.

    The block writes into the list that it is given, which must be the same when it runs again.
    """
    start = feat_idx[0]
    own = slice(start, start + BLOCK_CACHES)

    def run(x: Tensor, *kept: Any) -> tuple[Any, ...]:
        caches = list(kept)
        return forward(x, feat_cache=caches, feat_idx=[0]), *caches

    out, *feat_cache[own] = recomputed(run)(x, *feat_cache[own])
    feat_idx[0] = start + BLOCK_CACHES
    return out
