"""One file per model family; ``BACKBONES`` is the line a new family adds itself to."""

from Core.utils.registry import Registry

from .base import (
    Backbone,
    EncodedPrompt,
    FamilySettings,
    Features,
    ModelSettings,
    Prompt,
    TextEncoder,
    VideoSettings,
    VideoSpec,
)
from .own_opensora import offer_copy

offer_copy()

BACKBONES: Registry[Backbone] = Registry(
    "backbone",
    {
        "opensora": "Core.backbones.opensora:OpenSora",
        "wan": "Core.backbones.wan:Wan",
        "cogvideox": "Core.backbones.cogvideox:CogVideoX",
        "ltx": "Core.backbones.ltx:Ltx",
        "hunyuan_video15": "Core.backbones.hunyuan_video15:HunyuanVideo15",
        "modelscope": "Core.backbones.modelscope:ModelScope",
    },
)

__all__ = [
    "BACKBONES",
    "Backbone",
    "EncodedPrompt",
    "FamilySettings",
    "Features",
    "ModelSettings",
    "Prompt",
    "TextEncoder",
    "VideoSettings",
    "VideoSpec",
]
