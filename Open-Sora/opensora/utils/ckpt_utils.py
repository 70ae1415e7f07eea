"""Weights on disk: finding them, reading them without unpickling, and loading them strictly."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import httpx
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHT_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
CONFIG_NAME = "config.json"
SHARD = re.compile(r"-\d+-of-\d+\.")


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
    for local_only in (True,) if local_files_only else (True, False):
        try:
            folder = Path(
                snapshot_download(str(source), allow_patterns=patterns, local_files_only=local_only)
            )
        except (OSError, ValueError, httpx.HTTPError) as error:  # hub errors derive from these
            cause = error
            continue
        # The cache gives out what an interrupted download has left there, too.
        if not local_only or _is_whole(folder):
            return folder
        cause = FileNotFoundError(folder)
    raise FileNotFoundError(
        f"weights not found: {source!s} is neither a folder here nor reachable on the Hugging Face hub "
        f"({type(cause).__name__}); fetch it with `hf download {source!s}` on a connected machine, or give "
        "the path of a local copy"
    ) from None


def _is_whole(folder: Path) -> bool:
    """Whether a downloaded folder has its weights: a single file, or an index and every shard it names."""
    for index in folder.glob("*.safetensors.index.json"):
        return all((folder / shard).is_file() for shard in _read_json(index)["weight_map"].values())
    return any(not SHARD.search(file.name) for file in folder.glob("*.safetensors"))


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form of a hub id, ``organisation/name``."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")


def read_config(source: str | Path) -> dict:
    """The ``config.json`` of a checkpoint folder or hub id; empty where there is none."""
    path = find_checkpoint(source)
    config = path / CONFIG_NAME
    if not config.is_file():
        return {}
    return _read_json(config)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is no JSON or is damaged; fetch it again") from error


def read_state(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: one file, or a folder with safetensors files or a single ``.pt``."""
    path = find_checkpoint(source)
    if path.is_file():
        return _read_file(path)
    for index in sorted(path.glob("*.safetensors.index.json")):
        shards = sorted(set(_read_json(index)["weight_map"].values()))
        return {key: tensor for shard in shards for key, tensor in _read_file(path / shard).items()}
    named = [path / name for name in WEIGHT_NAMES if (path / name).is_file()]
    others = sorted(path.glob("*.safetensors")) or sorted(
        file for file in path.iterdir() if file.suffix in TORCH_SUFFIXES
    )
    if named or len(others) == 1:
        return _read_file((named or others)[0])
    found = f"{len(others)} candidates" if others else "none"
    raise FileNotFoundError(
        f"no weights in {path}: expected {WEIGHT_NAMES[0]} or a single file, found {found}"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"weights not found: {path} is named by its index but missing; fetch it again"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, which is not read since it could run code; give a .safetensors "
            "file or a plain state dict"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no weight file or is damaged; fetch it again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            return state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; give a file with a state dict")
    return state


def load_pretrained(model: nn.Module, source: str | Path) -> nn.Module:
    """Load ``source`` into ``model``, which may lie on the meta device, and return it in eval mode.

    Raises:
        ValueError: a key is missing, unexpected or of another shape; the message lists them.
    """
    load_strict(model, read_state(source), str(source))
    return model.eval()


def load_strict(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """``load_state_dict`` that names every key that does not fit; tensors become the model's own."""
    mismatch = describe_mismatch(model.state_dict(), state)
    if mismatch:
        raise ValueError(f"the weights of {source} do not fit {type(model).__name__}: {mismatch}")
    model.load_state_dict(state, assign=True)


def describe_mismatch(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps ``state`` from filling ``own``, in words; empty when it fits."""
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in sorted(own.keys() & state.keys())
            if state[key].shape != own[key].shape
        ],
    }
    return "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults.items() if keys)


def _some(keys: list[str], limit: int = 5) -> str:
    more = f", … ({len(keys) - limit} more)" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def save_pretrained(model: nn.Module, config: dict, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` as on the hub, each under its name only when whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    partial = folder / f".{WEIGHT_NAMES[0]}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHT_NAMES[0])
    partial = folder / f".{CONFIG_NAME}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG_NAME)
