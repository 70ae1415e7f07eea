"""The oracle as a reward: a number without a gradient, for objectives that need none.

``reward_fn = "scripts/demo/oracle_reward.py:Oracle"``
"""

import torch
from torch import Tensor

from Core.rewards import RewardInfo, VideoReward
from scripts.demo import oracle, world
from scripts.demo.common import to_uint8

ATTRIBUTES = ("colour", "shape", "direction")


class Oracle(VideoReward):
    """Share of colour, shape and direction that the oracle reads from a video as its prompt says them."""

    info = RewardInfo(name="oracle", summary="colour, shape and direction right", range="0 to 1")
    differentiable = False

    def sample_frames(self, count: int, fps: float | None) -> Tensor:
        """All, since motion is read from the first and the last."""
        return torch.arange(count)

    @torch.no_grad()
    def score_clips(self, clips: Tensor, prompts: list[str]) -> list[float]:
        return [
            matches(oracle.read(clip) or {}, world.parse_caption(prompt))
            for clip, prompt in zip(to_uint8(clips.cpu() * 2 - 1), prompts, strict=True)
        ]


def matches(seen: dict[str, str | None], said: dict[str, str]) -> float:
    """Share of what the caption says that is seen."""
    named = [name for name in ATTRIBUTES if name in said]
    return sum(seen.get(name) == said[name] for name in named) / max(1, len(named))
