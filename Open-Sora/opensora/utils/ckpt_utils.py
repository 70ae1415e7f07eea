"""Weights on disk: finding them, reading them without unpickling, and loading them strictly."""

import json
import os
from pathlib import Path
from pickle import UnpicklingError

import httpx
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch._subclasses import FakeTensor

WEIGHT_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
CONFIG_NAME = "config.json"
LISTED_KEYS = 5


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form of a hub id, ``organisation/name``."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")


def find_checkpoint(source: str | Path, local_files_only: bool = False) -> Path:
    """The local file or folder that ``source`` names; a hub id is downloaded unless the cache has all of it.

    Args:
        local_files_only: never ask the network.

    Raises:
        FileNotFoundError: neither on disk nor to be had from the hub.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_id(str(source)):
        raise FileNotFoundError(
            f"weights not found: {source!s} is no file or folder here; give an existing path or a hub id "
            "(organisation/name)"
        )
    patterns = [CONFIG_NAME, "*.safetensors", "*.safetensors.index.json"]
    for offline in (True,) if local_files_only else (True, False):
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=offline))
            if offline:  # the cache gives out what an interrupted download has left there, too
                weight_files(folder)
            return folder
        except (OSError, ValueError, httpx.HTTPError) as error:  # hub errors derive from these
            cause = error
    reason = next(iter(str(cause).splitlines()), type(cause).__name__)
    raise FileNotFoundError(
        f"weights not found: {source!s} is neither a folder here nor reachable on the Hugging Face hub ({reason}); "
        f"fetch it with `hf download {source!s}` on a connected machine, or give the path of a local copy"
    ) from None


def weight_files(path: Path) -> list[Path]:
    """What holds the weights of a file or folder: the shards that an index names, else the one file there is.

    Raises:
        FileNotFoundError: none, a shard missing, or several to choose from.
    """
    if path.is_file():
        return [path]
    for index in path.glob("*.safetensors.index.json"):
        shards = [path / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        if missing := [shard for shard in shards if not shard.is_file()]:
            raise FileNotFoundError(
                f"weights not found: {missing[0]} is named by its index but missing; fetch it again"
            )
        return shards
    named = [path / name for name in WEIGHT_NAMES if (path / name).is_file()]
    found = named[:1] or [file for file in path.glob("*.safetensors") if "-of-" not in file.name]
    found = found or [file for file in path.iterdir() if file.suffix in TORCH_SUFFIXES]
    if len(found) != 1:
        raise FileNotFoundError(
            f"no weights in {path}: expected {WEIGHT_NAMES[0]} or a single file, found "
            f"{f'{len(found)} candidates' if found else 'none'}"
        )
    return found


def read_config(source: str | Path) -> dict:
    """The ``config.json`` of a checkpoint folder or hub id; empty where there is none."""
    config = find_checkpoint(source) / CONFIG_NAME
    return _read_json(config) if config.is_file() else {}


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is no JSON or is damaged; fetch it again") from error


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, out of a wrapping "state_dict" or "model"; a pickle's code is not run.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and could run code ({type(error).__name__}); "
            "fetch it again, or give a .safetensors file"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds a {type(state).__name__} without tensors by name; give a file with a state dict"
        )
    return state


def load_pretrained(model: nn.Module, source: str | Path) -> nn.Module:
    """Load ``source`` into ``model``, which may lie on the meta device, and return it in eval mode.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: a file is damaged, or a key is missing, unexpected or of another shape; the message lists them.
    """
    own, state = model.state_dict(), {}
    if any(isinstance(tensor, FakeTensor) for tensor in own.values()):
        return model.to_empty(device="cpu").eval()  # under FakeTensorMode there are sizes and no values
    for file in weight_files(find_checkpoint(source)):
        state.update(read_file(file))
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in own.items()
            if key in state and state[key].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults.items() if keys)
        raise ValueError(f"the weights of {source!s} do not fit {type(model).__name__}: {listed}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def _some(keys: list[str]) -> str:
    more = f", … ({len(keys) - LISTED_KEYS} more)" if len(keys) > LISTED_KEYS else ""
    return ", ".join(keys[:LISTED_KEYS]) + more


def save_pretrained(model: nn.Module, config: dict, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` as on the hub, each under its name only when whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = (folder / f".{name}.partial" for name in (WEIGHT_NAMES[0], CONFIG_NAME))
    save_model(model, str(weights), {"format": "pt"})
    os.replace(weights, folder / WEIGHT_NAMES[0])
    settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(settings, folder / CONFIG_NAME)
