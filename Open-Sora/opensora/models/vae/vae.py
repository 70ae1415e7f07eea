"""The Open-Sora 1.2 video VAE: an image VAE per frame, then a temporal VAE over chunks of 17 frames.

Axes: B batch, C channels, T frames, H rows, W columns.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from opensora.registry import MODELS, build_module
from opensora.utils.ckpt_utils import find_checkpoint, load_pretrained, read_config, save_pretrained

SCALING_FACTOR = 0.18215
LATENT_SHIFT = (-0.10, 0.34, 0.27, 0.98)
LATENT_SCALE = (3.85, 2.32, 2.33, 3.06)

# The image VAE of SDXL, as OpenSora-VAE-v1.2 holds it.
SDXL_VAE = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    norm_num_groups=32,
    sample_size=512,
    scaling_factor=SCALING_FACTOR,
)


@MODELS.register_module()
class VideoAutoencoderKL(nn.Module):
    """diffusers' ``AutoencoderKL`` on the frames of a video, a few at a time.

    Args:
        from_pretrained: hub id or folder of an ``AutoencoderKL``; None for fresh weights.
        micro_batch_size: frames per forward pass; None for all at once.
        subfolder: where in ``from_pretrained`` the VAE lies.
        local_files_only: never ask the network.
        config: keyword arguments of ``AutoencoderKL`` in place of ``from_pretrained``.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        micro_batch_size: int | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        scaling_factor: float = SCALING_FACTOR,
        config: dict | None = None,
    ):
        super().__init__()
        if from_pretrained and config:
            raise ValueError("give VideoAutoencoderKL either from_pretrained or config, not both")
        if from_pretrained:
            self.module = AutoencoderKL.from_pretrained(
                from_pretrained, cache_dir=cache_dir, local_files_only=local_files_only, subfolder=subfolder
            )
        else:
            self.module = AutoencoderKL(**(config or SDXL_VAE))
        factor = 2 ** (len(self.module.config.block_out_channels) - 1)
        self.out_channels = self.module.config.latent_channels
        self.patch_size = (1, factor, factor)
        self.micro_batch_size = micro_batch_size
        self.scaling_factor = scaling_factor

    def encode(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] → latents [B, C, T, H/8, W/8], the mode of the posterior."""
        return self._per_frame(x, lambda f: self.module.encode(f).latent_dist.mode() * self.scaling_factor)

    def decode(self, x: Tensor, **kwargs) -> Tensor:
        """Latents [B, C, T, h, w] → pixels [B, 3, T, 8h, 8w], about [-1, 1]."""
        return self._per_frame(x, lambda f: self.module.decode(f / self.scaling_factor).sample)

    def _per_frame(self, x: Tensor, fn) -> Tensor:
        frames = rearrange(x, "B C T H W -> (B T) C H W")
        parts = [fn(part) for part in frames.split(self.micro_batch_size or len(frames))]
        return rearrange(torch.cat(parts), "(B T) C H W -> B C T H W", B=x.shape[0])

    def get_latent_size(self, input_size: list[int | None]) -> list[int | None]:
        """[T, H, W] of a video → of its latent; None stays None."""
        pairs = zip(input_size, self.patch_size, strict=True)
        return [None if size is None else size // patch for size, patch in pairs]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


@dataclass(kw_only=True)
class VideoAutoencoderPipelineConfig:
    """What ``VideoAutoencoderPipeline`` is built of; the defaults are those of OpenSora-VAE-v1.2.

    vae_2d, vae_temporal: registry entries of the two halves.
    micro_frame_size: frames per chunk; each chunk is coded on its own. None for the whole video at once.
    shift, scale: per channel; a latent is (raw − shift) / scale.
    cal_loss: only False; upstream trains the VAE with it.
    freeze_vae_2d: no gradients for the image VAE's weights.
    """

    vae_2d: dict | None = None
    vae_temporal: dict | None = None
    from_pretrained: str | None = None
    freeze_vae_2d: bool = False
    cal_loss: bool = False
    micro_frame_size: int | None = None
    shift: tuple[float, ...] | float = 0.0
    scale: tuple[float, ...] | float = 1.0

    def to_dict(self) -> dict:
        return asdict(self)


class VideoAutoencoderPipeline(nn.Module):
    """Image VAE and temporal VAE in a row, over chunks of ``micro_frame_size`` frames."""

    def __init__(self, config: VideoAutoencoderPipelineConfig):
        super().__init__()
        if config.cal_loss:
            raise ValueError("cal_loss=True is for training the VAE, which is not done here; set False")
        self.config = config
        self.spatial_vae = build_module(config.vae_2d, MODELS)
        self.temporal_vae = build_module(config.vae_temporal, MODELS)
        self.out_channels = self.temporal_vae.out_channels
        self.micro_frame_size = config.micro_frame_size
        self.micro_z_frame_size = self.temporal_vae.get_latent_size([config.micro_frame_size, None, None])[0]
        if config.freeze_vae_2d:
            self.spatial_vae.requires_grad_(False)
        self.register_buffer("scale", _per_channel(config.scale))
        self.register_buffer("shift", _per_channel(config.shift))
        if config.from_pretrained:
            load_pretrained(self, config.from_pretrained)

    def encode(self, x: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] → latents [B, C, T', H/8, W/8], the mode of the posterior."""
        x_z = self.spatial_vae.encode(x)
        chunks = x_z.split(self.micro_frame_size or x_z.shape[2], dim=2)
        z = torch.cat([self.temporal_vae.encode(chunk).mode() for chunk in chunks], dim=2)
        return (z - self.shift) / self.scale

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Latents [B, C, T', h, w] → pixels [B, 3, num_frames, 8h, 8w], about [-1, 1]."""
        z = z * self.scale.to(z.dtype) + self.shift.to(z.dtype)
        chunks = z.split(self.micro_z_frame_size or z.shape[2], dim=2)
        done, parts = 0, []
        for chunk in chunks:
            frames = min(self.micro_frame_size or num_frames, num_frames - done)
            parts.append(self.temporal_vae.decode(chunk, num_frames=frames))
            done += frames
        return self.spatial_vae.decode(torch.cat(parts, dim=2))

    def get_latent_size(self, input_size: list[int | None]) -> list[int | None]:
        """[T, H, W] of a video → of its latent; None stays None."""
        frames, *space = self.spatial_vae.get_latent_size(input_size)
        if self.micro_frame_size is None or frames is None:
            return self.temporal_vae.get_latent_size([frames, *space])
        whole, rest = divmod(frames, self.micro_frame_size)
        rest_size = self.temporal_vae.get_latent_size([rest, None, None])[0]
        return [whole * self.micro_z_frame_size + rest_size, *space]

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | Path) -> None:
        save_pretrained(self, self.config.to_dict(), folder)


