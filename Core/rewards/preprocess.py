"""Differentiable image preprocessing shared by every scorer.

Axes: N images, C = 3 channels, H rows, W columns. Pixels are RGB. Everything here is plain tensor code, so a
gradient reaches the frames, and it reproduces the 8-bit pipelines the published models were trained with:
antialiased bilinear / bicubic resampling as in Pillow, integer output sizes as in torchvision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from Core.utils.damage import read_settings
from Core.utils.hub import PROCESSOR_FILES

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

Fit = Literal["crop", "pad", "squash"]
Interpolation = Literal["bilinear", "bicubic"]
RoundHalf = Literal["down", "even"]  # transformers' centre crop; torchvision's, so openai/CLIP's

# Pillow's resampling codes, as `preprocessor_config.json` stores them.
PILLOW_CODES: dict[Any, Interpolation] = {2: "bilinear", 3: "bicubic"}
ALWAYS_DONE = ("do_resize", "do_rescale", "do_normalize")


class _ClampTowardsRange(torch.autograd.Function):
    """Clamp whose gradient, outside the range, survives only where a descent step would lead back inside."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x < low, x > high)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        below, above = ctx.saved_tensors
        leads_away = (below & (grad > 0)) | (above & (grad < 0))
        return grad.masked_fill(leads_away, 0), None, None


def clamp_towards_range(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Clamp ``x`` to [low, high].

    ``torch.clamp`` stops every gradient of a saturated pixel, so such a pixel can never recover. Here the gradient of a
    loss (to be minimised) passes if stepping against it moves the value back towards the range.
    """
    return _ClampTowardsRange.apply(x, low, high)


def to_unit_range(frames: Tensor) -> Tensor:
    """Map pixels from [-1, 1] to [0, 1], clamped, in float32 or better."""
    if frames.dtype != torch.float64:
        frames = frames.float()
    return clamp_towards_range(frames / 2 + 0.5)


def resize(
    images: Tensor,
    height: int,
    width: int,
    interpolation: Interpolation = "bicubic",
    clamp: bool = True,
    antialias: bool = True,
) -> Tensor:
    """Resize [N, 3, H, W] in [0, 1] to [N, 3, height, width] with antialiasing, as Pillow does.

    Bicubic interpolation overshoots beside an edge. Pillow resizes the columns, then the rows, and 8 bits cut
    the overshoot off after each; so does this, unless ``clamp`` is False.
    """
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode=interpolation, antialias=antialias, align_corners=False)
            images = clamp_towards_range(images) if clamp and interpolation == "bicubic" else images
    return images


def resize_short_side(
    images: Tensor, size: int, interpolation: Interpolation = "bicubic", antialias: bool = True
) -> Tensor:
    """Resize [N, 3, H, W] so that the shorter side has ``size`` pixels, keeping the aspect ratio."""
    height, width = images.shape[-2:]
    new = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    return resize(images, *new, interpolation, antialias=antialias)


def center_crop(images: Tensor, height: int, width: int, round_half: RoundHalf = "down") -> Tensor:
    """Cut the central [height, width] window out of [N, 3, H, W], after padding with black if needed.

    ``round_half`` is what becomes of the half pixel of an odd margin.
    """
    images = pad_centered(images, max(height, images.shape[-2]), max(width, images.shape[-1]))
    rounded = math.floor if round_half == "down" else round
    top, left = rounded((images.shape[-2] - height) / 2), rounded((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


def pad_centered(images: Tensor, height: int, width: int) -> Tensor:
    """Centre [N, 3, H, W] on a black canvas of [height, width] (no smaller than the image)."""
    rows, columns = height - images.shape[-2], width - images.shape[-1]
    return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def resize_long_side(
    images: Tensor, size: int, interpolation: Interpolation = "bicubic", as_hpsv2: bool = False
) -> Tensor:
    """Resize [N, 3, H, W] so that the longer side has ``size`` pixels, keeping the aspect ratio.

    open_clip 3 divides by a ratio and resizes 8-bit pictures; hpsv2 1.2 multiplies by a scale, which rounds a
    few sizes differently, and resizes floats, whose bicubic overshoot nothing cuts off.
    """
    longest = max(images.shape[-2:])
    ratio, scale = longest / size, size / longest
    height, width = (max(1, round(s * scale if as_hpsv2 else s / ratio)) for s in images.shape[-2:])
    return resize(images, height, width, interpolation, clamp=not as_hpsv2)


def luma(images: Tensor) -> Tensor:
    """Brightness [N, 1, H, W] of [N, 3, H, W]."""
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the channel means of [N, 3, H, W] and divide by the channel deviations."""
    mean_, std_ = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images - mean_) / std_


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """What a model does to an image before its first layer.

    fit: how another aspect ratio is brought to height x width: ``crop`` (short side to size, centre crop),
    ``pad`` (long side to size, centred on black), ``squash`` (stretched).
    """

    height: int
    width: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    short_side: int | None = None  # with `crop`: resize to this before cropping; default: no margin
    round_half: RoundHalf = "down"  # with `crop`: see `center_crop`
    as_hpsv2: bool = False  # with `pad`: see `resize_long_side`
    antialias: bool = True  # with `crop`

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → normalised [N, 3, height, width]."""
        return normalize(self.fitted(images), self.mean, self.std)

    def with_fit(self, fit: Fit | None) -> "ImageTransform":
        """The same transform with another ``fit``; None keeps the model's own."""
        return self if fit in (None, self.fit) else replace(self, fit=fit, short_side=None)

    def fitted(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 3, height, width], not normalised."""
        if self.fit == "squash":
            return resize(images, self.height, self.width, self.interpolation)
        if self.fit == "pad":
            side = min(self.height, self.width)
            images = resize_long_side(images, side, self.interpolation, self.as_hpsv2)
            return pad_centered(images, self.height, self.width)
        side = self.short_side or min(self.height, self.width)
        images = resize_short_side(images, side, self.interpolation, self.antialias)
        return center_crop(images, self.height, self.width, self.round_half)


def read_processor_config(folder: Path, harmless: Sequence[str] = ()) -> dict[str, Any]:
    """Preprocessing settings of a model folder in the transformers layout; {} if it holds none.

    Looks in ``preprocessor_config.json``, ``video_preprocessor_config.json`` and the nested section of
    ``processor_config.json``, which newer versions of transformers write.

    Args:
        harmless: steps that would change nothing for this model.

    Raises:
        ValueError: the file is damaged, or switches on a step that is not done here, or off one that is.
    """
    for name in PROCESSOR_FILES:
        path = folder / name
        if path.is_file():
            values = read_settings(path)
            config = values.get("image_processor") or values.get("video_processor") or values
            refuse_other_steps(config, path, harmless)
            return config
    return {}


def refuse_other_steps(config: Mapping[str, Any], path: Path, harmless: Sequence[str]) -> None:
    """Raise ValueError on a ``do_…`` setting that asks for other preprocessing than this module's."""
    optional = ("do_center_crop", "do_convert_rgb", *harmless)
    wrong = [
        f"{key}={value}"
        for key, value in config.items()
        if key.startswith("do_")
        and (value is False if key in ALWAYS_DONE else value is True and key not in optional)
    ]
    if wrong:
        raise ValueError(
            f"{path} asks for {', '.join(wrong)}, but scorers resize, crop, rescale and normalise, no more and "
            "no less; use a model folder with such a preprocessing"
        )


