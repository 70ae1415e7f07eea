"""Aesthetic Predictor V2.5: a linear read-out of SigLIP image features, rated 1 to 10 by people."""

from torch import Tensor, nn

from Core.rewards.base import RewardInfo
from Core.rewards.heads import ClipHead, load_head_layers
from Core.rewards.siglip import load_siglip_image
from Core.utils.hub import Weight, locate

SIGLIP = Weight(
    source="google/siglip-so400m-patch14-384",
    parts=("processor",),
    size=3_511_000_000,
    licence="Apache-2.0",
)
HEAD = Weight(
    source="https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
    kind="file",
    file="aesthetic_predictor_v2_5.pth",
    size=5_300_000,  # by its parameters
    licence="AGPL-3.0",
)


class AestheticV25(ClipHead):
    """The head of aesthetic-predictor-v2-5 on the unit SigLIP feature; loss 0.1 · |score − 10|.

    The head is under the AGPL-3.0 and has no known hash to check it by, so it is not downloaded: fetch
    ``models/aesthetic_predictor_v2_5.pth`` from github.com/discus0434/aesthetic-predictor-v2-5 and give its path.
    Formula and layout are those of the package ``aesthetic-predictor-v2-5`` 2024.12.18; its weights have not been run
    here.

    Args:
        model: SigLIP folder or hub id.
        head: file in the layout of the published one (``scoring_head.0.weight``, …) for that SigLIP's width.
        target: score aimed at.
    """

    info = RewardInfo(
        name="aesthetic_v2_5",
        summary="predicted human rating of an image's look, by SigLIP",
        range="1 to 10, good images above 5.5",
        paper="discus0434 2024, aesthetic-predictor-v2-5",
        weights={"model": SIGLIP, "head": HEAD},
    )

    def __init__(self, *, model: str = SIGLIP.source, head: str = HEAD.source, target: float = 10.0):
        super().__init__()
        self.image = load_siglip_image(locate(SIGLIP.at(model)), None)
        self.head = nn.Sequential(*load_head_layers(locate(HEAD.at(head)), self.image, "scoring_head"))
        self.target = target

    def loss(self, score: Tensor) -> Tensor:
        return 0.1 * (score - self.target).abs()
