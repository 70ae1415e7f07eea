"""Sizes and lengths against golden/aspect.json, the tables of the public Open-Sora v1.2.0 release."""

import json
from pathlib import Path

import pytest

from opensora.datasets.aspect import ASPECT_RATIOS, NUM_FRAMES_MAP, get_image_size, get_num_frames

GOLDEN = json.loads((Path(__file__).parent / "golden" / "aspect.json").read_text())


def test_every_size_of_the_release():
    sizes = {name: {ratio: list(size) for ratio, size in row.items()} for name, row in ASPECT_RATIOS.items()}
    assert sizes == {name: row for name, row in GOLDEN["image_size"].items() if row}


def test_frame_counts_of_the_release():
    assert NUM_FRAMES_MAP == GOLDEN["num_frames"]


def test_a_ratio_is_height_to_width():
    assert get_image_size("240p", "9:16") == (240, 426)
    assert get_image_size("240p", "16:9") == (426, 240)


def test_resolution_may_be_a_number():
    assert get_image_size(512, "12:25") == (352, 736)


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
