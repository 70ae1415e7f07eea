"""The shared preprocessing against Pillow, and the gradient of its clamp."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from reward_twins import smooth_images

from Core.rewards.object_detection import detector_size
from Core.rewards.preprocess import (
    CLIP_MEAN,
    ImageTransform,
    center_crop,
    clamp_towards_range,
    resize,
    resize_long_side,
    to_unit_range,
    transform_from_folder,
)

DEFAULTS = ImageTransform(height=16, width=16)


@pytest.mark.parametrize("size", [(16, 16), (9, 33), (61, 50)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_is_that_of_pillow(size, interpolation):
    channel = smooth_images(1, (40, 30))[0, 0].float() / 255
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = np.array(Image.fromarray(channel.numpy()).resize(size[::-1], resample))
    resized = resize(channel.expand(1, 3, -1, -1), *size, interpolation)[0, 0]
    np.testing.assert_allclose(resized.numpy(), expected.clip(0, 1), atol=4e-6)


@pytest.mark.parametrize("size", [(16, 16), (33, 50)])
def test_bicubic_overshoot_at_an_edge_is_cut_off_as_in_8_bit_pictures(size):
    edges = torch.zeros(24, 24, dtype=torch.uint8)
    edges[5:17, 9:] = 255
    expected = np.array(Image.fromarray(edges.numpy()).resize(size[::-1], Image.Resampling.BICUBIC))
    resized = resize(edges.expand(1, 3, -1, -1) / 255, *size)[0, 0]
    np.testing.assert_allclose(resized.numpy() * 255, expected, atol=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 1}, r"has resample=1; it can be 2 \(bilinear\) or 3 \(bicubic\)"),
        ({"do_normalize": False, "do_thumbnail": True}, "asks for do_normalize=False, do_thumbnail=True"),
        ({"size": {"shortest_edge": 16}, "do_center_crop": False}, "without do_center_crop; set it to true"),
        (
            {
                "size": {"height": 20, "width": 20},
                "crop_size": {"height": 16, "width": 16},
                "do_center_crop": True,
            },
            "and then crops",
        ),
    ],
)
def test_preprocessing_that_is_not_done_here_is_refused(tmp_path, settings, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        transform_from_folder(tmp_path, 16, DEFAULTS)


def test_half_a_pixel_of_margin_is_rounded_as_each_library_does():
    columns = torch.arange(19.0).expand(1, 3, 4, 19)
    first = [center_crop(columns, 4, 16, rule)[0, 0, 0, 0].item() for rule in ("down", "even")]
    assert first == [1, 2]  # of a margin of 3: 3 // 2, round(1.5)


def test_the_long_side_is_rounded_and_overshoots_as_in_hpsv2():
    """hpsv2 1.2's ``ResizeMaxSize`` after ``ToTensor``; 210 × 384 is one of the sizes where open_clip 3 differs."""
    images = torch.zeros(1, 3, 210, 384)
    images[..., 60:150, 100:250] = 1
    ours = resize_long_side(images, 224)
    theirs = resize_long_side(images, 224, as_hpsv2=True)
    assert ours.shape[-2:] == (122, 224) and theirs.shape[-2:] == (123, 224)
    assert round(210 / (384 / 224)) == 122 and round(210 * (224 / float(384))) == 123
    assert ours.min() == 0 and ours.max() == 1 and theirs.min() < -0.01 and theirs.max() > 1.01


def test_padding_and_cropping_keep_the_picture_centred():
    white = torch.ones(1, 3, 10, 20)
    padded = ImageTransform(height=20, width=20, fit="pad").fitted(white)
    assert padded.shape == (1, 3, 20, 20)
    assert (
        (padded[..., :5, :] == 0).all()
        and (padded[..., 5:15, :] == 1).all()
        and (padded[..., 15:, :] == 0).all()
    )
    stripes = torch.zeros(1, 3, 10, 20)
    stripes[..., 5:15] = 1
    assert (ImageTransform(height=10, width=10).fitted(stripes) == 1).all()
    assert ImageTransform(height=10, width=10, fit="squash").fitted(stripes).mean() == pytest.approx(
        0.5, abs=1e-3
    )


def test_clamp_passes_only_the_gradient_that_leads_back():
    x = torch.tensor([-0.5, -0.5, 0.5, 0.5, 1.5, 1.5], requires_grad=True)
    upstream = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    y = clamp_towards_range(x)
    assert y.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert torch.autograd.grad(y, x, upstream)[0].tolist() == [-1, 0, -1, 1, 0, 1]


def test_pixels_are_scaled_in_float32_or_better():
    for given, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert to_unit_range(torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=given)).tolist() == [0, 0.5, 1, 1]
        assert to_unit_range(torch.zeros(1, dtype=given)).dtype == wide


def test_settings_are_read_from_each_layout_of_a_model_folder(tmp_path):
    old = {"size": 20, "crop_size": 16, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "do_center_crop": True}
    new = {"image_processor": {"size": {"height": 16, "width": 16}, "resample": 3}, "tokenizer": {}}
    for folder, name, values in (
        ("old", "preprocessor_config.json", old),
        ("new", "processor_config.json", new),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps(values))
    transform = transform_from_folder(tmp_path / "old", 16, DEFAULTS)
    assert (transform.fit, transform.short_side, transform.interpolation) == ("crop", 20, "bilinear")
    assert transform.mean == (0.1, 0.2, 0.3) and transform.height == transform.width == 16
    transform = transform_from_folder(tmp_path / "new", 16, DEFAULTS)
    assert (transform.fit, transform.interpolation, transform.mean) == ("squash", "bicubic", CLIP_MEAN)
    assert transform_from_folder(tmp_path, 16, DEFAULTS) == DEFAULTS


def test_detector_sizes_are_whole_patches_within_the_limits():
    assert detector_size(512, 512, 512, 864) == (512, 512)
    assert detector_size(720, 1280, 512, 864) == (480, 864)
    assert detector_size(1280, 720, 512, 864) == (864, 480)
    assert detector_size(10, 400, 512, 864) == (16, 864)
