"""Sizes of the published networks, by hub id, where their files are not on this machine.

A pipeline's are those that its classes in diffusers default to, but for what is listed here; the text encoders' are
from their ``config.json`` on the hub. ``tests/test_estimate.py`` compares the sizes of denoisers and VAEs with those of
the downloads that the families state; those of text encoders are not compared.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

T5_XXL = {
    "class": "T5Config",
    **{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "feed_forward_proj": "gated-gelu",
}
UMT5_XXL = {**T5_XXL, "class": "UMT5Config", "vocab_size": 256384}
QWEN2_5_VL_7B = {
    "class": "Qwen2_5_VLTextConfig",
    **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4},
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
BYT5_SMALL = {
    "class": "T5Config",
    **{"vocab_size": 1510, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6},
    "feed_forward_proj": "gated-gelu",
}
CLIP_H14_TEXT = {
    "class": "CLIPTextConfig",
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}
WAN_SCHEDULER = {
    "class": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
WAN_1_3B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
WAN_5B = {
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
WAN_5B_VAE = {
    "class": "AutoencoderKLWan",
    **{"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2},
    **{"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16},
    **{"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
}


def wan(transformer: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    denoiser = {"class": "WanTransformer3DModel", **transformer}
    parts = {"transformer": denoiser, "vae": {"class": "AutoencoderKLWan"}, "text_encoder": UMT5_XXL}
    return {"pipeline": "WanPipeline", **parts, "scheduler": WAN_SCHEDULER, **more}


def cogvideox(**transformer: Any) -> dict[str, Any]:
    return {
        "pipeline": "CogVideoXPipeline",
        "transformer": {"class": "CogVideoXTransformer3DModel", **transformer},
        "vae": {"class": "AutoencoderKLCogVideoX"},
        "text_encoder": T5_XXL,
        "scheduler": {"class": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"},
    }


def hunyuan_video15() -> dict[str, Any]:
    return {
        "pipeline": "HunyuanVideo15Pipeline",
        "transformer": {"class": "HunyuanVideo15Transformer3DModel", "task_type": "t2v"},
        "vae": {"class": "AutoencoderKLHunyuanVideo15"},
        "text_encoder": QWEN2_5_VL_7B,
        "text_encoder_2": BYT5_SMALL,
        "scheduler": {"class": "FlowMatchEulerDiscreteScheduler"},
    }


A14B = {"class": "WanTransformer3DModel"}
PIPELINES: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": wan(WAN_1_3B),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": wan({}),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": wan(WAN_5B, vae=WAN_5B_VAE, index={"expand_timesteps": True}),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": wan({}, transformer_2=A14B, index={"boundary_ratio": 0.875}),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": wan(
        {"in_channels": 36}, transformer_2={**A14B, "in_channels": 36}, index={"boundary_ratio": 0.9}
    ),
    "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v": hunyuan_video15(),
    "hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v": hunyuan_video15(),
    "Lightricks/LTX-Video": {
        "pipeline": "LTXPipeline",
        "transformer": {"class": "LTXVideoTransformer3DModel"},
        "vae": {"class": "AutoencoderKLLTXVideo"},
        "text_encoder": T5_XXL,
        "scheduler": {
            "class": "FlowMatchEulerDiscreteScheduler",
            **{"use_dynamic_shifting": True, "base_image_seq_len": 1024, "max_image_seq_len": 4096},
            **{"base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1},
        },
    },
    "THUDM/CogVideoX-2b": cogvideox(),
    "THUDM/CogVideoX-5b": cogvideox(
        num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
    ),
    "damo-vilab/text-to-video-ms-1.7b": {
        "pipeline": "TextToVideoSDPipeline",
        "unet": {"class": "UNet3DConditionModel"},
        "vae": {
            "class": "AutoencoderKL",
            "block_out_channels": [128, 256, 512, 512],
            **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
            **{"layers_per_block": 2, "latent_channels": 4, "sample_size": 512},
        },
        "text_encoder": CLIP_H14_TEXT,
        "scheduler": {"class": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False},
    },
}


def settings_of(source: str, component: str) -> dict[str, Any]:
    """What a network of a published pipeline sets apart from its class's defaults."""
    return {key: value for key, value in PIPELINES[source][component].items() if key != "class"}


def write_pipeline(source: str, folder: Path) -> None:
    """The JSON files of a published pipeline, without its weights.

    Raises:
        ValueError: its sizes are not known here.
    """
    if source not in PIPELINES:
        raise ValueError(
            f"the sizes of {source!r} are not known, and its files are not on this machine; download its JSON files, "
            f"or estimate one of {', '.join(PIPELINES)}"
        )
    parts = dict(PIPELINES[source])
    index = {"_class_name": parts.pop("pipeline"), **parts.pop("index", {})}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for component, settings in parts.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component).mkdir()
        (folder / component / name).write_text(json.dumps(_complete(settings)), encoding="utf-8")


def _complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what the class of diffusers or transformers defaults to."""
    import diffusers

    own = {key: value for key, value in settings.items() if key != "class"}
    if (kind := getattr(diffusers, settings["class"], None)) is None:
        return own
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {"_class_name": settings["class"], **defaults, **own}
