"""File size of a frame as JPEG, predicted from CLIP image features by a small MLP."""

import itertools

from torch import Tensor, nn

from Core.rewards.base import RewardInfo
from Core.rewards.clip import CLIP_L14, load_image_tower
from Core.rewards.heads import VADER_PAPER, ClipHead, load_head_layers, vader_head
from Core.rewards.preprocess import Fit
from Core.utils.hub import locate

JPEG_HEAD = vader_head(
    "compression_reward.pt", 1_857_371, "4834909306ec3fd210805ad9eed6506338417ecf898aab7fa2d13f9c32ea2b2d"
)


class JpegSize(ClipHead):
    """Predicted kB as JPEG; loss ∓score, or |score − target| with a target in kB."""

    def __init__(
        self,
        *,
        model: str = CLIP_L14.source,
        head: str = JPEG_HEAD.source,
        target: float | None = None,
        resize: Fit = "squash",
    ):
        super().__init__()
        self.image = load_image_tower(locate(CLIP_L14.at(model)), resize, interpolation="bilinear")
        layers = load_head_layers(locate(JPEG_HEAD.at(head)), self.image)
        with_relu = itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers)
        self.head = nn.Sequential(*list(with_relu)[:-1])
        self.target = target

    def loss(self, score: Tensor) -> Tensor:
        return super().loss(score) if self.target is None else (score - self.target).abs()


class Compression(JpegSize):
    """Favours frames that compress well: plain and smooth. Loss is the predicted kB, or |kB − target|.

    Args:
        model: CLIP folder or hub id.
        head: the reference's ``compression_reward.pt``, or a file of the same layout (linear layers with ReLU
            between them, on the unit CLIP feature).
        target: kB.
        resize: how an image that is not square is fitted, with bilinear interpolation; by default stretched, as the
            frames the head was trained on.
    """

    info = RewardInfo(
        name="compression",
        summary="predicted JPEG size, minimised or moved to a target",
        range="kB, above 0",
        higher_is_better=False,
        paper=VADER_PAPER,
        weights={"model": CLIP_L14, "head": JPEG_HEAD},
    )


class Incompressibility(JpegSize):
    """Favours frames that compress badly: rich in detail. Loss is minus the predicted kB, or |kB − target|.

    Arguments as for ``compression``.
    """

    info = RewardInfo(
        name="incompressibility",
        summary="predicted JPEG size, maximised or moved to a target",
        range="kB, above 0",
        paper=VADER_PAPER,
        weights={"model": CLIP_L14, "head": JPEG_HEAD},
    )
