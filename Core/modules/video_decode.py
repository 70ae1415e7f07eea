"""Pixels of a video VAE whose decoder runs one latent frame after the other, keeping what later frames need.

A decoder of this kind is causal in time: a frame depends on its own latent and on the cache of those before. The cache
goes in and comes out of a function here, so that a latent frame can be recomputed in the backward pass, and a frame in
the middle of a video be decoded without a graph through those before it.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, f frames of one latent frame, H, W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# What a decoder keeps of the latent frames before; None before the first.
Cache = Any
# (latent frame [B, C, 1, h, w], cache) → pixels [B, 3, f, H, W] and the cache for the next
DecodeStep = Callable[[Tensor, Cache], tuple[Tensor, Cache]]
# latents [B, C, T, h, w] → pixels [B, 3, F, H, W]
Decode = Callable[[Tensor], Tensor]


def recomputed(step: DecodeStep) -> DecodeStep:
    """``step`` that keeps its inputs alone and is run again in the backward pass."""
    return lambda z, cache: (
        checkpoint(step, z, cache, use_reentrant=False) if torch.is_grad_enabled() else step(z, cache)
    )


def decode_clip(step: DecodeStep, z: Tensor, cache: Cache = None) -> Iterator[tuple[Tensor, Cache]]:
    """Each latent frame's pixels [B, 3, f, H, W] and cache, in order; gradients reach all latent frames before."""
    for frame in z.split(1, dim=2):
        pixels, cache = step(frame, cache)
        yield pixels, cache


def decode_chosen(step: DecodeStep, z: Tensor, chosen: Sequence[int], reach: int) -> dict[int, Tensor]:
    """Pixels [B, 3, f, H, W] of some latent frames as they are in the video.

    Args:
        chosen: numbers of latent frames.
        reach: latent frames that a chosen one's gradient reaches: its own and those before it. The rest of the video
            is decoded without a graph, and costs no memory beyond one cache.
    """
    pixels: dict[int, Tensor] = {}
    starts: dict[int, list[int]] = {}
    for number in sorted(set(chosen)):
        starts.setdefault(max(0, number + 1 - reach), []).append(number)
    cache: Cache = None
    for number in range(max(chosen) + 1):
        for last in starts.get(number, []):
            *_, (pixels[last], _) = decode_clip(step, z[:, :, number : last + 1], cache)
        if number < max(starts):
            with torch.no_grad():
                _, cache = step(z[:, :, number : number + 1], cache)
    return pixels


def decode_tiled(decode: Decode, z: Tensor, tile: int, stride: int) -> Tensor:
    """``decode`` of overlapping square tiles, blended linearly along their seams, as diffusers' VAEs do.

    Args:
        tile, stride: side of a tile and distance between tiles, in latent rows and columns; a latent that fits one
            tile is decoded whole.
    """
    height, width = z.shape[-2:]
    if max(height, width) <= tile:
        return decode(z)
    rows = [
        [decode(z[..., top : top + tile, left : left + tile]) for left in range(0, width, stride)]
        for top in range(0, height, stride)
    ]
    scale = rows[0][0].shape[-1] // min(tile, width)
    blend, kept = (tile - stride) * scale, stride * scale
    for i, row in enumerate(rows):
        for j in range(len(row)):
            if i:
                row[j] = _blend(rows[i - 1][j], row[j], blend, dim=-2)
            if j:
                row[j] = _blend(row[j - 1], row[j], blend, dim=-1)
    joined = torch.cat([torch.cat([t[..., :kept, :kept] for t in row], dim=-1) for row in rows], dim=-2)
    return joined[..., : height * scale, : width * scale]


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """``tile`` whose first rows or columns fade in from the last ones of the tile ``before``."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    shape = [1] * tile.ndim
    shape[dim] = extent
    weight = (torch.arange(extent, device=tile.device, dtype=tile.dtype) / max(extent, 1)).view(shape)
    overlap = before.narrow(dim, before.shape[dim] - extent, extent)
    faded = overlap * (1 - weight) + tile.narrow(dim, 0, extent) * weight
    return torch.cat([faded, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim)
