"""Wan through its own sampler and decoder equals the pipeline of diffusers."""

import pytest
import torch
from pipelines import CAPTIONS, loaded, sample, save_wan

KINDS = ("2.1", "ti2v", "a14b")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_wan(tmp_path_factory.mktemp("wan") / kind, kind) for kind in (*KINDS, "i2v")}


def pipeline_video(folder, noise, *, shift=3.0, sampler="euler", **arguments):
    """Pixels [B, 3, F, H, W] in [0, 1] of the pipeline itself."""
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    cls = DiffusionPipeline
    if "image" in arguments:
        from diffusers import WanImageToVideoPipeline as cls  # noqa: N813
    pipeline = cls.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    frames = pipeline(latents=noise.clone(), output_type="pt", max_sequence_length=24, **arguments).frames
    return torch.as_tensor(frames).transpose(1, 2)


def noise_for(backbone, batch):
    return torch.randn(batch, *backbone.latent_shape(), generator=torch.Generator().manual_seed(7))


def video_of(backbone, encoded, noise):
    with torch.no_grad():
        return backbone.decode(sample(backbone, encoded, noise)).clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_videos_equal_the_pipelines(folders, kind, guidance):
    backbone, encoded = loaded("wan", folders[kind], guidance_scale=guidance, negative_prompt=CAPTIONS[3])
    noise = noise_for(backbone, 2)
    wanted = pipeline_video(
        folders[kind],
        noise,
        prompt=list(CAPTIONS[:2]),
        negative_prompt=[CAPTIONS[3]] * 2,
        guidance_scale=guidance,
        num_inference_steps=3,
        height=32,
        width=64,
        num_frames=9,
    )
    assert (video_of(backbone, encoded, noise) - wanted).abs().max() < 1e-4
