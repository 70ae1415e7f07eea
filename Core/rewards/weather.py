"""Rain or snow, told from CLIP image features by a small sigmoid read-out."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from Core.rewards.base import RewardInfo
from Core.rewards.clip import CLIP_L14, load_image_tower
from Core.rewards.heads import ClipHead, load_head_layers
from Core.rewards.preprocess import Fit
from Core.utils.hub import Weight, locate

WEATHER_HEAD = Weight(source="weather_reward.pt", kind="file", size=3_715_000, licence="not stated")
TARGETS = {"rainy": 1.0, "snowy": 0.0}


class Weather(ClipHead):
    """Probability of rain rather than snow; loss (score − target)², target 1 for `rainy` and 0 for `snowy`.

    kind: which weather to train towards. model: CLIP folder or hub id. head: file in the LAION layout, applied
    to the unit CLIP feature, with a sigmoid. resize: as in `aesthetic`.
    """

    info = RewardInfo(
        name="weather",
        summary="rainy or snowy look",
        range="0 (snow) to 1 (rain)",
        paper="Prabhudesai et al. 2024, arXiv:2407.08737",
        weights={"model": CLIP_L14, "head": WEATHER_HEAD},
    )

    def __init__(
        self,
        *,
        kind: Literal["rainy", "snowy"] = "rainy",
        model: str = CLIP_L14.source,
        head: str = WEATHER_HEAD.source,
        resize: Fit | None = None,
    ):
        super().__init__()
        self.image = load_image_tower(locate(CLIP_L14.at(model)), resize)
        self.head = nn.Sequential(*load_head_layers(locate(WEATHER_HEAD.at(head)), self.image), nn.Sigmoid())
        self.target = TARGETS[kind]

    @property
    def higher_is_better(self) -> bool:
        return self.target == 1.0

    def loss(self, score: Tensor) -> Tensor:
        return (score - self.target).square()