def interpolation_of(config: Mapping[str, Any], default: Interpolation, folder: Path) -> Interpolation:
    """The interpolation that preprocessing settings name by Pillow's code, or ``default`` if by none."""
    code = config.get("resample")
    if code is None:
        return default
    if code not in PILLOW_CODES:
        known = " or ".join(f"{number} ({name})" for number, name in PILLOW_CODES.items())
        raise ValueError(f"the preprocessing in {folder} has resample={code!r}; it can be {known}")
    return PILLOW_CODES[code]


def transform_from_folder(folder: Path, image_size: int, defaults: ImageTransform) -> ImageTransform:
    """The official transform of a model folder.

    Args:
        image_size: side in pixels the network takes.
        defaults: fills in what the folder does not state.

    Raises:
        ValueError: the folder states preprocessing that is not supported.
    """
    config = read_processor_config(folder)
    size, crop = config.get("size"), config.get("crop_size")
    short_side = size.get("shortest_edge") if isinstance(size, dict) else size
    squash = isinstance(size, dict) and "height" in size
    if squash and config.get("do_center_crop") and (crop or size) != size:
        raise ValueError(
            f"the preprocessing in {folder} stretches to {size} and then crops to {crop}; it can do one"
        )
    if not squash and size is not None and config.get("do_center_crop") is False:
        raise ValueError(
            f"the preprocessing in {folder} keeps the aspect ratio without do_center_crop; set it to true"
        )
    if isinstance(crop, dict):
        height, width = crop["height"], crop["width"]
    else:
        height = width = crop or image_size
    return ImageTransform(
        height=image_size if squash else height,
        width=image_size if squash else width,
        fit="squash" if squash else defaults.fit,
        interpolation=interpolation_of(config, defaults.interpolation, folder),
        mean=tuple(config.get("image_mean", defaults.mean)),
        std=tuple(config.get("image_std", defaults.std)),
        short_side=None if squash else short_side,
    )
