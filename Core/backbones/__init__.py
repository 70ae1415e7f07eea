"""One file per model family; ``BACKBONES`` is the line a new family adds itself to."""

from .base import Backbone, TextEncoder, VideoSpec
from .opensora import OpenSora

BACKBONES: dict[str, type[Backbone]] = {"opensora": OpenSora}

__all__ = ["BACKBONES", "Backbone", "OpenSora", "TextEncoder", "VideoSpec"]
