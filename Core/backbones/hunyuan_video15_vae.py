"""HunyuanVideo 1.5's VAE decoder, one latent frame at a time.

diffusers decodes a clip in one pass, whose middle attention builds a mask over all pairs of positions. The decoder is
causal in time throughout, so that a frame needs of those before it only two frames at each convolution, and the
attention's keys and values: without a mask, and with the frame's activations alone in memory.

Axes: B batch, C channels, f frames at a layer, h, w rows and columns, S = h·w.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Core.modules.video_decode import Cache


def decode_step(decoder: nn.Module, z: Tensor, cache: Cache, last: bool = False) -> tuple[Tensor, Cache]:
    """One latent frame through ``AutoencoderKLHunyuanVideo15.decoder``.

    Args:
        z: latent frame [B, C, 1, h, w].
        cache: from the latent frame before; None at the first of a video.
        last: nothing is kept, for no latent frame follows.

    Returns:
        Pixels [B, 3, f, H, W], f = 1 at the first latent frame and 4 at others, and the cache for the next.
    """
    net: Any = decoder
    frame = _Frame(cache, last)
    x = frame.convolve(net.conv_in, z) + z.repeat_interleave(net.repeat, dim=1)
    x = frame.residual(net.mid_block.resnets[0], x)
    for attention, block in zip(net.mid_block.attentions, net.mid_block.resnets[1:], strict=True):
        x = frame.residual(block, frame.attend(attention, x))
    for up_block in net.up_blocks:
        for block in up_block.resnets:
            x = frame.residual(block, x)
        for upsampler in up_block.upsamplers or ():
            x = frame.upsample(upsampler, x)
    return frame.convolve(net.conv_out, net.conv_act(net.norm_out(x))), tuple(frame.kept)


class _Frame:
    """The layers that look back in time, for one latent frame; each takes its part of the cache in turn."""

    def __init__(self, cache: Cache, is_last: bool):
        self.is_first, self.is_last = cache is None, is_last
        self.before = iter(cache or ())
        self.kept: list[Any] = []

    def convolve(self, layer: Any, x: Tensor) -> Tensor:
        """A convolution over [B, C, f, h, w] and the frames before; at the start the first frame is repeated."""
        *sides, past, _ = layer.time_causal_padding
        before = x[:, :, :1].expand(-1, -1, past, -1, -1) if self.is_first else next(self.before)
        x = torch.cat([before, x], dim=2)
        if not self.is_last:
            self.kept.append(x[:, :, -past:].contiguous())
        return layer.conv(F.pad(x, (*sides, 0, 0), mode=layer.pad_mode))

    def residual(self, block: Any, x: Tensor) -> Tensor:
        h = self.convolve(block.conv1, block.nonlinearity(block.norm1(x)))
        h = self.convolve(block.conv2, block.nonlinearity(block.norm2(h)))
        return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    def attend(self, layer: Any, x: Tensor) -> Tensor:
        """Attention of one frame [B, C, 1, h, w] to itself and all frames before."""
        normed = layer.norm(x)
        query, key, value = (
            project(normed).flatten(2).transpose(1, 2)[:, None].contiguous()
            for project in (layer.to_q, layer.to_k, layer.to_v)
        )
        keys, values = ((), ()) if self.is_first else next(self.before)
        keys, values = (*keys, key), (*values, value)
        if not self.is_last:
            self.kept.append((keys, values))
        out = F.scaled_dot_product_attention(query, torch.cat(keys, dim=2), torch.cat(values, dim=2))
        return x + layer.proj_out(out[:, 0].transpose(1, 2).reshape(x.shape))

    def upsample(self, layer: Any, x: Tensor) -> Tensor:
        """Twice the rows and columns, and twice the frames except for the first of a video."""
        h, grow, repeats = self.convolve(layer.conv, x), layer._dcae_upsample_rearrange, layer.repeats
        if not layer.add_temporal_upsample:
            return grow(h) + grow(x.repeat_interleave(repeats, dim=1))
        if self.is_first:
            # A convolution made for two frames: the first half of its channels holds the only one.
            first = grow(h)
            return first[:, : first.shape[1] // 2] + grow(x).repeat_interleave(repeats // 2, dim=1)
        return grow(h, r1=2) + grow(x, r1=2).repeat_interleave(repeats, dim=1)
