"""Rectified-flow sampling with a gradient window, under the names that upstream Open-Sora uses."""

from Core.backbones.opensora_sampling import RFLOW

__all__ = ["RFLOW"]
