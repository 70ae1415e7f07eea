"""Small read-outs of CLIP image features, stored as a chain of linear layers."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from Core.rewards.base import ImageReward
from Core.rewards.clip import ImageTower
from Core.utils.hub import Weight
from Core.utils.state_dict import load_state

VADER_PAPER = "Prabhudesai et al. 2024, arXiv:2407.08737"
VADER_ASSETS = "https://github.com/mihirp1998/VADER/raw/adaf2ef74763bd84dafaafe1eed98e209fae1843/assets"


def vader_head(file: str, size: int, sha256: str) -> Weight:
    """One of the heads that come with the paper's reference implementation."""
    source = f"{VADER_ASSETS}/{file}"
    return Weight(source=source, kind="file", file=file, size=size, sha256=sha256, licence="not stated")


class ClipHead(ImageReward):
    """Scores an image by ``head`` (→ [N, 1]) on the unit CLIP feature that ``image`` gives; a subclass sets both."""

    image: ImageTower
    head: nn.Module
    full_precision = ("head",)

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.image(images)).squeeze(-1)


def linear_layers(state: Mapping[str, Tensor], origin: str) -> list[nn.Linear]:
    """The linear layers of a head stored as ``layers.<i>.weight`` and ``.bias``, in order, of whatever widths.

    Args:
        origin: how error messages call the file.

    Raises:
        ValueError: the layers do not form a chain to one output.
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


def load_head_layers(path: Path, image: ImageTower, name: str = "layers") -> list[nn.Linear]:
    """Layers of the head file at ``path``, checked against the features that ``image`` gives.

    Args:
        name: of the chain of layers in the file.
    """
    state = {re.sub(rf"^{name}\.", "layers.", key): value for key, value in load_state(path).items()}
    layers = linear_layers(state, path.name)
    if layers[0].in_features != image.width:
        raise ValueError(
            f"{path.name} takes {layers[0].in_features} features but the CLIP model gives {image.width}; "
            "use the head that belongs to this CLIP model"
        )
    return layers
