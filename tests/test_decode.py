"""`decode_frame`: which latent frames are decoded, and that decoding reaches those alone."""

import pytest
import torch
import twins

from Core.backbones import ModelSettings, VideoSpec
from Core.backbones.opensora import OpenSora, OpenSoraSettings
from Core.sampling.frame_choice import check_decode_frame, choose_frames, frames_of_video
from Core.utils import rng

FRAMES = 5


def generators(count: int) -> list[torch.Generator]:
    return [rng.generator(200, "frame", number) for number in range(count)]


@pytest.mark.parametrize(
    ("value", "frames", "chosen"),
    [
        ("fml", 5, [0, 2, 4]),
        ("fml", 2, [0, 1]),
        ("fml", 1, [0]),
        ("all", 5, [0, 1, 2, 3, 4]),
        ("alt", 5, [0, 2, 4]),
        ("alt", 4, [0, 2]),
        (3, 5, [3]),
        ("3", 5, [3]),
    ],
)
def test_chosen_frames_are_the_same_for_every_video(value, frames, chosen):
    assert choose_frames(value, frames, generators(2)).tolist() == [chosen, chosen]


@pytest.mark.parametrize("value", [-1, "-1"])
def test_random_frames_cover_the_video_and_follow_from_each_videos_own_generator(value):
    drawn = choose_frames(value, FRAMES, generators(60))
    assert drawn.shape == (60, 1) and set(drawn.flatten().tolist()) == set(range(FRAMES))
    assert torch.equal(choose_frames(value, FRAMES, generators(60)[7:9]), drawn[7:9])


@pytest.mark.parametrize("value", [5, -2, "5", 100])
def test_a_frame_that_does_not_exist_is_refused(value):
    with pytest.raises(ValueError, match="out of range: the video has 5 latent frames, 0 to 4"):
        check_decode_frame(value, FRAMES)


@pytest.mark.parametrize("value", ["first", "1.5", ""])
def test_an_unknown_mode_is_refused(value):
    with pytest.raises(
        ValueError, match=f"decode_frame must be -1, fml, all, alt, the number.*, got {value!r}"
    ):
        check_decode_frame(value, FRAMES)


@pytest.fixture(scope="module")
def backbone() -> OpenSora:
    """The twin's VAE alone, as the backbone of 17 frames of 16×16 holds it."""
    models, video = ModelSettings(dtype="fp32"), VideoSpec(16, 16, 17, 24)
    built = OpenSora(OpenSoraSettings(), models, video, torch.device("cpu"))
    built.vae = twins.vae().requires_grad_(False)
    return built


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_videos_are_encoded_in_the_vaes_own_dtype(backbone, kind):
    """Under the trainer's autocast, whose float16 would overflow."""
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        plain = backbone.encode(video)
        torch.manual_seed(0)
        with torch.autocast("cpu", kind):
            assert torch.equal(backbone.encode(video), plain)


def test_each_frame_is_decoded_alone(backbone):
    torch.manual_seed(0)
    z = torch.randn(2, *backbone.latent_shape())
    index = torch.tensor([[0, 3], [4, 1]])
    frames = backbone.decode_frames(z, index)
    assert frames.shape == (2, 2, 3, 16, 16)
    for video, row in enumerate(index.tolist()):
        for place, number in enumerate(row):
            alone = backbone.vae.decode(z[video : video + 1, :, number : number + 1], num_frames=1)
            torch.testing.assert_close(frames[video, place], alone[0, :, 0])


def test_the_gradient_reaches_the_chosen_frames_and_no_other(backbone):
    z = torch.randn(2, *backbone.latent_shape(), requires_grad=True)
    index = torch.tensor([[0, 3], [4, 1]])
    (gradient,) = torch.autograd.grad(backbone.decode_frames(z, index).square().sum(), z)
    reached = (gradient != 0).any(dim=(1, 3, 4))
    expected = torch.zeros(2, FRAMES, dtype=torch.bool).scatter(1, index, True)
    assert torch.equal(reached, expected)


def test_checkpointing_the_decoder_keeps_its_gradient(backbone):
    """The image VAE checkpoints inside its own blocks."""
    z = torch.randn(1, *backbone.latent_shape(), requires_grad=True)
    index = torch.tensor([[2]])
    (plain,) = torch.autograd.grad(backbone.decode_frames(z, index).square().sum(), z)
    backbone.denoiser = twins.stdit()
    backbone.enable_checkpointing()
    (recomputed,) = torch.autograd.grad(backbone.decode_frames(z, index).square().sum(), z)
    torch.testing.assert_close(recomputed, plain)


def test_latent_frames_are_counted_without_the_vae(backbone):
    for frames in (1, 4, 5, 17, 18, 34, 51, 68, 100):
        counted = OpenSora.count_latent_frames(frames, OpenSoraSettings(vae={"micro_frame_size": 17}))
        assert counted == backbone.vae.get_latent_size([frames, 16, 16])[0]


@pytest.mark.parametrize(
    ("value", "frames"),
    [
        ("2fps", [0, 8, 16, 24]),
        ("3frames", [0, 12, 24]),
        ([0, 24], [0, 24]),
        ("1frames", [0]),
        ("99fps", None),
    ],
)
def test_frames_of_the_finished_video_by_time(value, frames):
    assert frames_of_video(value, 25, 12) == (frames if frames else list(range(25)))


@pytest.mark.parametrize("value", [-1, "fml", "all", "8", 3])
def test_latent_frames_are_no_frames_of_the_video(value):
    assert frames_of_video(value, 25, 12) is None


def test_a_frame_after_the_end_is_refused():
    with pytest.raises(ValueError, match=r"must list frames from 0 to 24, got \[25\]"):
        frames_of_video([0, 25], 25, 12)
