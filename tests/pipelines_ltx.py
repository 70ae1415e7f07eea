"""Tiny LTX-Video pipelines with random weights, saved as they are published."""

from pathlib import Path
from typing import Any

import torch
from pipelines import randomise, tiny_tokenizer
from pipelines_cogvideox import tiny_t5

TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 16,
}
VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "patch_size": 2,
}
DECODERS: dict[str, dict[str, Any]] = {
    "0.9.0": {
        "decoder_block_out_channels": (8, 8, 8, 8),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
    "0.9.1": {
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (True, True, True, False),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
    },
}
# As 0.9.1 without noise in its layers, and an encoder that compresses in other places.
DECODERS["0.9.5"] = {
    **DECODERS["0.9.1"],
    "decoder_inject_noise": (False, False, False, False),
    "block_out_channels": (8, 8, 8, 8, 8),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "spatio_temporal_scaling": (True, True, True, True),
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 8,
}
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def save_ltx(folder: Path, version: str = "0.9.0") -> Path:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    tokenizer = tiny_tokenizer()
    vae = randomise(AutoencoderKLLTXVideo(**{**VAE, **DECODERS[version]}), 2, 0.1)
    vae.decoder.conv_out.conv.weight.data *= (
        0.2  # far from saturated, where a reward on colours has no gradient
    )
    if vae.config.timestep_conditioning:
        vae.decoder.timestep_scale_multiplier.data.fill_(1000.0)
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.8, 2.0, 1.1]))
    LTXPipeline(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae,
        tiny_t5(tokenizer),
        tokenizer,
        randomise(LTXVideoTransformer3DModel(**TRANSFORMER), 1),
    ).save_pretrained(folder)
    return folder
