"""LAION aesthetic predictor V2: a linear read-out of CLIP image features, rated 1 to 10 by people."""

from torch import Tensor, nn

from Core.rewards.base import RewardInfo
from Core.rewards.clip import CLIP_L14, load_image_tower
from Core.rewards.heads import ClipHead, load_head_layers
from Core.rewards.preprocess import Fit
from Core.utils.hub import Weight, locate

LAION_HEAD = Weight(
    source="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    kind="file",
    file="sac+logos+ava1-l14-linearMSE.pth",
    size=3_714_759,
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    licence="Apache-2.0",
)


class Aesthetic(ClipHead):
    """LAION head on the unit CLIP feature; loss 0.1 · |score − 10|.

    Args:
        model: CLIP folder or hub id.
        head: file in the LAION layout (``layers.0.weight``, …) for that CLIP's width.
        resize: how an image that is not square is fitted; by default as the CLIP folder says. A crop's odd margin
            is rounded as torchvision does in LAION's and openai/CLIP's pipeline.
        target: score aimed at.
    """

    info = RewardInfo(
        name="aesthetic",
        summary="predicted human rating of an image's look",
        range="1 to 10",
        paper="Schuhmann 2022, LAION-Aesthetics V2",
        weights={"model": CLIP_L14, "head": LAION_HEAD},
    )

    def __init__(
        self,
        *,
        model: str = CLIP_L14.source,
        head: str = LAION_HEAD.source,
        resize: Fit | None = None,
        target: float = 10.0,
    ):
        super().__init__()
        self.image = load_image_tower(locate(CLIP_L14.at(model)), resize, round_half="even")
        self.head = nn.Sequential(*load_head_layers(locate(LAION_HEAD.at(head)), self.image))
        self.target = target

    def loss(self, score: Tensor) -> Tensor:
        return 0.1 * (score - self.target).abs()
