"""LAION aesthetic predictor V2: a linear read-out of CLIP image features, rated 1 to 10 by people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from Core.rewards.base import ImageReward, RewardInfo
from Core.rewards.clip import CLIP_L14, load_image_tower
from Core.rewards.loading import load_state
from Core.rewards.preprocess import Fit
from Core.rewards.weights import Weight, locate

LAION_HEAD = Weight(
    source="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    kind="file",
    file="sac+logos+ava1-l14-linearMSE.pth",
    size=3_714_759,
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    licence="Apache-2.0",
)


def linear_layers(state: Mapping[str, Tensor], origin: str) -> list[nn.Linear]:
    """The linear layers of a head stored as `layers.<i>.weight` and `.bias`, in order, of whatever widths.

    origin: how error messages call the file. Raises ValueError if the layers do not form a chain to one
    output.
    """
    indices = sorted(int(m[1]) for key in state if (m := re.fullmatch(r"layers\.(\d+)\.weight", key)))
    expected = {f"layers.{i}.{part}" for i in indices for part in ("weight", "bias")}
    shapes = [tuple(state[f"layers.{i}.weight"].shape) for i in indices]
    chained = all(after[1] == before[0] for before, after in zip(shapes, shapes[1:], strict=False))
    if not indices or set(state) != expected or not chained or shapes[-1][0] != 1:
        raise ValueError(
            f"{origin} is no head: expected a chain of layers.<i>.weight and .bias ending in one output, "
            f"got {', '.join(f'{key} {list(value.shape)}' for key, value in list(state.items())[:4])}"
        )
    layers = []
    for i in indices:
        layer = nn.Linear(state[f"layers.{i}.weight"].shape[1], state[f"layers.{i}.weight"].shape[0])
        layer.load_state_dict({part: state[f"layers.{i}.{part}"].float() for part in ("weight", "bias")})
        layers.append(layer)
    return layers


def load_head_layers(path: Path, image: nn.Module) -> list[nn.Linear]:
    """Layers of the head file at `path`, checked against the features that `image` gives."""
    layers = linear_layers(load_state(path), path.name)
    width = image.projection.weight.shape[0]
    if layers[0].in_features != width:
        raise ValueError(
            f"{path.name} takes {layers[0].in_features} features but the CLIP model gives {width}; "
            "use the head that belongs to this CLIP model"
        )
    return layers


class Aesthetic(ImageReward):
    """LAION head on the unit CLIP feature; loss 0.1 · |score − 10|.

    model: CLIP folder or hub id. head: file in the LAION layout (`layers.0.weight`, …) for that CLIP's width.
    resize: how an image that is not square is fitted; by default as the CLIP folder says. target: score
    aimed at.
    """

    info = RewardInfo(
        name="aesthetic",
        summary="how people rate the look of a picture",
        range="1 to 10",
        paper="Schuhmann 2022, LAION-Aesthetics V2",
        weights={"model": CLIP_L14, "head": LAION_HEAD},
    )
    full_precision = ("head",)

    def __init__(
        self,
        *,
        model: str = CLIP_L14.source,
        head: str = LAION_HEAD.source,
        resize: Fit | None = None,
        target: float = 10.0,
    ):
        super().__init__()
        self.image = load_image_tower(locate(CLIP_L14.at(model)), resize)
        self.head = nn.Sequential(*load_head_layers(locate(LAION_HEAD.at(head)), self.image))
        self.target = target

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.image(images)).squeeze(-1)

    def loss(self, score: Tensor) -> Tensor:
        return 0.1 * (score - self.target).abs()
