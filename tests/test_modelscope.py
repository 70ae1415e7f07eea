"""ModelScope through its own sampler and decoder equals the pipeline of diffusers."""

import json
import math
import shutil

import pytest
import torch
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
from pipelines_modelscope import save_modelscope

from Core.backbones.modelscope import ModelScope
from Core.config import ConfigError, load_config
from Core.modules import lora
from Core.utils.hub import locate

FAMILY = "modelscope"
SIZE = {"image_size": (8, 16), "num_frames": 3, "max_sequence_length": 77}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_modelscope(tmp_path_factory.mktemp("modelscope") / "pipeline")


def noise_for(backbone, batch):
    return torch.randn(batch, *backbone.latent_shape(), generator=torch.Generator().manual_seed(7))


def pipeline_video(folder, noise, tile=None, **arguments):
    """Pixels [B, 3, T, H, W] in [0, 1] of the pipeline itself."""
    from diffusers import TextToVideoSDPipeline

    pipeline = TextToVideoSDPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if tile:
        pipeline.vae.enable_tiling()
        pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = tile, 2 * tile
    frames = pipeline(latents=noise.clone(), output_type="pt", num_inference_steps=3, **arguments).frames
    return torch.as_tensor(frames).transpose(1, 2)


@pytest.mark.parametrize(
    ("guidance", "size", "frames", "tile"),
    [(1.0, (8, 16), 3, None), (9.0, (8, 16), 3, None), (9.0, (16, 8), 1, None), (9.0, (24, 16), 2, 8)],
    ids=["no guidance", "guidance", "tall image", "tiles"],
)
def test_videos_equal_the_pipelines(folder, guidance, size, frames, tile):
    keys = SIZE | {"image_size": size, "num_frames": frames, "vae_tiling": bool(tile)}
    backbone, encoded = loaded(FAMILY, folder, guidance_scale=guidance, negative_prompt=CAPTIONS[3], **keys)
    if tile:
        backbone.vae.tile_latent_min_size = tile
    noise = noise_for(backbone, 2)
    wanted = pipeline_video(
        folder,
        noise,
        tile,
        prompt=list(CAPTIONS[:2]),
        negative_prompt=[CAPTIONS[3]] * 2,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        num_frames=frames,
    )
    with torch.no_grad():
        video = backbone.decode(sample(backbone, encoded, noise)).clamp(-1, 1) / 2 + 0.5
    assert (video - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("tiled", [False, True], ids=["whole frames", "tiles"])
def test_gradients_equal_central_differences(folder, tiled, monkeypatch):
    backbone, encoded = loaded(FAMILY, folder, vae_tiling=tiled, num_sampling_steps=2, **SIZE)
    if tiled:
        backbone.vae.tile_latent_min_size = 4
    with_adapter(in_float64(backbone, monkeypatch))
    backbone.denoiser.double()
    backbone.enable_checkpointing()
    assert gradient_error(backbone, encoded, torch.tensor([[2, 0], [1, 1]]), "isolated") < 1e-4


def test_a_tiny_model_learns(folder, tmp_path):
    # The last of DDIM's steps starts at the second noise level, where a prediction changes little.
    keys = SIZE | {
        "num_frames": 2,
        "guidance_scale": 1.0,
        "train_batch_size": 1,
        "backprop_steps": 2,
        "lr": 0.1,
    }
    # Attention alone is adapted, whose part in this small network's prediction is small.
    assert_learns(FAMILY, folder, tmp_path, gain=0.01, grad_checkpoint=False, **keys)


def test_grpo_leaves_out_a_step_that_draws_no_noise(folder, tmp_path, capsys):
    """Without an offset the last timestep is the lowest level, from which the step to data is deterministic."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps_offset": 0}))
    keys = SIZE | {"num_frames": 1, "objective": "grpo", "group_size": 2, "clip_range": 0.1, "kl_weight": 0.1}
    keys |= {"inner_epochs": 2, "decode_frame": "video", "max_train_steps": 2, "num_sampling_steps": 3}
    assert loaded(FAMILY, copy, **SIZE, num_sampling_steps=3)[0].timesteps(1)[:, 0].tolist() == [667, 334, 1]
    first, second = train(FAMILY, copy, tmp_path / "run", **keys)
    assert 0 < float(first["grad_norm"]) < math.inf and 0 < float(second["grad_norm"]) < math.inf
    assert 0.5 < float(second["ratio"]) < 2
    train(FAMILY, copy, tmp_path / "as_many", **keys, grad_steps=2)
    with pytest.raises(AssertionError):
        train(FAMILY, copy, tmp_path / "more", **keys, grad_steps=3)
    assert "is to train 3 of the sampling steps that draw noise, and 2 of 3 do" in capsys.readouterr().err


def test_memory_of_decoding_with_a_gradient(folder):
    """A recomputed frame keeps its latent and its pixels, and no longer video adds to a chosen frame."""
    backbone, _ = loaded(FAMILY, folder, **SIZE)

    def kept(frames):
        z = torch.randn(1, 4, frames, 4, 8, requires_grad=True)
        return saved_bytes(lambda: backbone.decode_frames(z, torch.tensor([[frames - 1]])))[0]

    plain = kept(16)
    assert kept(4) == plain
    backbone.enable_checkpointing()
    assert kept(16) < 0.2 * plain


def test_memory_of_a_gradient_step(folder):
    """With checkpointing a sampling step keeps the inputs of blocks alone."""
    backbone, encoded = loaded(FAMILY, folder, guidance_scale=1.0, **SIZE)
    with_adapter(backbone)
    predict = backbone.predictor([backbone.features(e) for e in encoded])
    noise, t = noise_for(backbone, 2), torch.full((2,), 500.0)
    plain = saved_bytes(lambda: predict(noise, t))[0]
    backbone.enable_checkpointing()
    assert saved_bytes(lambda: predict(noise, t))[0] < 0.2 * plain


def test_the_published_networks_have_their_size():
    from diffusers import AutoencoderKL, UNet3DConditionModel

    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        denoiser = UNet3DConditionModel(sample_size=32, cross_attention_dim=1024, attention_head_dim=64)
        networks = denoiser, AutoencoderKL(**vae)
        keys = [len(network.state_dict()) for network in networks]
        sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
        adapted = lora.attach(denoiser, ModelScope.lora_targets, rank=16, alpha=16)
    assert (keys, sizes) == ([1480, 248], [1_411_233_860, 83_653_863])
    assert sum(p.numel() for p in lora.parameters(adapted).values()) == 12_351_488


def test_the_config_is_valid():
    config = load_config(["configs/modelscope/t2v_256p.py"])
    assert (config.video_spec.height, config.video_spec.width, config.video_spec.num_frames) == (256, 256, 16)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_size": (8, 17)}, r"must be multiples of 2, got \(8, 17\); the nearest are \(8, 16\)"),
        ({"image_size": None}, "resolution '240p' with aspect_ratio '3:4' is not in this family's table"),
        ({"max_sequence_length": 78}, "max_sequence_length must be at most 77"),
        ({"compile_blocks": True}, "compile_blocks=True has no effect on backbone='modelscope'; remove it"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_made_is_refused(folder, keys, message):
    with pytest.raises(ConfigError, match=message):
        config_for(FAMILY, folder, **SIZE | keys)


def test_causal_decoding_is_refused(folder):
    with pytest.raises(ConfigError, match="decode_context='causal' has no meaning for backbone='modelscope'"):
        config_for(
            FAMILY, folder, **SIZE, is_vader_training=True, decode_context="causal", reward_fn="saturation"
        )


def test_other_and_incomplete_pipelines_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("TextToVideoSD", "VideoToVideoSD"))
    with pytest.raises(
        ConfigError, match="holds a VideoToVideoSDPipeline, and this family needs a TextToVideoSD"
    ):
        config_for(FAMILY, copy, **SIZE)
    shutil.rmtree(copy / "unet")
    with pytest.raises(ConfigError, match="its component 'unet' has no config.json"):
        config_for(FAMILY, copy, **SIZE)


def test_the_licence_is_said_when_weights_are_fetched(folder, monkeypatch, caplog):
    def snapshot_download(source, local_files_only=False, **_):
        if local_files_only:
            raise FileNotFoundError(source)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with caplog.at_level("INFO", "vader"):
        assert locate(ModelScope.weights["model_path"]) == folder
    assert "fetching damo-vilab/text-to-video-ms-1.7b, about 6.0 GB, licence CC-BY-NC-4.0" in caplog.text
