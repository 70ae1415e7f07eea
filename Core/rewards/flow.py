"""Optical flow in plain, differentiable tensor code: iterative Lucas–Kanade, coarse to fine.

Lucas & Kanade 1981, with the pyramid of Bouguet 2001. Both frames are warped to the moment halfway between them, so
the flow belongs to that moment and an in-between frame is the mean of the two warped ones.

Axes: N pairs of frames, C channels, H rows, W columns. A flow [N, 2, H, W] holds pixels to the right and down.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from Core.rewards.preprocess import luma, resize

WORKING_SIDE = 128  # short side in pixels the flow is computed at; larger frames are reduced
COARSEST_SIDE = 8  # short side below which the pyramid has no further level
ITERATIONS = 2  # of each level
WINDOW = 2.0  # deviation in pixels of the Gaussian window that a pixel's motion is fitted in
SMOOTHING = 0.7  # the same of the one that takes noise off each level
# Squared slope (per pixel, of a luma in [0, 1]) below which a direction has too little texture to show motion.
FLAT = 3e-5
LONGEST_STEP = 1.5  # pixels an iteration adds at most


def blur(images: Tensor, deviation: float) -> Tensor:
    """[N, C, H, W] under a Gaussian, the border repeated."""
    reach = round(3 * deviation)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-((offsets / deviation) ** 2) / 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """``images`` [N, C, H, W] read at each pixel's place plus ``flow`` [N, 2, H, W], the border repeated."""
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(s, device=flow.device, dtype=flow.dtype) for s in (height, width))
    x = (columns + flow[:, 0] + 0.5) * 2 / width - 1
    y = (rows[:, None] + flow[:, 1] + 0.5) * 2 / height - 1
    grid = torch.stack([x, y], dim=-1)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)


def slopes(images: Tensor) -> Tensor:
    """Central differences [N, 2, H, W] of [N, 1, H, W] along x and y, the border repeated."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.cat([x, y], dim=1)


def step(first: Tensor, second: Tensor) -> Tensor:
    """Least-squares motion [N, 2, H, W] between two nearly aligned pictures [N, 1, H, W], bounded."""
    gradient = slopes((first + second) / 2)
    x, y = gradient.split(1, dim=1)
    products = torch.cat([x * x, y * y, x * y, gradient * (second - first)], dim=1)
    xx, yy, xy, xt, yt = blur(products, WINDOW).split(1, dim=1)
    xx, yy = xx + FLAT, yy + FLAT
    solution = torch.cat([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / (xx * yy - xy * xy)
    return LONGEST_STEP * torch.tanh(solution / LONGEST_STEP)


def pyramid(images: Tensor) -> list[Tensor]:
    """[N, 1, H, W] at its size and at each half of it, coarsest first."""
    levels = [images]
    while min(levels[-1].shape[-2:]) >= 2 * COARSEST_SIDE:
        height, width = levels[-1].shape[-2:]
        levels.append(resize(levels[-1], height // 2, width // 2, "bilinear"))
    return levels[::-1]


def enlarge(flow: Tensor, height: int, width: int) -> Tensor:
    """A flow at another size, its lengths with it."""
    scale = flow.new_tensor([width / flow.shape[-1], height / flow.shape[-2]]).view(2, 1, 1)
    return F.interpolate(flow, (height, width), mode="bilinear", align_corners=False) * scale


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Motion [N, 2, h, w] from ``first`` to ``second`` [N, 3, H, W] in [0, 1], seen halfway between them.

    It is given at the working size (h, w), in pixels of it: the frames' own, or reduced to a short side of 128. Where
    a frame has no texture the motion is 0.
    """
    height, width = first.shape[-2:]
    shrink = max(1.0, min(height, width) / WORKING_SIDE)
    size = max(1, round(height / shrink)), max(1, round(width / shrink))
    levels = zip(*(pyramid(resize(luma(i), *size, "bilinear")) for i in (first, second)), strict=True)
    flow = None
    for one, other in levels:
        one, other = blur(one, SMOOTHING), blur(other, SMOOTHING)
        if flow is None:
            flow = step(one, other)
            remaining = ITERATIONS - 1
        else:
            flow = enlarge(flow, *one.shape[-2:])
            remaining = ITERATIONS
        for _ in range(remaining):
            flow = flow + step(warp(one, -flow / 2), warp(other, flow / 2))
    assert flow is not None
    return flow


def between(first: Tensor, second: Tensor) -> Tensor:
    """The frame [N, 3, H, W] halfway between two, by moving each half of the way."""
    flow = enlarge(optical_flow(first, second), *first.shape[-2:])
    return (warp(first, -flow / 2) + warp(second, flow / 2)) / 2
