"""CogVideoX through its own sampler and decoder equals the pipeline of diffusers."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from pipelines import (
    CAPTIONS,
    assert_learns,
    config_for,
    generators,
    gradient_error,
    in_float64,
    loaded,
    sample,
    saved_bytes,
    train,
    with_adapter,
)
from pipelines_cogvideox import SIZES, save_cogvideox
from torch.utils._pytree import tree_leaves

from Core.backbones import VideoSpec
from Core.backbones.cogvideox import CogVideoX
from Core.build import new_backbone
from Core.config import ConfigError, load_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {size: save_cogvideox(tmp_path_factory.mktemp("cogvideox") / size, size) for size in SIZES}


def pipeline_video(folder, noise, tiled=False, sampler="ddim", **arguments):
    """Pixels [B, 3, F, H, W] in [0, 1] of the pipeline itself."""
    pipeline = CogVideoXPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if tiled:
        pipeline.vae.enable_tiling()
    kind = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[sampler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    frames = pipeline(
        latents=noise.transpose(1, 2).clone(),
        output_type="pt",
        max_sequence_length=24,
        generator=generators(len(noise)),
        **arguments,
    ).frames
    return frames.transpose(1, 2)


def noise_for(backbone, batch):
    return torch.randn(batch, *backbone.latent_shape(), generator=torch.Generator().manual_seed(7))


def video_of(backbone, encoded, noise):
    with torch.no_grad():
        return backbone.decode(sample(backbone, encoded, noise)).clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        ("2b", {"guidance_scale": 1.0, "num_sampling_steps": 3}),
        ("2b", {"guidance_scale": 6.0, "image_size": (32, 16), "num_frames": 17}),
        ("5b", {"guidance_scale": 6.0, "use_dynamic_cfg": True}),
        ("5b", {"guidance_scale": 6.0, "sampler": "dpm"}),
        ("2b", {"guidance_scale": 1.0, "sampler": "dpm", "num_sampling_steps": 7}),
        ("5b", {"guidance_scale": 4.0, "image_size": (32, 48), "num_frames": 1}),
        ("5b", {"guidance_scale": 1.0, "image_size": (32, 56), "num_frames": 17, "vae_tiling": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_videos_equal_the_pipelines(folders, size, keys):
    keys = {"image_size": (16, 32), "num_frames": 9, "num_sampling_steps": 4, **keys}
    backbone, encoded = loaded("cogvideox", folders[size], negative_prompt=CAPTIONS[3], **keys)
    noise = noise_for(backbone, 2)
    keys["height"], keys["width"] = keys.pop("image_size")
    wanted = pipeline_video(
        folders[size],
        noise,
        tiled=keys.pop("vae_tiling", False),
        prompt=list(CAPTIONS[:2]),
        negative_prompt=[CAPTIONS[3]] * 2,
        num_inference_steps=keys.pop("num_sampling_steps"),
        **keys,
    )
    assert (video_of(backbone, encoded, noise) - wanted).abs().max() < 1e-4


# Of 5 latent frames the first 3 are decoded together, then the last 2.
@pytest.mark.parametrize("tiled", [False, True], ids=["whole frames", "tiles"])
@pytest.mark.parametrize(
    ("size", "context", "reach", "first_reached"),
    [("2b", "isolated", 1, None), ("5b", "causal", 1, 3), ("2b", "causal", 2, 0), ("5b", "whole", 1, None)],
)
def test_gradients_equal_central_differences(
    folders, size, context, reach, first_reached, tiled, monkeypatch
):
    keys = {"image_size": (16, 24), "num_frames": 17, "num_sampling_steps": 2}
    backbone, encoded = loaded("cogvideox", folders[size], vae_tiling=tiled, **keys)
    if tiled:
        backbone.vae.enable_tiling(12, 20)
    with_adapter(in_float64(backbone, monkeypatch))
    backbone.denoiser.double()
    backbone.enable_checkpointing()
    frames = torch.tensor([[4], [4]])
    assert gradient_error(backbone, encoded, frames, context, reach, first_reached) < 1e-4


def test_chosen_frames_are_those_of_the_video(folders):
    backbone, _ = loaded("cogvideox", folders["2b"], image_size=(16, 16), num_frames=17)
    z, frames = noise_for(backbone, 2), torch.tensor([[0, 8, 9], [16, 1, 3]])
    with torch.no_grad():
        video = backbone.decode(z).transpose(1, 2)
        for context in ("causal", "whole"):
            chosen = backbone.decode_at(z, frames, context)
            torch.testing.assert_close(chosen, video[torch.arange(2)[:, None], frames])


def test_training_raises_a_reward(folders, tmp_path):
    keys = {"image_size": (16, 16), "num_frames": 9, "decode_context": "isolated", "grad_checkpoint": False}
    assert_learns("cogvideox", folders["2b"], tmp_path, **keys)


@pytest.mark.parametrize("storage", [{"dtype": "fp8"}, {"dtype": "bf16", "base_quant": "nf4"}], ids=str)
def test_frozen_weights_may_be_stored_in_fewer_bits(folders, storage, tmp_path):
    keys = {"image_size": (16, 16), "num_frames": 9, "decode_context": "causal"}
    keys |= {"max_train_steps": 2, "mixed_precision": "bf16", **storage}
    rows = train("cogvideox", folders["5b"], tmp_path / "run", **keys)
    assert all(0 < float(row["grad_norm"]) < math.inf for row in rows)


def test_checkpointing_bounds_what_decoding_keeps(folders, monkeypatch):
    """With the channel ratios of the real VAE: a causal frame, and the whole of 21 latent frames."""
    from diffusers import AutoencoderKLCogVideoX

    kept, keys = {}, {"image_size": (16, 16), "decode_context": "causal"}
    for frames in (33, 81):
        backbone, _ = loaded("cogvideox", folders["2b"], num_frames=frames, **keys)
        sizes = {"block_out_channels": (8, 16, 16, 32), "latent_channels": 4, "norm_num_groups": 4}
        backbone.vae = AutoencoderKLCogVideoX(**sizes).requires_grad_(False)
        z = noise_for(backbone, 1)[..., :2, :2].clone().requires_grad_()
        last = torch.tensor([[z.shape[2] - 1]])
        kept["plain", frames] = saved_bytes(lambda b=backbone, z=z: b.decode(z))[0]
        backbone.enable_checkpointing()
        kept["whole", frames] = saved_bytes(lambda b=backbone, z=z: b.decode(z))[0]
        kept["causal", frames] = saved_bytes(lambda b=backbone, z=z, i=last: b.decode_frames(z, i, "causal"))[
            0
        ]
    assert kept["causal", 81] <= 1.1 * kept["causal", 33]
    assert kept["whole", 81] <= 0.1 * kept["plain", 81]


def test_what_a_whole_clip_keeps_of_two_latent_frames(folders):
    """What docs/families/cogvideox.md says: the published decoder at 480×720 in bfloat16."""
    from diffusers import AutoencoderKLCogVideoX

    backbone, _ = loaded("cogvideox", folders["5b"], image_size=(16, 16), num_frames=9)
    with torch.device("meta"), torch.no_grad():
        backbone.vae = AutoencoderKLCogVideoX().to(torch.bfloat16)
        cache, held = None, []
        for frames in (3, 2, 2):
            z = torch.empty(1, 16, frames, 60, 90, dtype=torch.bfloat16)
            _, cache = backbone._decode_step(z, cache)
            held.append(sum(t.nbytes for t in tree_leaves(cache) if isinstance(t, torch.Tensor)))
    assert held[1] == held[2] == 2_809_382_400


# As published, where they differ from the classes' defaults, with the keys and parameters of the denoiser,
# and the parameters of an adapter of rank 16.
PUBLISHED = {
    "2b": ({}, 736, 1_693_783_872, 16_588_800),
    "5b": ({"num_attention_heads": 48, "num_layers": 42}, 1024, 5_570_283_072, 37_158_912),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_published_networks_have_their_size(size):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    from Core.modules import lora

    config, keys, parameters, adapter = PUBLISHED[size]
    rotary = SIZES[size]["use_rotary_positional_embeddings"]
    with torch.device("meta"):
        denoiser = CogVideoXTransformer3DModel(**config, use_rotary_positional_embeddings=rotary)
        vae = AutoencoderKLCogVideoX()
        assert (len(denoiser.state_dict()), sum(p.numel() for p in denoiser.parameters())) == (
            keys,
            parameters,
        )
        wrapped = lora.attach(denoiser, CogVideoX.lora_targets, rank=16, alpha=16)
    assert (len(vae.state_dict()), sum(p.numel() for p in vae.parameters())) == (436, 215_583_907)
    assert sum(p.numel() for p in lora.parameters(wrapped).values()) == adapter


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_frames": 13}, "num_frames must be a multiple of 8 plus 1, got 13; the nearest are 9 and 17"),
        ({"image_size": (20, 32)}, r"must be multiples of 8, got \(20, 32\); the nearest are \(16, 32\)"),
        ({"max_sequence_length": 100}, "max_sequence_length must be 24, which .* was trained with, got 100"),
        ({"image_size": None}, "resolution '240p' with aspect_ratio '3:4' is not in this family's table"),
        (
            {"sampler": "dpm", "is_vader_training": True, "reward_fn": "saturation"},
            "sampler='dpm' is for inference; remove it",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_made_is_refused(folders, keys, message):
    with pytest.raises(ConfigError, match=message):
        config_for("cogvideox", folders["2b"], **keys)


def test_other_pipelines_are_refused(folders, tmp_path):
    newer = save_cogvideox(tmp_path / "1.5", "5b", patch_size_t=2)
    with pytest.raises(ConfigError, match="is a CogVideoX 1.5 model, which is not supported"):
        config_for("cogvideox", newer)
    with pytest.raises(ConfigError, match="holds a CogVideoXPipeline, and this family needs a Wan"):
        config_for("wan", folders["2b"])
    (folders["5b"] / "vae" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="its component 'vae' has no complete .safetensors"):
        config_for("cogvideox", folders["5b"])


@pytest.mark.parametrize("size", SIZES)
def test_the_configurations_ask_for_what_the_model_was_trained_on(size):
    file = Path(__file__).parents[1] / "configs" / "cogvideox" / f"{size}.py"
    backbone = new_backbone(load_config([str(file)]), torch.device("cpu"))
    assert backbone.video == VideoSpec(480, 720, 49, 8)
