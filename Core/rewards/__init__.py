"""Reward models: frozen scorers of videos whose gradient reaches the pixels."""

from Core.rewards.base import ImageReward, Reward, RewardInfo, RewardOutput, VideoReward
from Core.rewards.build import (
    build_reward,
    check_reward_config,
    frames_needed,
    parts_without_gradient,
    prompt_errors,
    required_weights,
)
from Core.rewards.registry import REGISTRY, register, resolve_reward
from Core.utils.hub import Weight

__all__ = [
    "REGISTRY",
    "ImageReward",
    "Reward",
    "RewardInfo",
    "RewardOutput",
    "VideoReward",
    "Weight",
    "build_reward",
    "check_reward_config",
    "frames_needed",
    "parts_without_gradient",
    "prompt_errors",
    "register",
    "required_weights",
    "resolve_reward",
]
