"""HunyuanVideo 1.5 through its own sampler and decoder equals the pipeline of diffusers."""

import functools
import shutil

import pytest
import torch
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from pipelines import (
    CAPTIONS,
    assert_learns,
    config_for,
    gradient_error,
    in_float64,
    loaded,
    sample,
    saved_bytes,
    with_adapter,
)
from pipelines_hunyuan import QUOTING, save_hunyuan, vae
from torch.utils._pytree import tree_leaves

from Core.backbones.hunyuan_video15 import HunyuanVideo15
from Core.backbones.hunyuan_video15_vae import decode_step
from Core.config import ConfigError, load_config
from Core.modules import lora
from Core.modules.frozen_conv import forget_conv_inputs
from Core.modules.recompute import recomputed
from Core.modules.video_decode import decode_chosen, decode_clip

FAMILY = "hunyuan_video15"
PROMPTS = [QUOTING, CAPTIONS[1]]
SIZE = {"image_size": (8, 16), "num_frames": 9, "max_sequence_length": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hunyuan(tmp_path_factory.mktemp("hunyuan") / "pipeline")


def noise_for(backbone, batch):
    return torch.randn(batch, *backbone.latent_shape(), generator=torch.Generator().manual_seed(7))


def pipeline_video(folder, noise, guidance_scale, tile=None, **arguments):
    """Pixels [B, 3, F, H, W] in [0, 1] of the pipeline itself."""
    from diffusers import HunyuanVideo15Pipeline
    from diffusers.guiders import ClassifierFreeGuidance

    guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
    pipeline = HunyuanVideo15Pipeline.from_pretrained(folder, guider=guider, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.tokenizer_max_length = 200
    pipeline.vae.enable_slicing()  # the mask of its middle block fits one video
    if tile:
        pipeline.vae.enable_tiling(4 * tile, 4 * tile, tile, tile)
    frames = pipeline(latents=noise.clone(), output_type="pt", num_inference_steps=3, **arguments).frames
    return torch.as_tensor(frames).transpose(1, 2)


def video_of(backbone, encoded, noise):
    with torch.no_grad():
        return backbone.decode(sample(backbone, encoded, noise)).clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize(
    ("guidance", "size", "frames", "tile"),
    [(1.0, (8, 16), 9, None), (4.0, (8, 16), 9, None), (4.0, (16, 8), 1, None), (4.0, (20, 12), 5, 4)],
    ids=["no guidance", "guidance", "tall image", "tiles"],
)
def test_videos_equal_the_pipelines(folder, guidance, size, frames, tile):
    keys = SIZE | {"image_size": size, "num_frames": frames}
    backbone, encoded = loaded(
        FAMILY, folder, prompt=PROMPTS, guidance_scale=guidance, negative_prompt=CAPTIONS[3],
        vae_tiling=bool(tile), **keys,
    )  # fmt: skip
    if tile:
        backbone.vae.enable_tiling(4 * tile, 4 * tile, tile, tile)
    noise = noise_for(backbone, 2)
    wanted = pipeline_video(
        folder,
        noise,
        guidance,
        tile,
        prompt=PROMPTS,
        negative_prompt=[CAPTIONS[3]] * 2,
        height=size[0],
        width=size[1],
        num_frames=frames,
    )
    assert (video_of(backbone, encoded, noise) - wanted).abs().max() < 1e-4


def test_timesteps_are_not_rounded_in_bfloat16(folder):
    backbone, encoded = loaded(FAMILY, folder, dtype="bf16", prompt=PROMPTS, guidance_scale=1.0, **SIZE)
    predict, noise = backbone.predictor([backbone.features(encoded[1])]), noise_for(backbone, 1)
    with torch.no_grad():
        first, second = (predict(noise, torch.tensor([t])) for t in (513.0, 514.0))
    assert first.isfinite().all() and not first.equal(second)


@pytest.mark.parametrize(
    ("context", "reach", "tiled"),
    [
        ("isolated", 1, False),
        ("isolated", 1, True),
        ("causal", 1, False),
        ("causal", 2, True),
        ("whole", 1, False),
        ("whole", 1, True),
    ],
)
def test_gradients_equal_central_differences(folder, context, reach, tiled, monkeypatch):
    backbone, encoded = loaded(FAMILY, folder, prompt=PROMPTS, vae_tiling=tiled, num_sampling_steps=2, **SIZE)
    if tiled:
        backbone.vae.enable_tiling(12, 12, 3, 3, tile_overlap_factor=1 / 3)
    with_adapter(in_float64(backbone, monkeypatch))
    backbone.denoiser.double()
    backbone.enable_checkpointing()
    assert gradient_error(backbone, encoded, torch.tensor([[2], [2]]), context, reach) < 1e-4


def test_a_tiny_model_learns(folder, tmp_path):
    keys = SIZE | {"num_frames": 5, "guidance_scale": 1.0, "train_batch_size": 1}
    assert_learns(FAMILY, folder, tmp_path, gain=0.05, **keys)


def test_chosen_frames_are_those_of_the_video(folder):
    backbone, _ = loaded(FAMILY, folder, prompt=PROMPTS, **SIZE)
    z, frames = noise_for(backbone, 2), torch.tensor([[0, 8, 5], [3, 1, 4]])
    with torch.no_grad():
        video = backbone.decode(z).transpose(1, 2)
        for context in ("causal", "whole"):
            chosen = backbone.decode_at(z, frames, context)
            torch.testing.assert_close(chosen, video[torch.arange(2)[:, None], frames])
        alone = backbone.decode_frames(z, torch.tensor([[0], [0]]), "isolated")
        torch.testing.assert_close(alone, video[:, :1])


def test_memory_of_decoding_with_a_gradient():
    """A causal frame costs the same in a long clip; a recomputed clip keeps caches instead of activations."""
    network = vae(spatial_compression_ratio=16, block_out_channels=(4, 8, 16, 32, 32), layers_per_block=2)
    forget_conv_inputs(network.requires_grad_(False))
    step = functools.partial(decode_step, network.decoder)
    z = torch.randn(1, 4, 21, 2, 2, requires_grad=True)
    short, long = (saved_bytes(functools.partial(decode_chosen, step, z, [last], 1))[0] for last in (3, 20))
    assert abs(long - short) < 0.1 * short
    plain, _ = saved_bytes(lambda: list(decode_clip(step, z)))
    kept, _ = saved_bytes(lambda: list(decode_clip(recomputed(step), z)))
    assert kept < 0.2 * plain


def test_caches_of_the_published_decoder():
    """What docs/families/hunyuan_video15.md says of a latent frame at 480p in bfloat16."""
    from diffusers import AutoencoderKLHunyuanVideo15

    with torch.device("meta"), torch.no_grad():
        decoder = AutoencoderKLHunyuanVideo15().decoder.to(torch.bfloat16)
        z, cache, held = torch.empty(1, 32, 1, 30, 53, dtype=torch.bfloat16), None, []
        for _ in range(3):
            pixels, cache = decode_step(decoder, z, cache)
            held.append(sum(t.nbytes for t in tree_leaves(cache)))
    assert pixels.shape == (1, 3, 4, 480, 848)
    keys_and_values = held[2] - held[1]
    assert (keys_and_values, held[2] - 2 * keys_and_values) == (6_512_640, 2_813_664_000)


def test_the_published_network_has_its_size():
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel

    with torch.device("meta"):  # the classes' defaults are the published configuration
        denoiser, decoder = HunyuanVideo15Transformer3DModel(task_type="t2v"), AutoencoderKLHunyuanVideo15()
        keys = [len(network.state_dict()) for network in (denoiser, decoder)]
        sizes = [sum(p.numel() for p in network.parameters()) for network in (denoiser, decoder)]
        adapted = lora.attach(denoiser, HunyuanVideo15.lora_targets, rank=16, alpha=16)
    assert (keys, sizes) == ([1801, 218], [8_326_608_160, 1_260_634_115])
    assert sum(p.numel() for p in lora.parameters(adapted).values()) == 64_880_640


@pytest.mark.parametrize("size", ["480p", "720p"])
def test_the_configs_are_valid(size):
    config = load_config([f"configs/hunyuan_video15/t2v_{size}.py"])
    side = {"480p": 640, "720p": 960}[size]
    ratio = HunyuanVideo15ImageProcessor().calculate_default_height_width(9, 16, side)
    assert (config.video_spec.height, config.video_spec.width) == ratio
    assert config.video_spec.num_frames == 121


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_frames": 10}, "num_frames must be a multiple of 4 plus 1, got 10; the nearest are 9 and 13"),
        ({"image_size": (8, 18)}, r"must be multiples of 4, got \(8, 18\); the nearest are \(8, 16\)"),
        ({"image_size": None}, "resolution '240p' with aspect_ratio '3:4' is not in this family's table"),
        (
            {"compile_blocks": True},
            "compile_blocks=True has no effect on backbone='hunyuan_video15'; remove it",
        ),
        ({"grad_checkpoint": "keep_attention"}, "grad_checkpoint='keep_attention' has no meaning"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_made_is_refused(folder, keys, message):
    with pytest.raises(ConfigError, match=message):
        config_for(FAMILY, folder, **SIZE | keys)


def test_other_and_incomplete_pipelines_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="holds a HunyuanVideo15Pipeline, and this family needs a Wan"):
        config_for("wan", folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(ConfigError, match="its component 'text_encoder_2' has no config.json"):
        config_for(FAMILY, copy, **SIZE)
