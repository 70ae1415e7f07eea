"""PickScore: preference of people between images for a prompt (Kirstain et al. 2023, arXiv:2305.01569)."""

from torch import Tensor

from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.clip import load_clip
from Core.rewards.preprocess import Fit
from Core.utils.hub import Weight, locate


class PickScore(ImageReward):
    """exp(logit_scale) · cos(image, own prompt); loss |1 − score / 100|.

    exp(logit_scale) is at most 100 in a CLIP (Radford et al. 2021, arXiv:2103.00020), so a score is too; which part of
    the range is used depends on the weights. The demo's small PickScore gives videos of the base model 51 and true
    videos 78 (`scripts/demo/measure.py`); the published weights have not been run here.

    Args:
        model: CLIP of any size, as a folder or hub id, with its tokenizer beside it.
        resize: how an image that is not square is fitted; by default as the folder says (PickScore: short side to
            size, centre crop).
    """

    info = RewardInfo(
        name="pick_score",
        summary="CLIP ViT-H fine-tuned on human image preferences",
        range="between -100 and 100, depending on the weights",
        paper="Kirstain et al. 2023, arXiv:2305.01569",
        weights={
            "model": Weight(
                source="yuvalkirstain/PickScore_v1",
                parts=("tokenizer", "processor"),
                size=3_944_000_000,
                licence="not stated",
            )
        },
    )

    def __init__(self, *, model: str = "yuvalkirstain/PickScore_v1", resize: Fit | None = None):
        super().__init__()
        folder = locate(self.info.weights["model"].at(model))
        self.image, self.text, self.logit_scale = load_clip(folder, resize)

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.logit_scale * (self.image(images) * self.text(prompts)).sum(dim=-1)

    def loss(self, score: Tensor) -> Tensor:
        return (1 - score / 100).abs()
