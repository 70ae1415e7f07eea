"""One file per training objective; ``OBJECTIVES`` is the line a new one adds itself to."""

from Core.utils.registry import Registry

from .base import Objective, ObjectiveSettings

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "reward_gradient": "Core.training.objectives.reward_gradient:RewardGradient",
        "leap": "Core.training.objectives.leap:Leap",
        "drtune": "Core.training.objectives.drtune:DRTune",
        "direct_align": "Core.training.objectives.direct_align:DirectAlign",
        "grpo": "Core.training.objectives.grpo:GRPO",
        "nft": "Core.training.objectives.nft:NFT",
        "dpo": "Core.training.objectives.dpo:DPO",
        "dpo_pairs": "Core.training.objectives.dpo_pairs:DPOPairs",
    },
)

__all__ = ["OBJECTIVES", "Objective", "ObjectiveSettings"]
