"""A tiny ModelScope of the real classes, with random weights, saved as it is published."""

from pathlib import Path
from typing import Any

from pipelines import CAPTIONS, randomise
from torch import nn

# The published noise levels.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def randomised(network: nn.Module, seed: int, scale: float = 0.3) -> nn.Module:
    """``randomise`` with norms near the identity, also where their names do not say that they are norms."""
    for module in randomise(network, seed, scale).modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.data += 1
    return network


def clip_text() -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer().train_new_from_iterator(CAPTIONS * 4, 300)
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {"tokenizer": tokenizer, "text_encoder": randomise(CLIPTextModel(config), 3)}


def unet(**changes: Any) -> nn.Module:
    from diffusers import UNet3DConditionModel

    sizes = {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
    return randomised(UNet3DConditionModel(**{**sizes, **changes}), 1)


def image_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    network = randomised(network, 2, 0.1)
    network.decoder.conv_out.weight.data *= 0.3  # pixels within their range
    return network


def save_modelscope(folder: Path) -> Path:
    from diffusers import DDIMScheduler, TextToVideoSDPipeline

    parts = {**clip_text(), "unet": unet(), "vae": image_vae(), "scheduler": DDIMScheduler(**SCHEDULE)}
    TextToVideoSDPipeline(**parts).save_pretrained(folder)
    return folder
