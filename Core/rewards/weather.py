"""How rainy or snowy a frame looks, told from CLIP image features by a sigmoid read-out for each weather."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from Core.rewards.base import RewardInfo
from Core.rewards.clip import CLIP_L14, load_image_tower
from Core.rewards.heads import VADER_PAPER, ClipHead, load_head_layers, vader_head
from Core.rewards.preprocess import Fit
from Core.utils.hub import Weight, locate

RAINY_HEAD = vader_head(
    "rainy_reward.pt", 3_715_200, "bfa1e0f38d6a8ed08637a72a141ea26fefe05632f5c160e952aa903f24ff80d3"
)
SNOWY_HEAD = vader_head(
    "snowy_reward.pt", 3_715_200, "dae251d2b71dd08b8d43f9ea8b2550ac60159ed02f54bede6162b0108d54f991"
)
HEADS = {"rainy": RAINY_HEAD, "snowy": SNOWY_HEAD}


class WeatherAmount(ClipHead):
    """Predicted amount of one weather; loss |score − target|."""

    def __init__(
        self,
        *,
        model: str = CLIP_L14.source,
        head: str | None = None,
        target: float = 1.0,
        resize: Fit = "squash",
    ):
        super().__init__()
        self.load(self.required_weights({"model": model, "head": head}), target, resize)

    def load(self, weights: Mapping[str, Weight], target: float, resize: Fit) -> None:
        """Take the networks from ``weights``."""
        self.image = load_image_tower(locate(weights["model"]), resize, interpolation="bilinear")
        self.head = nn.Sequential(*load_head_layers(locate(weights["head"]), self.image), nn.Sigmoid())
        self.target = target

    def loss(self, score: Tensor) -> Tensor:
        return (score - self.target).abs()


class Rainy(WeatherAmount):
    """Predicted amount of rain; loss |score − target|.

    Args:
        model: CLIP folder or hub id.
        head: file in the LAION layout, applied to the unit CLIP feature and followed by a sigmoid; by default the
            published ``rainy_reward.pt``.
        target: score aimed at.
        resize: as in ``compression``.
    """

    info = RewardInfo(
        name="rainy",
        summary="predicted amount of rain",
        range="0 to 1",
        paper=VADER_PAPER,
        weights={"model": CLIP_L14, "head": RAINY_HEAD},
    )


class Snowy(WeatherAmount):
    """Predicted amount of snow; loss |score − target|.

    Arguments as for ``rainy``; the published head is ``snowy_reward.pt``.
    """

    info = RewardInfo(
        name="snowy",
        summary="predicted amount of snow",
        range="0 to 1",
        paper=VADER_PAPER,
        weights={"model": CLIP_L14, "head": SNOWY_HEAD},
    )


class Weather(WeatherAmount):
    """``rainy`` or ``snowy``, by an argument.

    Args:
        kind: which of the two, and so which published head.
        model: CLIP folder or hub id.
        head: as in ``rainy``, by default the published one of ``kind``.
        target: score aimed at.
        resize: as in ``compression``.
    """

    info = RewardInfo(
        name="weather",
        summary="`rainy` or `snowy`, by its argument `kind`",
        range="0 to 1",
        paper=VADER_PAPER,
        weights={"model": CLIP_L14, "head": RAINY_HEAD},
    )

    def __init__(
        self,
        *,
        kind: Literal["rainy", "snowy"] = "rainy",
        model: str = CLIP_L14.source,
        head: str | None = None,
        target: float = 1.0,
        resize: Fit = "squash",
    ):
        ClipHead.__init__(self)
        self.load(self.required_weights({"kind": kind, "model": model, "head": head}), target, resize)

    @classmethod
    def required_weights(cls, args: Mapping[str, Any]) -> dict[str, Weight]:
        published = HEADS[args.get("kind", "rainy")]
        return super().required_weights(args) | {"head": published.at(args.get("head") or published.source)}
