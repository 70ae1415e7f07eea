"""Sizes and lengths against golden/aspect.json, the tables of the public Open-Sora v1.2.0 release."""

import json
from pathlib import Path

import pytest

from opensora.datasets.aspect import (
    ASPECT_RATIO_MAP,
    ASPECT_RATIOS,
    NUM_FRAMES_MAP,
    NUM_PIXELS,
    get_image_size,
    get_num_frames,
    get_num_pixels,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "aspect.json").read_text())


def test_every_size_of_the_release():
    sizes = {name: {ratio: list(size) for ratio, size in row.items()} for name, row in ASPECT_RATIOS.items()}
    assert sizes == {name: row for name, row in GOLDEN["image_size"].items() if row}


def test_pixel_counts_frame_counts_and_ratio_keys_of_the_release():
    assert NUM_PIXELS == GOLDEN["num_pixels"]
    assert NUM_FRAMES_MAP == GOLDEN["num_frames"]
    assert ASPECT_RATIO_MAP == GOLDEN["aspect_ratio"]


def test_a_ratio_is_height_to_width():
    assert get_image_size("240p", "9:16") == (240, 426)
    assert get_image_size("240p", "16:9") == (426, 240)


def test_the_release_key_of_a_ratio_works_as_well():
    assert get_image_size("720p", "0.56") == get_image_size("720p", "9:16") == (720, 1280)


def test_resolution_may_be_a_number():
    assert get_image_size(512, "12:25") == (352, 736)
    assert get_num_pixels(512) == 512 * 512


@pytest.mark.parametrize(("given", "frames"), [("4s", 102), ("2x", 102), (16, 16), ("16", 16), (1, 1)])
def test_num_frames(given, frames):
    assert get_num_frames(given) == frames


@pytest.mark.parametrize("given", [0, -3, "0", "3s", "1.5", 2.0, "", None])
def test_num_frames_refuses_what_is_no_length(given):
    with pytest.raises(ValueError, match="whole number of at least 1 or one of .*2s"):
        get_num_frames(given)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="resolution='241p' is unknown; choose one of 144p, 240p"):
        get_image_size("241p", "9:16")
    with pytest.raises(ValueError, match="aspect_ratio='16:10' does not exist.*9:16"):
        get_image_size("240p", "16:10")
    with pytest.raises(ValueError, match="resolution='8k' is unknown"):
        get_num_pixels("8k")
