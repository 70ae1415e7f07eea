"""Temporal half of the Open-Sora 1.2 video VAE: causal 3-D convolutions that compress time by four.

Axes: B batch, C channels, T frames, H rows, W columns.
"""

import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange
from torch import Tensor, nn

from opensora.registry import MODELS


class CausalConv3d(nn.Module):
    """3-D convolution that sees the present and the past: time is padded with zeros in front only."""

    def __init__(
        self, chan_in: int, chan_out: int, kernel_size: int, time_stride: int = 1, bias: bool = True
    ):
        super().__init__()
        side = kernel_size // 2
        self.padding = (side, side, side, side, kernel_size - 1 + 1 - time_stride, 0)
        self.conv = nn.Conv3d(chan_in, chan_out, kernel_size, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    """Two normalised 3×3×3 convolutions and a shortcut, projected where the width changes."""

    def __init__(self, chan_in: int, chan_out: int, num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, chan_in)
        self.conv1 = CausalConv3d(chan_in, chan_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, chan_out)
        self.conv2 = CausalConv3d(chan_out, chan_out, 3, bias=False)
        self.conv3 = CausalConv3d(chan_in, chan_out, 1, bias=False) if chan_in != chan_out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        out = self.conv2(F.silu(self.norm2(out)))
        return out + (x if self.conv3 is None else self.conv3(x))


def res_blocks(count: int, chan_in: int, chan_out: int, num_groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResBlock(chan_in if i == 0 else chan_out, chan_out, num_groups) for i in range(count)
    )


class Encoder(nn.Module):
    """[B, C, T, H, W] → [B, C_latent, T / 4, H, W]."""

    def __init__(self, channels, latent_channels, filters, num_res_blocks, multipliers, downsample, groups):
        super().__init__()
        widths = [filters * m for m in multipliers]
        inputs = [filters, *widths[:-1]]
        self.conv_in = CausalConv3d(channels, filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            res_blocks(num_res_blocks, i, o, groups) for i, o in zip(inputs, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, time_stride=2) if down else nn.Identity()
            for width, down in zip(widths, downsample, strict=False)
        )
        self.res_blocks = res_blocks(num_res_blocks, widths[-1], widths[-1], groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            for block in blocks:
                x = block(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder(nn.Module):
    """[B, C_latent, T, H, W] → [B, C, 4·T, H, W]; a convolution makes the new frames, as extra channels."""

    def __init__(self, channels, latent_channels, filters, num_res_blocks, multipliers, downsample, groups):
        super().__init__()
        widths = [filters * m for m in multipliers]
        inputs = [*widths[1:], widths[-1]]
        self.conv1 = CausalConv3d(latent_channels, widths[-1], 3)
        self.res_blocks = res_blocks(num_res_blocks, widths[-1], widths[-1], groups)
        self.block_res_blocks = nn.ModuleList(
            res_blocks(num_res_blocks, i, o, groups) for i, o in zip(inputs, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if down else nn.Identity()
            for width, down in zip(widths[1:], downsample, strict=False)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x = block(x)
            if level > 0:
                x = self._upsample(x, self.conv_blocks[level - 1])
        return self.conv_out(F.silu(self.norm1(x)))

    @staticmethod
    def _upsample(x: Tensor, conv: nn.Module) -> Tensor:
        if isinstance(conv, nn.Identity):
            return x
        return rearrange(conv(x), "B (C t) T H W -> B C (T t) H W", t=2)


@MODELS.register_module("VAE_Temporal")
class VAE_Temporal(nn.Module):
    """Temporal VAE over the latents of the spatial one; the defaults are the released sizes.

    Args:
        in_out_channels: channels of the spatial latent.
        latent_embed_dim: channels inside, before and after the quantising convolutions.
        embed_dim: channels of the final latent.
        filters: width of the first level; ``channel_multipliers`` give those of all levels.
        temporal_downsample: whether time is halved after each level but the last.
        num_groups: groups of every GroupNorm.
    """

    def __init__(
        self,
        in_out_channels: int = 4,
        latent_embed_dim: int = 4,
        embed_dim: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        num_groups: int = 32,
    ):
        super().__init__()
        if len(temporal_downsample) != len(channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample needs one entry fewer than channel_multipliers, got "
                f"{len(temporal_downsample)} and {len(channel_multipliers)}"
            )
        self.time_downsample_factor = 2 ** sum(temporal_downsample)
        self.patch_size = (self.time_downsample_factor, 1, 1)
        self.out_channels = in_out_channels
        shape = (filters, num_res_blocks, channel_multipliers, temporal_downsample, num_groups)
        self.encoder = Encoder(in_out_channels, 2 * latent_embed_dim, *shape)
        self.quant_conv = CausalConv3d(2 * latent_embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = CausalConv3d(embed_dim, latent_embed_dim, 1)
        self.decoder = Decoder(in_out_channels, latent_embed_dim, *shape)

    def get_latent_size(self, input_size: list[int | None]) -> list[int | None]:
        """[T, H, W] of an input → of its latent; None stays None."""
        frames, *space = input_size
        return [None if frames is None else -(-frames // self.time_downsample_factor), *space]

    def _time_padding(self, num_frames: int) -> int:
        return -num_frames % self.time_downsample_factor

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """[B, C, T, H, W] → distribution over [B, C_latent, ceil(T / 4), H, W]."""
        x = F.pad(x, (0, 0, 0, 0, self._time_padding(x.shape[2]), 0))
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """[B, C_latent, T', H, W] → [B, C, num_frames, H, W]."""
        x = self.decoder(self.post_quant_conv(z))
        return x[:, :, self._time_padding(num_frames) :]
