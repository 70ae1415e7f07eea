"""Copies of tensors in the CPU's memory, for what a GPU copies to and from while both go on."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes of one piece of pinned memory. PyTorch rounds each up to a power of two: 5120 × 13824 weights in bf16, which are
# 135 MiB, would take 256.
PIECE = 1 << 24


def pieces_of(tensor: Tensor, device: torch.device, pinned: bool) -> list[Tensor]:
    """The bytes of ``tensor``, in order, copied to ``device`` in pieces."""
    parts = _bytes_of(tensor.contiguous()).split(PIECE)
    pieces = [torch.empty(len(part), dtype=torch.uint8, device=device, pin_memory=pinned) for part in parts]
    for piece, part in zip(pieces, parts, strict=True):
        piece.copy_(part, non_blocking=True)
    return pieces


def copy_pieces(pieces: Sequence[Tensor], tensor: Tensor) -> None:
    """Write what ``pieces_of`` a tensor gave into a contiguous ``tensor`` of its size."""
    for piece, part in zip(pieces, _bytes_of(tensor).split(PIECE), strict=True):
        part.copy_(piece, non_blocking=True)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
