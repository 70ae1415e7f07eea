"""LTX-Video through its own sampler and decoder equals the pipeline of diffusers."""

import math
from pathlib import Path

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from pipelines import (
    CAPTIONS,
    assert_learns,
    config_for,
    gradient_error,
    in_float64,
    loaded,
    sample,
    saved_bytes,
    train,
    with_adapter,
)
from pipelines_ltx import save_ltx

from Core.backbones import VideoSpec
from Core.backbones.ltx import DECODE_SEED, Ltx
from Core.build import new_backbone
from Core.config import ConfigError, load_config
from Core.modules import lora

VERSIONS = ("0.9.0", "0.9.1", "0.9.5")
SMALL = {"image_size": (32, 64), "num_frames": 17, "num_sampling_steps": 3, "decode_context": "whole"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {version: save_ltx(tmp_path_factory.mktemp("ltx") / version, version) for version in VERSIONS}


def pipeline_video(folder, noise, tiled=False, **arguments):
    """Pixels [B, 3, F, H, W] in [0, 1] of the pipeline itself."""
    from diffusers import LTXPipeline

    pipeline = LTXPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if tiled:
        pipeline.vae.enable_tiling(32, 32, None, 16, 16)
    with torch.random.fork_rng():
        torch.manual_seed(DECODE_SEED)
        frames = pipeline(
            latents=noise.flatten(2).transpose(1, 2).clone(),
            generator=[torch.Generator().manual_seed(DECODE_SEED) for _ in noise],
            output_type="pt",
            max_sequence_length=24,
            **arguments,
        ).frames
    return frames.transpose(1, 2)


def noise_for(backbone, batch):
    return torch.randn(batch, *backbone.latent_shape(), generator=torch.Generator().manual_seed(7))


def video_of(backbone, encoded, noise):
    with torch.no_grad():
        return backbone.decode(sample(backbone, encoded, noise)).clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize(
    ("version", "keys"),
    [
        ("0.9.0", {"guidance_scale": 1.0}),
        ("0.9.0", {"guidance_scale": 3.0, "image_size": (64, 32), "num_frames": 9}),
        ("0.9.1", {"guidance_scale": 3.0, "guidance_rescale": 0.7}),
        ("0.9.1", {"guidance_scale": 1.0, "decode_timestep": 0.3, "num_frames": 1, "vae_tiling": True}),
        ("0.9.5", {"guidance_scale": 3.0, "image_size": (64, 32)}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_videos_equal_the_pipelines(folders, version, keys):
    keys = {**SMALL, **keys}
    backbone, encoded = loaded("ltx", folders[version], negative_prompt=CAPTIONS[3], fps=20, **keys)
    tiled = keys.get("vae_tiling", False)
    if tiled:
        backbone.vae.enable_tiling(32, 32, None, 16, 16)
    noise, (height, width) = noise_for(backbone, 2), keys["image_size"]
    wanted = pipeline_video(
        folders[version],
        noise,
        tiled,
        prompt=list(CAPTIONS[:2]),
        negative_prompt=[CAPTIONS[3]] * 2,
        num_inference_steps=keys["num_sampling_steps"],
        height=height,
        width=width,
        num_frames=keys["num_frames"],
        frame_rate=20,
        guidance_scale=keys["guidance_scale"],
        guidance_rescale=keys.get("guidance_rescale", 0.0),
        decode_timestep=keys.get("decode_timestep", 0.05),
        decode_noise_scale=0.025,
    )
    assert (video_of(backbone, encoded, noise) - wanted).abs().max() < 1e-4


def rms_norm(self, x):
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
    return scaled if self.weight is None else scaled * self.weight


@pytest.mark.parametrize("tiled", [False, True], ids=["whole frames", "tiles"])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_equal_central_differences(folders, version, tiled, monkeypatch):
    # Its norms turn to float32 in a way of their own.
    monkeypatch.setattr(RMSNorm, "forward", rms_norm)
    keys = {**SMALL, "image_size": (32, 48), "num_frames": 9, "num_sampling_steps": 2, "vae_tiling": tiled}
    backbone, encoded = loaded("ltx", folders[version], guidance_rescale=0.5, **keys)
    backbone.vae.enable_tiling(32, 32, None, 16, 16)
    with_adapter(in_float64(backbone, monkeypatch))
    backbone.denoiser.double()
    backbone.enable_checkpointing()
    assert gradient_error(backbone, encoded, torch.tensor([[1], [1]]), "whole") < 1e-4


def test_chosen_frames_are_those_of_the_video(folders):
    backbone, _ = loaded("ltx", folders["0.9.1"], **SMALL)
    z, frames = noise_for(backbone, 2), torch.tensor([[0, 2], [1, 1]])
    with torch.no_grad():
        video = backbone.decode(z).transpose(1, 2)
        chosen = backbone.decode_frames(z, frames, "whole")
    torch.testing.assert_close(chosen, video[torch.arange(2)[:, None], 8 * frames])


def test_training_raises_a_reward(folders, tmp_path):
    keys = {"image_size": (32, 32), "num_frames": 9, "decode_context": "whole", "grad_checkpoint": False}
    # Its decoder norms every position: the saturation of 64 random latents has a deviation of 0.002.
    assert_learns("ltx", folders["0.9.1"], tmp_path, gain=0.008, **keys)


@pytest.mark.parametrize("storage", [{"dtype": "fp8"}, {"dtype": "bf16", "base_quant": "nf4"}], ids=str)
def test_frozen_weights_may_be_stored_in_fewer_bits(folders, storage, tmp_path):
    keys = {"image_size": (32, 32), "num_frames": 9, "decode_context": "whole"}
    keys |= {"max_train_steps": 2, "mixed_precision": "bf16", **storage}
    rows = train("ltx", folders["0.9.1"], tmp_path / "run", **keys)
    assert all(0 < float(row["grad_norm"]) < math.inf for row in rows)


def test_checkpointing_lessens_what_decoding_keeps(folders, monkeypatch):
    """With the channel ratios of the real VAE and 21 latent frames."""
    from diffusers import AutoencoderKLLTXVideo

    backbone, _ = loaded("ltx", folders["0.9.0"], **{**SMALL, "num_frames": 161})
    channels = (8, 16, 32, 32)
    backbone.vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=channels, decoder_block_out_channels=channels
    ).requires_grad_(False)
    z = noise_for(backbone, 1)[..., :1, :1].clone().requires_grad_()
    plain = saved_bytes(lambda: backbone.decode(z))[0]
    backbone.enable_checkpointing()
    assert saved_bytes(lambda: backbone.decode(z))[0] <= 0.25 * plain


def test_what_a_clip_keeps_of_a_latent_frame():
    """What docs/families/ltx.md says: the published decoder of 0.9.0 at 512×768 in bfloat16, on the meta device."""
    from diffusers import AutoencoderKLLTXVideo

    with torch.device("meta"):
        vae = AutoencoderKLLTXVideo().to(torch.bfloat16).requires_grad_(False)
        sizes = {"dtype": torch.bfloat16, "requires_grad": True}
        latents = [torch.empty(1, 128, frames, 16, 24, **sizes) for frames in (9, 13)]
    vae.enable_gradient_checkpointing()
    short, long = (saved_bytes(lambda z=z: vae.decoder(z))[0] for z in latents)
    assert (long - short) / 4 == 288_325_632


def test_the_published_networks_have_their_size():
    """LTX-Video 0.9.0, whose configuration is the classes' default."""
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    with torch.device("meta"):
        denoiser, vae = LTXVideoTransformer3DModel(), AutoencoderKLLTXVideo()
        assert sum(p.numel() for p in denoiser.parameters()) == 1_923_385_472
        assert (len(denoiser.state_dict()), len(vae.state_dict())) == (715, 190)
        wrapped = lora.attach(denoiser, Ltx.lora_targets, rank=16, alpha=16)
    assert sum(p.numel() for p in vae.parameters()) == 419_193_649
    assert sum(p.numel() for p in lora.parameters(wrapped).values()) == 23_855_104


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_frames": 13}, "num_frames must be a multiple of 8 plus 1, got 13; the nearest are 9 and 17"),
        ({"image_size": (40, 60)}, r"must be multiples of 16, got \(40, 60\); the nearest are \(32, 64\)"),
        (
            {"decode_context": "isolated", "is_vader_training": True},
            "decode_context.*'isolated'",
        ),
    ],
    ids=["num_frames", "image_size", "decode_context"],
)
def test_what_cannot_be_made_is_refused(folders, keys, message):
    with pytest.raises(ConfigError, match=message):
        config_for("ltx", folders["0.9.0"], **{**SMALL, **keys})


def test_other_or_broken_pipelines_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="holds a LTXPipeline, and this family needs a CogVideoXPipeline"):
        config_for("cogvideox", folders["0.9.0"])
    broken = save_ltx(tmp_path / "broken")
    (broken / "transformer" / "config.json").unlink()
    with pytest.raises(ConfigError, match="its component 'transformer' has no config.json"):
        config_for("ltx", broken, **SMALL)


def test_the_configuration_is_valid():
    file = Path(__file__).parents[1] / "configs" / "ltx" / "ltx_video.py"
    backbone = new_backbone(load_config([str(file)]), torch.device("cpu"))
    assert backbone.video == VideoSpec(512, 768, 97, 24)
