"""Pictures and clips between files and tensors [C, T, H, W] (C = 3 RGB channels, T frames)."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageOps

# The frame rate a still picture is conditioned on, far from any video's (Open-Sora v1.2.0).
IMG_FPS = 120

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VID_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")


def is_img(path):
    """Whether ``path`` has the extension of a picture that ``read_from_path`` reads."""
    return Path(path).suffix.lower() in IMG_EXTENSIONS


def is_vid(path):
    """Whether ``path`` has the extension of a video that ``read_from_path`` reads."""
    return Path(path).suffix.lower() in VID_EXTENSIONS


def save_sample(
    x, save_path=None, fps=8, normalize=True, value_range=(-1, 1), force_video=False, verbose=True
):
    """Write a sample: one frame to a .png, several to an H.264 .mp4 that streams and plays everywhere.

    The file appears under its name only when it is complete. Odd heights and widths gain one repeated row or
    column in a video, since 4:2:0 colour needs even ones.

    Args:
        x: [C, T, H, W] with C = 3; not modified.
        save_path: where to write, without extension (".png" or ".mp4" is added).
        fps: frames per second of a video.
        normalize: map ``value_range`` to [0, 1]; if False, x is in [0, 1] already.
        value_range: (low, high) of x; values outside are clamped.
        force_video: write one frame as a video too.
        verbose: print the path.

    Returns:
        Path of the written file, a str.

    Raises:
        ValueError: x is not [3, T, H, W], or there is no save_path.
    """
    if x.ndim != 4 or x.shape[0] != 3 or x.shape[1] == 0:
        raise ValueError(
            f"save_sample got a tensor of shape {tuple(x.shape)}; it writes [3, T, H, W] with T >= 1"
        )
    if save_path is None:
        raise ValueError("save_sample got save_path=None; give the path to write to, without extension")
    as_image = x.shape[1] == 1 and not force_video
    target = Path(f"{save_path}{'.png' if as_image else '.mp4'}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    frames = (_to_uint8(frame, value_range if normalize else (0, 1)) for frame in x.detach().unbind(1))
    try:
        if as_image:
            Image.fromarray(next(frames)).save(temporary)
        else:
            _write_video(temporary, frames, fps)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if verbose:
        print(f"Saved to {target}")
    return str(target)


def _to_uint8(frame, value_range):
    """A frame [C, H, W] as an array [H, W, C] of bytes, ``value_range`` mapped to 0..255 and rounded."""
    low, high = value_range
    unit = (frame.float().clamp(low, high) - low) / (high - low)
    return unit.mul(255).round().to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _write_video(path, frames, fps):
    """Encode frames [H, W, 3] (uint8) to ``path``; HD colour (BT.709), tagged so that players agree on it."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream: Any = None
        for frame in frames:
            height, width, _ = frame.shape
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = _add_h264_stream(container, frame.shape, fps)
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _add_h264_stream(container, shape, fps):
    rate = Fraction(fps).limit_denominator(1001)
    # x264's macroblock tree reads memory that nobody wrote where pictures are small: equal frames, unequal files.
    options = {"crf": "18", "x264-params": "mbtree=0"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width, _ = shape
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    return stream


def read_from_path(path, image_size, transform_name="resize_crop"):
    """Read a picture (T = 1) or all frames of a video, fitted to ``image_size``.

    Args:
        path: local file.
        image_size: (height, width) in pixels.
        transform_name: only "resize_crop": bicubic resize until ``image_size`` is covered, then centre crop.

    Returns:
        [3, T, H, W] float32 in [-1, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown extension or transform, or a file that cannot be decoded.
    """
    if transform_name != "resize_crop":
        raise ValueError(f"transform_name={transform_name!r} is unknown; use 'resize_crop'")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"reference file {str(path)!r} does not exist; give the path of a local picture or video"
        )
    if not is_img(path) and not is_vid(path):
        raise ValueError(
            f"reference file {str(path)!r} has an unknown extension; use one of "
            f"{', '.join(IMG_EXTENSIONS + VID_EXTENSIONS)}"
        )
    try:
        pictures = _read_image(path) if is_img(path) else _read_video(path)
        frames = [np.asarray(_resize_crop(picture, image_size)) for picture in pictures]
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on a damaged file
        raise ValueError(
            f"reference file {str(path)!r} cannot be decoded ({type(error).__name__}: {error}); convert it "
            "to .png or .mp4"
        ) from error
    if not frames:
        raise ValueError(f"reference file {str(path)!r} holds no frames; give a picture or a video")
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float().div(127.5).sub(1)


def _read_image(path):
    with Image.open(path) as image:
        yield ImageOps.exif_transpose(image).convert("RGB")


def _read_video(path):
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_image()


def _resize_crop(image, image_size):
    """Resize a picture so that it covers (height, width) and cut out the centre."""
    height, width = image_size
    scale_h, scale_w = height / image.height, width / image.width
    if scale_h > scale_w:
        resized_h, resized_w = height, round(image.width * scale_h)
    else:
        resized_h, resized_w = round(image.height * scale_w), width
    image = image.resize((resized_w, resized_h), Image.Resampling.BICUBIC)
    left, top = round((resized_w - width) / 2), round((resized_h - height) / 2)
    return image.crop((left, top, left + width, top + height))
