"""``decode_frame`` → which latent frames of each video are decoded and scored.

Axes: B batch, F chosen frames, T latent frames.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

FRAME_MODES = ("fml", "all", "alt")
RANDOM_FRAME = -1


def check_decode_frame(value: Any, num_latent_frames: int) -> int | str:
    """``value`` as a mode or a frame number; a number may be spelled as a string, as the reference has it.

    Raises:
        ValueError: no such mode, or no such frame.
    """
    if value in FRAME_MODES:
        return value
    try:
        index = int(value)
    except ValueError:
        raise ValueError(
            f"decode_frame must be -1, {', '.join(FRAME_MODES)} or the number of a latent frame, got {value!r}"
        ) from None
    if not RANDOM_FRAME <= index < num_latent_frames:
        raise ValueError(
            f"decode_frame {index} is out of range: the video has {num_latent_frames} latent frames, "
            f"0 to {num_latent_frames - 1}"
        )
    return index


def choose_frames(value: int | str, num_latent_frames: int, generators: Sequence[Generator]) -> Tensor:
    """Latent frame numbers [B, F] for ``decode_frame`` = ``value``; one generator per video draws for -1."""
    mode = check_decode_frame(value, num_latent_frames)
    last = num_latent_frames - 1
    fixed: dict[Any, list] = {
        "fml": sorted({0, num_latent_frames // 2, last}),
        "all": list(range(num_latent_frames)),
        "alt": list(range(0, num_latent_frames, 2)),
    }
    if mode == RANDOM_FRAME:
        return torch.stack([torch.randint(num_latent_frames, (1,), generator=g) for g in generators])
    return torch.tensor(fixed.get(mode, [mode])).repeat(len(generators), 1)
