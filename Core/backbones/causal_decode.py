"""Families whose VAE decodes chunks of latent frames in turn: whole videos, and chosen frames with gradients.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames, H, W pixels.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from Core.modules.recompute import recomputed
from Core.modules.video_decode import (
    Cache,
    Decode,
    DecodeStep,
    Size,
    decode_chosen,
    decode_clip,
    decode_tiled,
)

from .base import gather_frames
from .diffusers_base import DiffusersBackbone


class CausalDecode(DiffusersBackbone):
    """A family whose VAE is causal in time: a frame depends on its own latent frame and on those before.

    The first latent frame makes one video frame, each other ``time_factor``.
    """

    obeys = DiffusersBackbone.obeys | {"decode_reach"}
    decode_contexts = ("isolated", "causal", "whole")

    @abstractmethod
    def _decode_step(self, z: Tensor, cache: Cache, last: bool = False) -> tuple[Tensor, Cache]:
        """One chunk's pixels, before ``_to_pixels``, and the cache for the next; a ``DecodeStep``."""

    def _chunks(self, frames: int) -> list[int]:
        """How many of ``frames`` latent frames the VAE decodes at once, in order."""
        return [1] * frames

    @abstractmethod
    def _to_vae(self, z: Tensor) -> Tensor:
        """Latents as the VAE takes them, from those that are sampled."""

    def _to_pixels(self, decoded: Tensor) -> Tensor:
        """[B, 3, F, H, W] from what ``_decode_step`` gives."""
        return decoded

    @property
    @abstractmethod
    def _tiles(self) -> tuple[Size, Size]:
        """Size of a tile and distance between tiles, in latent rows and columns."""

    @property
    def decode_step(self) -> DecodeStep:
        return recomputed(self._decode_step) if self.checkpointing else self._decode_step

    def _decode(self, z: Tensor, decode: Decode) -> Tensor:
        """``decode`` of latents as the VAE takes them, in its dtype; tiled where asked."""
        with torch.autocast(z.device.type, enabled=False):
            latents = self._to_vae(z.to(self.vae.dtype))
            tiled = self.settings.vae_tiling
            decoded = decode_tiled(decode, latents, *self._tiles) if tiled else decode(latents)
        # diffusers clamps here, where the gradient of a saturated pixel would end.
        return self._to_pixels(decoded).to(z.dtype)

    def _decode_clip(self, z: Tensor) -> Tensor:
        made = decode_clip(self.decode_step, z, self._chunks(z.shape[2]))
        return torch.cat(list(made), dim=2)

    def decode(self, z: Tensor) -> Tensor:
        return self._decode(z, self._decode_clip)

    def decode_frames(self, z: Tensor, index: Tensor, context: str = "isolated", reach: int = 1) -> Tensor:
        if context == "isolated":
            frames = self._decode(gather_frames(z, index), self._decode_clip)
            return frames.squeeze(2).unflatten(0, index.shape)
        # Of each latent frame's video frames the last, which is what it makes when alone.
        return self.decode_at(z, index * self.time_factor, context, reach)

    def decode_at(self, z: Tensor, frames: Tensor, context: str = "whole", reach: int = 1) -> Tensor:
        """Latents and frame numbers [B, F] of the video → those frames [B, F, 3, H, W], differentiable."""
        rows = frames.tolist()
        same = all(row == rows[0] for row in rows)
        parts = [(z, rows[0])] if same else list(zip(z.split(1), rows, strict=True))
        reach = reach if context == "causal" else z.shape[2]
        pixels = [
            self._decode(part, functools.partial(self._pick, numbers=row, reach=reach)) for part, row in parts
        ]
        return torch.cat(pixels).transpose(1, 2)

    def _pick(self, z: Tensor, numbers: Sequence[int], reach: int) -> Tensor:
        """Frames of the video by number, from latents as the VAE takes them: [B, 3, F, H, W]."""
        sizes = self._chunks(z.shape[2])
        chunk_of = [chunk for chunk, size in enumerate(sizes) for _ in range(size)]
        chosen = [chunk_of[(number + self.time_factor - 1) // self.time_factor] for number in numbers]
        last = max(chosen) + 1
        if reach >= z.shape[2]:
            made = decode_clip(self.decode_step, z[:, :, : sum(sizes[:last])], sizes[:last])
            pixels = dict(enumerate(made))
        else:
            # All latent frames that are asked for, wherever in its chunk the last of them lies.
            chunks = 1 + math.ceil((reach - 1) / sizes[-1])
            pixels = decode_chosen(self.decode_step, z, chosen, chunks, sizes)
        starts = [max(0, (chunk_of.index(chunk) - 1) * self.time_factor + 1) for chunk in chosen]
        picked = zip(numbers, chosen, starts, strict=True)
        return torch.cat([pixels[chunk][:, :, [number - start]] for number, chunk, start in picked], dim=2)
