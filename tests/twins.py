"""A tiny Open-Sora 1.2 with random weights, saved in the hub's layout: every class is the real one."""

from pathlib import Path

import torch
from reward_twins import clip_folder, randomize
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
from opensora.models.vae.vae import VideoAutoencoderPipeline, VideoAutoencoderPipelineConfig

PROMPTS = [
    "a red fox runs through snow",
    "a blue bird sits on a branch",
    "a green boat on a calm lake",
    "a dancer turns under warm light",
]
TEXT_LENGTH = 24
TEXT_WIDTH = 32
STDIT = dict(
    depth=2,
    hidden_size=64,
    num_heads=4,
    caption_channels=TEXT_WIDTH,
    model_max_length=TEXT_LENGTH,
    qk_norm=True,
)
VAE_2D = dict(
    block_out_channels=(8, 8, 8, 8),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
    scaling_factor=0.18215,
)
VAE_TEMPORAL = dict(
    type="VAE_Temporal", filters=8, num_res_blocks=1, channel_multipliers=(1, 2, 2, 4), num_groups=4
)


def stdit(seed: int = 0) -> STDiT3:
    return randomize(STDiT3(STDiT3Config(**STDIT)), seed)


def vae(seed: int = 0) -> VideoAutoencoderPipeline:
    config = VideoAutoencoderPipelineConfig(
        vae_2d=dict(type="VideoAutoencoderKL", config=VAE_2D, micro_batch_size=4),
        vae_temporal=VAE_TEMPORAL,
        micro_frame_size=17,
        shift=(-0.1, 0.3, 0.2, 0.9),
        scale=(3.0, 2.0, 2.5, 3.1),
    )
    return randomize(VideoAutoencoderPipeline(config), seed)


def t5_folder(folder: Path) -> Path:
    tokenizer = T5Tokenizer().train_new_from_iterator(PROMPTS * 3, 120)
    sizes = dict(d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_twin(root: Path) -> Path:
    """Write model, VAE, text encoder, CLIP and prompts under ``root``."""
    stdit().save_pretrained(root / "stdit")
    vae().save_pretrained(root / "vae")
    t5_folder(root / "t5")
    clip_folder(root / "clip")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return root


def settings(root: Path, run: Path, **overrides) -> dict:
    """Config values of a run of a few seconds on the twin: 17 frames of 32×32, 4 steps, float32."""
    values = dict(
        image_size=(32, 32),
        num_frames=17,
        model=dict(type="STDiT3-XL/2", from_pretrained=str(root / "stdit")),
        vae=dict(type="OpenSoraVAE_V1_2", from_pretrained=str(root / "vae"), micro_frame_size=17),
        text_encoder=dict(type="t5", from_pretrained=str(root / "t5"), model_max_length=TEXT_LENGTH),
        scheduler=dict(type="rflow", use_timestep_transform=True, num_sampling_steps=4, cfg_scale=3.0),
        dtype="fp32",
        mixed_precision="no",
        text_cache=str(root / "text_cache"),
        prompt_path=str(root / "prompts.txt"),
        reward_fn="pick_score",
        reward_args=dict(model=str(root / "clip")),
        train_batch_size=2,
        gradient_accumulation_steps=1,
        max_train_steps=3,
        lora_rank=4,
        lr=1e-3,
        project_dir=str(run),
        validation_steps=100,
        checkpointing_steps=100,
        num_val_runs=1,
        verbose=0,
    )
    return {**values, **overrides}


def config_file(path: Path, values: dict) -> Path:
    """The values as an mmengine config file."""
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()), encoding="utf-8")
    return path
