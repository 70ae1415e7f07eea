"""One file per training objective; ``OBJECTIVES`` is the line a new one adds itself to."""

from Core.utils.registry import Registry

from .base import Objective, ObjectiveSettings

OBJECTIVES: Registry[Objective] = Registry(
    "objective", {"reward_gradient": "Core.training.objectives.reward_gradient:RewardGradient"}
)

__all__ = ["OBJECTIVES", "Objective", "ObjectiveSettings"]