def _per_channel(value: tuple[float, ...] | float) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float32)
    return tensor.view(1, -1, 1, 1, 1) if tensor.dim() else tensor


@MODELS.register_module("OpenSoraVAE_V1_2")
def OpenSoraVAE_V1_2(
    micro_batch_size: int = 4,
    micro_frame_size: int | None = 17,
    from_pretrained: str | None = None,
    local_files_only: bool = False,
    freeze_vae_2d: bool = False,
    cal_loss: bool = False,
    force_huggingface: bool = False,
) -> VideoAutoencoderPipeline:
    """The VAE of ``hpcai-tech/OpenSora-VAE-v1.2``: a hub id, a folder in its layout, or one file.

    A folder whose ``config.json`` describes the halves through ``vae_2d.config`` and ``vae_temporal`` gives a
    VAE of those sizes; without one the released sizes hold. ``force_huggingface`` is upstream's name for "this is
    a hub id"; what exists on disk is used first.
    """
    if from_pretrained:
        from_pretrained = str(find_checkpoint(from_pretrained, local_files_only))
    stored = read_config(from_pretrained) if from_pretrained else {}
    sizes = (stored.get("vae_2d") or {}).get("config")
    temporal = {**(stored.get("vae_temporal") or {}), "type": "VAE_Temporal"}
    temporal.pop("from_pretrained", None)
    config = VideoAutoencoderPipelineConfig(
        vae_2d=dict(type="VideoAutoencoderKL", config=sizes, micro_batch_size=micro_batch_size),
        vae_temporal=temporal,
        freeze_vae_2d=freeze_vae_2d,
        cal_loss=cal_loss,
        micro_frame_size=micro_frame_size,
        shift=stored["shift"] if sizes else LATENT_SHIFT,
        scale=stored["scale"] if sizes else LATENT_SCALE,
    )
    if not from_pretrained:
        return VideoAutoencoderPipeline(config)
    with torch.device("meta"):
        vae = VideoAutoencoderPipeline(config)
    return load_pretrained(vae, from_pretrained)
