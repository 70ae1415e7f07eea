"""Tiny CogVideoX pipelines with random weights, saved as they are published."""

from pathlib import Path
from typing import Any

from pipelines import randomise, tiny_tokenizer
from torch import nn

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "clip_sample": False,
}
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": 24,
}
VAE = {
    "block_out_channels": (4, 4, 4),
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 48,
    "sample_width": 80,
}
# What tells the published sizes apart besides width and depth.
SIZES: dict[str, dict[str, Any]] = {
    "2b": {"use_rotary_positional_embeddings": False, "scaling_factor": 1.15258426, "snr_shift_scale": 3.0},
    "5b": {"use_rotary_positional_embeddings": True, "scaling_factor": 0.7, "snr_shift_scale": 1.0},
}


def tiny_t5(tokenizer: Any, width: int = 16) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return randomise(T5EncoderModel(config), 3)


def save_cogvideox(folder: Path, size: str = "2b", **changes: Any) -> Path:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    own, tokenizer = SIZES[size], tiny_tokenizer()
    rotary = own["use_rotary_positional_embeddings"]
    transformer = CogVideoXTransformer3DModel(
        **{**TRANSFORMER, **changes}, use_rotary_positional_embeddings=rotary
    )
    vae = randomise(AutoencoderKLCogVideoX(**VAE, scaling_factor=own["scaling_factor"]), 2, 0.1)
    vae.decoder.conv_out.conv.weight.data *= (
        0.2  # far from saturated, where a reward on colours has no gradient
    )
    CogVideoXPipeline(
        tokenizer,
        tiny_t5(tokenizer),
        vae,
        randomise(transformer, 1),
        CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=own["snr_shift_scale"]),
    ).save_pretrained(folder)
    return folder
