"""Reading `tests/golden/`, see its README."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

FOLDER = Path(__file__).parent / "golden"


def tensors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its metadata."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def shapes(name: str) -> dict:
    """A manifest: key → shape."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def weights(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("state."): value for key, value in data.items() if key.startswith("state.")}


def case(data: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Inputs and outputs of one case."""
    return {key.split(".", 1)[1]: value for key, value in data.items() if key.startswith(name + ".")}


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def golden_stdit(data: dict[str, Tensor], metadata: dict[str, str]) -> STDiT3:
    """The release's tiny STDiT3, in eval mode."""
    model = STDiT3(STDiT3Config(**json.loads(metadata["config"]))).eval()
    model.load_state_dict(weights(data))
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
