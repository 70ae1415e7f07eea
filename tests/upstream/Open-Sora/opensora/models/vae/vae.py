import os

import torch
import torch.nn as nn
from diffusers.models import AutoencoderKL
from einops import rearrange
from transformers import PretrainedConfig, PreTrainedModel

from opensora.registry import MODELS, build_module
from opensora.utils.ckpt_utils import load_checkpoint


@MODELS.register_module()
class VideoAutoencoderKL(nn.Module):
    def __init__(
        self,
        from_pretrained=None,
        micro_batch_size=None,
        cache_dir=None,
        local_files_only=False,
        subfolder=None,
    ):
        super().__init__()
        self.module = AutoencoderKL.from_pretrained(
            from_pretrained, cache_dir=cache_dir, local_files_only=local_files_only, subfolder=subfolder
        )
        self.out_channels = self.module.config.latent_channels
        self.patch_size = (1, 8, 8)
        self.micro_batch_size = micro_batch_size

    def by_frame(self, x, fn):
        frames = rearrange(x, "B C T H W -> (B T) C H W")
        parts = [fn(part) for part in frames.split(self.micro_batch_size or len(frames))]
        return rearrange(torch.cat(parts), "(B T) C H W -> B C T H W", B=len(x))

    def encode(self, x):
        return self.by_frame(x, lambda part: self.module.encode(part).latent_dist.mode() * 0.18215)

    def decode(self, x, **kwargs):
        return self.by_frame(x, lambda part: self.module.decode(part / 0.18215).sample)

    def get_latent_size(self, input_size):
        return [n // p if n is not None else None for n, p in zip(input_size, self.patch_size, strict=True)]


class VideoAutoencoderPipelineConfig(PretrainedConfig):
    model_type = "VideoAutoencoderPipeline"

    def __init__(
        self,
        vae_2d=None,
        vae_temporal=None,
        from_pretrained=None,
        freeze_vae_2d=False,
        cal_loss=False,
        micro_frame_size=None,
        shift=0.0,
        scale=1.0,
        **kwargs,
    ):
        self.vae_2d = vae_2d
        self.vae_temporal = vae_temporal
        self.from_pretrained = from_pretrained
        self.freeze_vae_2d = freeze_vae_2d
        self.cal_loss = cal_loss
        self.micro_frame_size = micro_frame_size
        self.shift = shift
        self.scale = scale
        super().__init__(**kwargs)


class VideoAutoencoderPipeline(PreTrainedModel):
    config_class = VideoAutoencoderPipelineConfig

    def __init__(self, config):
        super().__init__(config)
        self.spatial_vae = build_module(config.vae_2d, MODELS)
        self.temporal_vae = build_module(config.vae_temporal, MODELS)
        self.cal_loss = config.cal_loss
        self.micro_frame_size = config.micro_frame_size
        self.micro_z_frame_size = self.temporal_vae.get_latent_size([config.micro_frame_size, None, None])[0]
        self.out_channels = self.temporal_vae.out_channels
        self.register_buffer("scale", torch.tensor(config.scale)[None, :, None, None, None])
        self.register_buffer("shift", torch.tensor(config.shift)[None, :, None, None, None])

    def encode(self, x):
        x_z = self.spatial_vae.encode(x)
        parts = [self.temporal_vae.encode(part).sample() for part in x_z.split(self.micro_frame_size, dim=2)]
        return (torch.cat(parts, dim=2) - self.shift) / self.scale

    def decode(self, z, num_frames=None):
        z = z * self.scale.to(z.dtype) + self.shift.to(z.dtype)
        parts = []
        for part in z.split(self.micro_z_frame_size, dim=2):
            parts.append(self.temporal_vae.decode(part, num_frames=min(self.micro_frame_size, num_frames)))
            num_frames -= self.micro_frame_size
        return self.spatial_vae.decode(torch.cat(parts, dim=2))

    def get_latent_size(self, input_size):
        frames, *space = self.spatial_vae.get_latent_size(input_size)
        whole, rest = divmod(frames, self.micro_frame_size)
        rest_size = self.temporal_vae.get_latent_size([rest, None, None])[0]
        return [whole * self.micro_z_frame_size + rest_size, *space]


@MODELS.register_module()
def OpenSoraVAE_V1_2(
    micro_batch_size=4,
    micro_frame_size=17,
    from_pretrained=None,
    local_files_only=False,
    freeze_vae_2d=False,
    cal_loss=False,
):
    kwargs = dict(
        vae_2d=dict(
            type="VideoAutoencoderKL",
            from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            subfolder="vae",
            micro_batch_size=micro_batch_size,
            local_files_only=local_files_only,
        ),
        vae_temporal=dict(type="VAE_Temporal_SD", from_pretrained=None),
        freeze_vae_2d=freeze_vae_2d,
        cal_loss=cal_loss,
        micro_frame_size=micro_frame_size,
        shift=(-0.10, 0.34, 0.27, 0.98),
        scale=(3.85, 2.32, 2.33, 3.06),
    )
    if from_pretrained is not None and not os.path.isdir(from_pretrained):
        return VideoAutoencoderPipeline.from_pretrained(from_pretrained, **kwargs)
    model = VideoAutoencoderPipeline(VideoAutoencoderPipelineConfig(**kwargs))
    if from_pretrained:
        load_checkpoint(model, from_pretrained)
    return model
