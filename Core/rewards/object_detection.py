"""Presence or absence of an object, by the YOLOS detector (Fang et al. 2021, arXiv:2106.00666)."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from Core.rewards.arguments import unknown_name
from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.classifier import ClassProbability, log_odds
from Core.rewards.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    interpolation_of,
    normalize,
    read_processor_config,
    resize,
)
from Core.utils.hub import Weight, locate
from Core.utils.state_dict import load_strictly

YOLOS = Weight(source="hustvl/yolos-small", parts=("processor",), size=123_000_000, licence="Apache-2.0")
PATCH = 16  # pixels; a YOLOS image is a whole number of patches


def detector_size(height: int, width: int, short: int, long: int | None) -> tuple[int, int]:
    """Size a YOLOS image is brought to: short side to ``short`` unless the long one would exceed ``long``.

    Both sides are rounded down, first to whole pixels, then to a multiple of 16 (the patch), of which there is
    at least one.
    """
    small, large = sorted((height, width))
    side: float = short
    if long is not None and short * large / small > long:
        side = long * small / large
    shorter, longer = round(side), int(side * large / small)
    rows, columns = (shorter, longer) if height <= width else (longer, shorter)
    return max(PATCH, rows - rows % PATCH), max(PATCH, columns - columns % PATCH)


class ObjectDetection(ClassProbability, ImageReward):
    """Highest probability p of a class over all boxes; loss −log p, or −log(1 − p) to lower it.

    Args:
        label: the class, by the detector's name (COCO: "dog", "car", …).
        goal: ``raise`` or ``lower``.
        model: hub id or folder of a YOLOS detector.
    """

    info = RewardInfo(
        name="object_detection",
        summary="YOLOS's confidence that an object is in the frame, maximised or minimised",
        range="0 to 1",
        paper="Fang et al. 2021, arXiv:2106.00666",
        weights={"model": YOLOS},
    )
    slice_size = 8

    def __init__(self, *, label: str, goal: Literal["raise", "lower"] = "raise", model: str = YOLOS.source):
        from transformers import YolosConfig, YolosForObjectDetection

        super().__init__()
        folder = locate(YOLOS.at(model))
        names = YolosConfig.from_pretrained(folder, local_files_only=True).id2label
        index_of = {name: int(index) for index, name in names.items()}
        if label not in index_of:
            raise ValueError(unknown_name(label, index_of, f"the detector {model} has"))
        self.network = load_strictly(YolosForObjectDetection, folder)
        self.index = index_of[label]
        self.goal = goal
        self.read_transform(folder)

    def read_transform(self, folder: Path) -> None:
        """Take sizes and normalisation from the folder; by default those of DETR, as in YOLOS's processor."""
        config = read_processor_config(folder, harmless=("do_pad", "do_convert_annotations"))
        size = config.get("size", {"shortest_edge": 800, "longest_edge": 1333})
        if isinstance(size, int):
            size = {"shortest_edge": size, "longest_edge": config.get("max_size", 1333)}
        self.interpolation = interpolation_of(config, "bilinear", folder)
        self.short, self.long = size["shortest_edge"], size.get("longest_edge")
        self.mean = tuple(config.get("image_mean", IMAGENET_MEAN))
        self.std = tuple(config.get("image_std", IMAGENET_STD))

    @property
    def higher_is_better(self) -> bool:
        return self.goal == "raise"

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        height, width = images.shape[-2:]
        size = detector_size(height, width, self.short, self.long)
        pixels = normalize(resize(images, *size, self.interpolation), self.mean, self.std)
        logits = self.network(pixel_values=pixels.to(self.dtype)).logits
        chosen = torch.full(logits.shape[:-1], self.index, device=logits.device)
        return log_odds(logits, chosen).amax(dim=-1)
