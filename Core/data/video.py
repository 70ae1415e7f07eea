"""Video and picture files, written and read.

Axes: T frames, H, W pixels.
"""

import io
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from Core.utils.files import replacing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def save_video(pixels: Tensor, path: Path, fps: float) -> Path:
    """Write a clip: one frame as .png, several as an H.264 .mp4 that streams and plays everywhere.

    Odd heights and widths of a video gain one repeated row or column, since 4:2:0 colour needs even ones.

    Args:
        pixels: [3, T, H, W] in [-1, 1]; values outside are clamped.
        path: without suffix.

    Returns:
        The path of the file.
    """
    frames = (_to_uint8(frame) for frame in pixels.detach().unbind(1))
    target = path.with_name(path.name + (".png" if pixels.shape[1] == 1 else ".mp4"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        if pixels.shape[1] == 1:
            Image.fromarray(next(frames)).save(partial)
        else:
            _encode(partial, frames, Fraction(fps).limit_denominator(1001))
    return target


def _to_uint8(frame: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] → bytes [H, W, 3]."""
    unit = (frame.float().clamp(-1, 1) + 1) / 2
    return unit.mul(255).round().to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _encode(path: Path, frames: Iterable[np.ndarray], rate: Fraction, crf: int = 18) -> None:
    """Frames [H, W, 3] as H.264 in HD colour (BT.709), tagged so that players agree on it."""
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        # x264's macroblock tree reads memory that nobody wrote where pictures are small: equal frames, unequal files.
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream: Any = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for number, frame in enumerate(frames):
            height, width, _ = frame.shape
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if number == 0:
                stream.height, stream.width, _ = frame.shape
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def read_video(path: Path) -> Tensor:
    """A video or picture file as [3, T, H, W] in [-1, 1], at its own size.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        frames = [np.asarray(image) for image in _images(path)]
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on a damaged file
        raise ValueError(f"{path} cannot be read as a video ({error}); remove it or make it again") from error
    if not frames:
        raise ValueError(f"{path} holds no frames; remove it or make it again")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float().div(127.5).sub(1)


def _images(path: Path) -> list[Image.Image]:
    import av

    if is_image(path):
        with Image.open(path) as image:
            return [image.convert("RGB")]
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def frame_rate(path: Path) -> float | None:
    """Frames per second of a video file; None for a picture, or where the file does not say."""
    rate = None if is_image(path) else _stated_rate(path)
    return float(rate) if rate else None


def stated_size(path: Path) -> tuple[int, int, int]:
    """(frames, height, width) by a file's header, without decoding it; 0 frames where it does not say.

    Raises:
        ValueError: it cannot be opened.
    """
    import av

    try:
        if is_image(path):
            with Image.open(path) as image:
                return 1, image.height, image.width
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.frames, stream.height, stream.width
    except (OSError, ValueError, IndexError, av.error.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}); remove it or make it again") from error


def _stated_rate(path: Path) -> Fraction | None:
    import av

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    return Fraction(rate).limit_denominator(1001) if rate else None


def animated_gif(path: Path) -> bytes:
    """A video or picture file as a GIF that loops."""
    first, *rest = _images(path)
    rate = frame_rate(path) or 1
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=round(1000 / rate), loop=0)
    return out.getvalue()


def smaller(path: Path, max_width: int, crf: int) -> bytes:
    """A video encoded again at no more than ``max_width`` pixels.

    Args:
        crf: H.264's constant rate factor; higher is smaller and worse.
    """
    images = _images(path)
    width = min(max_width, images[0].width) // 2 * 2
    height = round(images[0].height * width / images[0].width / 2) * 2
    resized = (np.asarray(image.resize((width, height))) for image in images)
    with tempfile.TemporaryDirectory() as folder:
        _encode(target := Path(folder) / "small.mp4", resized, _stated_rate(path) or Fraction(1), crf)
        return target.read_bytes()
