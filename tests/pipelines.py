"""Tiny pipelines of the real diffusers classes, with random weights, saved as they are published."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from Core.backbones import Backbone
from Core.build import new_backbone
from Core.config import build_config
from Core.data.text_embeddings import encode_prompts

CAPTIONS = ("a red fox jumps over the snow", "two boats", "", "ugly, blurred")


def randomise(network: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Give every parameter random values, so that no zero initialisation hides a branch."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else scale
        centre = 1.0 if name.endswith(("gamma", "norm.weight", "layer_norm.weight")) else 0.0
        parameter.data = (centre + values * size).to(parameter.dtype)
    return network.eval()


def tiny_tokenizer() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer().train_new_from_iterator(CAPTIONS * 4, 60)


def tiny_umt5(tokenizer: Any, width: int = 16) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return randomise(UMT5EncoderModel(config), 3)


def wan_transformer(seed: int = 1, **changes: Any) -> nn.Module:
    from diffusers import WanTransformer3DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return randomise(WanTransformer3DModel(**{**sizes, **changes}), seed)


def wan_vae(fine: bool = False) -> nn.Module:
    """The VAE of Wan 2.1, or the finer one of TI2V-5B."""
    from diffusers import AutoencoderKLWan

    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 2.0, 1.1]}
    sizes = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if fine:
        sizes |= {"decoder_base_dim": 4, "is_residual": True, "in_channels": 12, "out_channels": 12}
        sizes |= {"patch_size": 2, "scale_factor_spatial": 16}
    return randomise(AutoencoderKLWan(dim_mult=[1, 2, 2, 2], **sizes, **statistics), 2, 0.1)


def save_wan(folder: Path, kind: str = "2.1") -> Path:
    """A tiny Wan: ``2.1``, ``ti2v`` (5B), ``a14b`` or ``i2v`` (A14B)."""
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

    tokenizer = tiny_tokenizer()
    channels = {"in_channels": 12} if kind == "i2v" else {}
    extra: dict[str, Any] = {"expand_timesteps": True} if kind == "ti2v" else {}
    if kind in ("a14b", "i2v"):
        extra = {"transformer_2": wan_transformer(5, **channels), "boundary_ratio": 0.875}
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": tiny_umt5(tokenizer),
        "vae": wan_vae(kind == "ti2v"),
        "transformer": wan_transformer(1, **channels),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
    if kind == "i2v":
        pipeline: Any = WanImageToVideoPipeline(**parts, **extra, image_processor=None, image_encoder=None)
    else:
        pipeline = WanPipeline(**parts, **extra)
    pipeline.save_pretrained(folder)
    return folder


def config_for(family: str, folder: Path, **keys: Any):
    """A checked configuration of a tiny pipeline, in float32."""
    settings = {
        "backbone": family,
        "model_path": str(folder),
        "dtype": "fp32",
        "mixed_precision": "no",
        "image_size": (32, 64),
        "num_frames": 9,
        "num_sampling_steps": 3,
        "max_sequence_length": 24,
        "prompt": list(CAPTIONS[:2]),
        "project_dir": str(folder / "run"),
        "text_cache": str(folder / "text"),
        "is_vader_training": False,
    }
    return build_config({**settings, **keys})


def loaded(family: str, folder: Path, **keys: Any) -> tuple[Backbone, list]:
    """The loaded family on the CPU, and its encoded prompts."""
    config = config_for(family, folder, **keys)
    backbone = new_backbone(config, torch.device("cpu"))
    assert not backbone.fetch()
    encoded = encode_prompts(backbone, config.prompt_list, config.models.text_cache)
    backbone.load()
    return backbone, encoded


def sample(backbone: Backbone, encoded: list, noise: torch.Tensor) -> torch.Tensor:
    """Final latents of the family's own sampler from ``noise``."""
    from Core.sampling.euler import run_steps

    step = backbone.inference_step(backbone.predictor([backbone.features(e) for e in encoded]), len(noise))
    with torch.no_grad(), backbone.no_grad_steps():
        return run_steps(step, noise, 0, len(step.timesteps))
