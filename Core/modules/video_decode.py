"""Pixels of a video VAE whose decoder runs one chunk after the other, keeping what later ones need.

A decoder of this kind is causal in time: a chunk, which is one latent frame or a few, depends on its own latents and on
the cache of those before. The cache goes in and comes out of a function here, so that a chunk can be recomputed in the
backward pass, and a frame in the middle of a video be decoded without a graph through those before it.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, f frames of one chunk, H, W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# What a decoder keeps of the chunks before; None before the first.
Cache = Any
# Latent frames per chunk: of every one, or of each.
ChunkSizes = int | list[int]
# Of a tile or a stride, in latents: rows and columns, or both in one number.
Size = int | tuple[int, int]


class DecodeStep(Protocol):
    """(chunk [B, C, T, h, w], cache) → pixels [B, 3, f, H, W], and the cache for the next chunk.

    ``last`` says that none follows: what the step keeps for it may then be anything, and should take no memory.
    """

    def __call__(self, z: Tensor, cache: Cache, last: bool = False) -> tuple[Tensor, Cache]: ...


# latents [B, C, T, h, w] → pixels [B, 3, F, H, W]
Decode = Callable[[Tensor], Tensor]


def decode_clip(step: DecodeStep, z: Tensor, sizes: ChunkSizes = 1) -> Iterator[Tensor]:
    """Each chunk's pixels [B, 3, f, H, W], in order; gradients reach all chunks before."""
    return _run(step, z.split(sizes, dim=2), None)


def _run(step: DecodeStep, chunks: Sequence[Tensor], cache: Cache) -> Iterator[Tensor]:
    for number, chunk in enumerate(chunks, 1):
        pixels, cache = step(chunk, cache, last=number == len(chunks))
        yield pixels


def decode_chosen(
    step: DecodeStep, z: Tensor, chosen: Sequence[int], reach: int, sizes: ChunkSizes = 1
) -> dict[int, Tensor]:
    """Pixels [B, 3, f, H, W] of some chunks as they are in the video.

    Args:
        chosen: numbers of chunks.
        reach: chunks that a chosen one's gradient reaches: its own and those before it. The rest of the video is
            decoded without a graph, and costs no memory beyond one cache.
    """
    chunks = z.split(sizes, dim=2)
    pixels: dict[int, Tensor] = {}
    starts: dict[int, list[int]] = {}
    for number in sorted(set(chosen)):
        starts.setdefault(max(0, number + 1 - reach), []).append(number)
    cache: Cache = None
    for number in range(max(chosen) + 1):
        for last in starts.get(number, []):
            *_, pixels[last] = _run(step, chunks[number : last + 1], cache)
        if number < max(starts):
            with torch.no_grad():
                _, cache = step(chunks[number], cache)
    return pixels


def decode_tiled(decode: Decode, z: Tensor, tile: Size, stride: Size) -> Tensor:
    """``decode`` of overlapping tiles, blended linearly along their seams, as diffusers' VAEs do.

    Args:
        tile, stride: size of a tile and distance between tiles; a latent that fits one tile is decoded whole.
    """
    height, width = z.shape[-2:]
    (tall, wide), (down, right) = _pair(tile), _pair(stride)
    if height <= tall and width <= wide:
        return decode(z)
    rows = [
        [decode(z[..., top : top + tall, left : left + wide]) for left in range(0, width, right)]
        for top in range(0, height, down)
    ]
    scale = rows[0][0].shape[-1] // min(wide, width)
    for i, row in enumerate(rows):
        for j in range(len(row)):
            if i:
                row[j] = _blend(rows[i - 1][j], row[j], (tall - down) * scale, dim=-2)
            if j:
                row[j] = _blend(row[j - 1], row[j], (wide - right) * scale, dim=-1)
    kept = (..., slice(down * scale), slice(right * scale))
    joined = torch.cat([torch.cat([tile[kept] for tile in row], dim=-1) for row in rows], dim=-2)
    return joined[..., : height * scale, : width * scale]


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """``tile`` whose first rows or columns fade in from the last ones of the tile ``before``."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    shape = [1] * tile.ndim
    shape[dim] = extent
    weight = (torch.arange(extent, device=tile.device, dtype=tile.dtype) / max(extent, 1)).view(shape)
    overlap = before.narrow(dim, before.shape[dim] - extent, extent)
    faded = overlap * (1 - weight) + tile.narrow(dim, 0, extent) * weight
    return torch.cat([faded, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim)
