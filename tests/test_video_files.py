"""Pictures and videos, written and read back: by Core, and by opensora under upstream's name."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from Core.data.video import animated_gif, read_video, save_video, smaller
from opensora.datasets import read_from_path, save_sample


def smooth_clip(frames, height, width):
    """A clip [3, T, H, W] in [-1, 1] that changes over time, rows and columns."""
    t, y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (frames, height, width)), indexing="ij")
    return torch.stack([y * t, x, -x * y])


@pytest.fixture(params=["Core", "opensora"])
def save(request):
    """A function (clip, path without suffix, fps) → path of the file."""
    if request.param == "Core":
        return lambda clip, path, fps=8: str(save_video(clip, path, fps))
    return lambda clip, path, fps=8: save_sample(clip, str(path), fps=fps, verbose=False)


def test_video_keeps_pixels_rate_and_length(tmp_path, save):
    clip = smooth_clip(9, 32, 48)
    path = save(clip, tmp_path / "clip", fps=24)
    assert path == str(tmp_path / "clip.mp4")
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (24, 9)
    back = read_from_path(path, (32, 48))
    assert back.shape == clip.shape
    assert (back - clip).abs().mean() < 0.03


@pytest.mark.parametrize("colour", [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (0.2, -0.4, 0.6)])
def test_video_keeps_colours(tmp_path, colour, save):
    clip = torch.tensor(colour, dtype=torch.float)[:, None, None, None].expand(3, 2, 32, 32)
    back = read_from_path(save(clip, tmp_path / "flat"), (32, 32))
    torch.testing.assert_close(
        back.mean((1, 2, 3)), torch.tensor(colour, dtype=torch.float), atol=0.03, rtol=0
    )


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path, save):
    clip = smooth_clip(2, 31, 47)
    path = save(clip, tmp_path / "odd")
    back = read_from_path(path, (32, 48))
    assert back.shape == (3, 2, 32, 48)
    assert (back[..., :31, :47] - clip).abs().mean() < 0.03
    assert (back[..., 31, :47] - clip[..., 30, :]).abs().mean() < 0.05


def test_video_can_be_played_before_it_is_complete(tmp_path, save):
    path = save(smooth_clip(3, 32, 32), tmp_path / "clip")
    content = open(path, "rb").read()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


def test_one_frame_is_a_lossless_picture(tmp_path, save):
    picture = torch.rand(3, 1, 7, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = save(picture, tmp_path / "picture")
    assert path.endswith("picture.png")
    assert (read_from_path(path, (7, 9)) - picture).abs().max() <= 1 / 255 + 1e-6


def test_one_frame_can_be_a_video(tmp_path):
    path = save_sample(smooth_clip(1, 16, 16), tmp_path / "clip", force_video=True, verbose=False)
    assert read_from_path(path, (16, 16)).shape == (3, 1, 16, 16)


def test_value_range_and_normalize(tmp_path):
    unit = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    as_range = save_sample(unit * 4, tmp_path / "a", value_range=(0, 4), verbose=False)
    as_unit = save_sample(unit, tmp_path / "b", normalize=False, verbose=False)
    assert np.array_equal(Image.open(as_range), Image.open(as_unit))


def test_input_is_left_alone_and_values_outside_are_clamped(tmp_path):
    picture = torch.full((3, 1, 4, 4), 3.0)
    path = save_sample(picture, tmp_path / "bright", verbose=False)
    assert (picture == 3).all()
    assert np.asarray(Image.open(path)).min() == 255


def test_path_is_printed_only_when_asked(tmp_path, capsys):
    save_sample(smooth_clip(1, 4, 4), tmp_path / "a", verbose=False)
    assert capsys.readouterr().out == ""
    path = save_sample(smooth_clip(1, 4, 4), tmp_path / "a")
    assert path in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, save):
    path = save(smooth_clip(2, 16, 16), tmp_path / "clip")
    before = open(path, "rb").read()
    with pytest.raises((ValueError, av.FFmpegError)):
        save(smooth_clip(2, 16, 16), tmp_path / "clip", fps=-1)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert open(path, "rb").read() == before


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (3, 0, 8, 8)])
def test_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"it writes \[3, T, H, W\]"):
        save_sample(torch.zeros(shape), tmp_path / "x")


def test_a_path_is_needed():
    with pytest.raises(ValueError, match="save_path=None"):
        save_sample(torch.zeros(3, 1, 4, 4))


@pytest.mark.parametrize(("size", "kept"), [((8, 8), slice(4, 12)), ((8, 4), slice(6, 10))])
def test_reading_covers_the_size_and_cuts_the_centre(tmp_path, size, kept):
    columns = np.zeros((8, 16, 3), dtype=np.uint8)
    columns[:, kept] = 255
    Image.fromarray(columns).save(tmp_path / "columns.png")
    assert (read_from_path(tmp_path / "columns.png", size) == 1).all()


def test_tall_pictures_lose_rows(tmp_path):
    rows = np.zeros((16, 8, 3), dtype=np.uint8)
    rows[4:12] = 255
    Image.fromarray(rows).save(tmp_path / "rows.png")
    assert (read_from_path(tmp_path / "rows.png", (8, 8)) == 1).all()


def test_reading_tells_what_is_wrong(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.png").write_text("x")
    (tmp_path / "broken.mp4").write_text("x")
    with pytest.raises(FileNotFoundError, match="does not exist; give the path of a local"):
        read_from_path(tmp_path / "none.png", (8, 8))
    with pytest.raises(ValueError, match=r"unknown extension; use one of \.jpg"):
        read_from_path(tmp_path / "notes.txt", (8, 8))
    for name in ("broken.png", "broken.mp4"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_from_path(tmp_path / name, (8, 8))
    with pytest.raises(ValueError, match="use 'resize_crop'"):
        read_from_path(tmp_path / "notes.txt", (8, 8), transform_name="stretch")


def test_core_reads_a_file_at_its_own_size(tmp_path):
    clip = smooth_clip(5, 32, 48)
    back = read_video(save_video(clip, tmp_path / "clip", fps=8))
    assert back.shape == clip.shape and (back - clip).abs().mean() < 0.03
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="broken.mp4 cannot be read as a video"):
        read_video(tmp_path / "broken.mp4")


def test_gifs_and_smaller_copies(tmp_path):
    path = save_video(smooth_clip(4, 64, 96), tmp_path / "clip", fps=8)
    (tmp_path / "clip.gif").write_bytes(animated_gif(path))
    with Image.open(tmp_path / "clip.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (4, (96, 64), 120, 0)
    (tmp_path / "copy.mp4").write_bytes(smaller(path, max_width=48, crf=30))
    assert read_video(tmp_path / "copy.mp4").shape == (3, 4, 32, 48)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.gif", "clip.mp4", "copy.mp4"]
