"""The video VAE against the public release, and the shapes of its full-size checkpoint."""

import json

import golden_data
import pytest
import torch
import twins
from golden_data import relative_error

from opensora.models.vae.vae import (
    LATENT_SCALE,
    LATENT_SHIFT,
    OpenSoraVAE_V1_2,
    VideoAutoencoderKL,
    VideoAutoencoderPipeline,
    VideoAutoencoderPipelineConfig,
)
from opensora.models.vae.vae_temporal import VAE_Temporal

GOLDEN, METADATA = golden_data.tensors("vae_tiny")
LENGTHS = (1, 5, 17, 20, 34)


def pipeline(**changes) -> VideoAutoencoderPipeline:
    """The golden VAE with fresh weights."""
    values = dict(
        vae_2d=dict(type="VideoAutoencoderKL", config=json.loads(METADATA["vae_2d"]), micro_batch_size=2),
        vae_temporal=dict(type="VAE_Temporal", **json.loads(METADATA["vae_temporal"])),
        micro_frame_size=17,
        shift=LATENT_SHIFT,
        scale=LATENT_SCALE,
    )
    return VideoAutoencoderPipeline(VideoAutoencoderPipelineConfig(**{**values, **changes})).eval()


@pytest.fixture(scope="module")
def vae():
    model = pipeline()
    model.load_state_dict(golden_data.weights(GOLDEN))
    return model.requires_grad_(False)


@pytest.mark.parametrize("frames", LENGTHS)
def test_encoding_and_decoding_are_those_of_the_release(vae, frames):
    case = golden_data.case(GOLDEN, f"f{frames}")
    assert relative_error(vae.encode(case["video"]), case["latent_mode"]) <= 1e-5
    assert relative_error(vae.decode(case["latent_mode"], num_frames=frames), case["decoded"]) <= 1e-5


def test_one_latent_frame_decodes_alone_with_the_gradient_of_the_release(vae):
    z = GOLDEN["single.latent"].clone().requires_grad_()
    pixels = vae.decode(z[:, :, 2:3], num_frames=1)
    assert relative_error(pixels, GOLDEN["single.decoded_index2"]) <= 1e-5
    (gradient,) = torch.autograd.grad(pixels.square().mean(), z)
    assert relative_error(gradient, GOLDEN["single.grad_latent"]) <= 1e-4


def test_chunks_are_coded_each_on_its_own(vae):
    video = GOLDEN["f34.video"]
    halves = [vae.encode(part) for part in video.split(17, dim=2)]
    assert relative_error(vae.encode(video), torch.cat(halves, dim=2)) <= 1e-6


def test_videos_of_a_batch_do_not_mix(vae):
    videos = torch.cat([GOLDEN["f5.video"], GOLDEN["f5.video"].flip(-1)])
    together = vae.encode(videos)
    for i in range(2):
        assert relative_error(together[i : i + 1], vae.encode(videos[i : i + 1])) <= 1e-6


def test_full_size_has_the_keys_and_shapes_of_the_checkpoint():
    with torch.device("meta"):
        vae = OpenSoraVAE_V1_2()
    assert golden_data.shapes_of(vae) == golden_data.shapes("vae_manifest")


def test_released_normalisation_is_the_default():
    with torch.device("meta"):
        config = OpenSoraVAE_V1_2().config
    assert (config.shift, config.scale) == ((-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06))


def test_latent_sizes_are_those_of_the_release(vae):
    sizes = golden_data.shapes("vae_latent_size")
    assert {frames: vae.get_latent_size([int(frames), 240, 320]) for frames in sizes} == sizes


def test_what_is_unknown_stays_unknown_in_a_latent_size(vae):
    assert vae.get_latent_size([None, None, 320]) == [None, None, 40]


def test_latent_size_is_the_size_of_the_latent(vae):
    for frames in LENGTHS:
        video = GOLDEN[f"f{frames}.video"]
        assert vae.get_latent_size(list(video.shape[2:])) == list(GOLDEN[f"f{frames}.latent_mode"].shape[2:])


def test_image_vae_takes_its_sizes_from_config():
    image_vae = VideoAutoencoderKL(config=twins.VAE_2D, micro_batch_size=2)
    assert image_vae.module.config.block_out_channels == twins.VAE_2D["block_out_channels"]
    assert image_vae.patch_size == (1, 8, 8) and image_vae.out_channels == 4
    with pytest.raises(ValueError, match="either from_pretrained or config, not both"):
        VideoAutoencoderKL(from_pretrained="organisation/name", config=twins.VAE_2D)


def test_image_vae_gives_the_same_however_many_frames_it_takes_at_once():
    image_vae = VideoAutoencoderKL(config=twins.VAE_2D).eval()
    video = torch.randn(2, 3, 3, 16, 16)
    whole = image_vae.encode(video)
    image_vae.micro_batch_size = 2
    torch.testing.assert_close(image_vae.encode(video), whole)


def test_without_chunks_the_whole_video_is_coded_at_once(vae):
    whole = pipeline(micro_frame_size=None)
    whole.load_state_dict(vae.state_dict())
    assert whole.get_latent_size([34, 16, 24]) == [9, 2, 3]
    latent = whole.encode(GOLDEN["f34.video"])
    assert latent.shape[2] == 9 and whole.decode(latent, num_frames=34).shape == GOLDEN["f34.video"].shape


def test_the_image_vae_can_be_frozen_and_training_is_refused():
    assert not any(p.requires_grad for p in pipeline(freeze_vae_2d=True).spatial_vae.parameters())
    with pytest.raises(ValueError, match="cal_loss=True is for training the VAE.*set False"):
        pipeline(cal_loss=True)


def test_temporal_sizes_that_contradict_each_other_are_refused():
    with pytest.raises(
        ValueError, match="temporal_downsample needs one entry fewer than channel_multipliers"
    ):
        VAE_Temporal(channel_multipliers=(1, 2), temporal_downsample=(True, True))
