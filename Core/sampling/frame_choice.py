"""``decode_frame`` → which latent frames of each video, or frames of the finished one, are decoded and scored.

Axes: B batch, F chosen frames, T latent frames.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

FRAME_MODES = ("fml", "all", "alt")
RANDOM_FRAME = -1
EVENLY = re.compile(r"(\d+(?:\.\d+)?)(fps|frames)")


def frames_of_video(value: Any, num_frames: int, fps: float) -> list[int] | None:
    """The frames of a finished video that ``decode_frame`` asks for; None where it asks for latent frames.

    Args:
        num_frames, fps: of the video.

    Raises:
        ValueError: no such frame.
    """
    if isinstance(value, (list, tuple)):
        outside = [number for number in value if not 0 <= number < num_frames]
        if outside or not value:
            raise ValueError(
                f"decode_frame must list frames from 0 to {num_frames - 1}, got {outside or 'none'}"
            )
        return list(value)
    if not (match := EVENLY.fullmatch(str(value))):
        return None
    wanted = float(match[1]) if match[2] == "frames" else float(match[1]) * num_frames / fps
    count = min(num_frames, max(1, round(wanted)))
    return torch.linspace(0, num_frames - 1, count).round().long().tolist()


def is_of_video(value: Any) -> bool:
    """Whether ``decode_frame`` asks for frames of the finished video."""
    return isinstance(value, (list, tuple)) or bool(EVENLY.fullmatch(str(value)))


def check_decode_frame(value: Any, num_latent_frames: int) -> Any:
    """``value`` as a mode or a frame number; a number may be spelled as a string, as the reference has it.

    What asks for frames of the finished video is handed on; ``frames_of_video`` checks that.

    Raises:
        ValueError: no such mode, or no such frame.
    """
    if is_of_video(value) or value in FRAME_MODES:
        return value
    try:
        index = int(value)
    except ValueError:
        raise ValueError(
            f"decode_frame must be -1, {', '.join(FRAME_MODES)}, the number of a latent frame, or frames of the video "
            f"such as '2fps', '8frames' or a list, got {value!r}"
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


def count_frames(value: Any, num_latent_frames: int, num_frames: int, fps: float) -> int:
    """F, how many frames of a video ``decode_frame`` = ``value`` asks for."""
    if (times := frames_of_video(value, num_frames, fps)) is not None:
        return len(times)
    return choose_frames(value, num_latent_frames, [torch.Generator()]).shape[1]
