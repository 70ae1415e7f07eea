"""Reading weights: strict on what a model needs, and without ever running code from a file."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file
from torch import Tensor, nn

from Core.utils.damage import is_weight, loading, read_settings, reason_of, refuse_integers


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors``, ``.pt`` or ``.pth`` file on the CPU, without a wrapping "state_dict".

    Raises:
        ValueError: it is damaged or holds anything but tensors by name; a pickle is not executed.
    """
    try:
        if path.suffix == ".safetensors":
            # safetensors maps no file whose path is not UTF-8.
            state: Any = load_file(path) if _is_text(path) else load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(_refusal(path, reason_of(error))) from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(_refusal(path, f"a {type(state).__name__} without tensors by name"))
    refuse_integers(path, [k for k, v in state.items() if is_weight(k) and not v.is_floating_point()])
    return state


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a ``.safetensors`` file that ``load_state`` has read."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__", {})


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refusal(path: Path, reason: str) -> str:
    return (
        f"refused to load {path}: it is damaged or holds more than tensors ({reason}); "
        "use a file from its official source, or a .safetensors"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' table of unused weights and its progress bars; errors still show."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; code beside it is not run."""
    from transformers import AutoTokenizer

    with loading("the tokenizer", [folder]):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_strictly(model_class: Any, folder: Path | None, unused: str = "", **kwargs: Any) -> Any:
    """``model_class.from_pretrained(folder)`` in float32, refusing weights that do not fit the model exactly.

    Args:
        unused: pattern of keys that may be left over, beside the position indices old files hold.
        **kwargs: of ``from_pretrained``; with folder None they are ``config`` and ``state_dict``.

    Raises:
        ValueError: keys are missing, unexpected, or of another shape; the message names them.
    """
    with quiet_transformers(), loading(model_class.__name__, [folder or "the file"]):
        model, report = model_class.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, together with the rest
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            **kwargs,
        )
    leftover = re.compile(rf"(.*\.)?position_ids|{unused}")
    mismatch = describe_mismatch(
        report["missing_keys"],
        [key for key in report["unexpected_keys"] if not leftover.fullmatch(key)],
        {key: (found, own) for key, found, own in report["mismatched_keys"]},
    )
    if mismatch:
        raise ValueError(_misfit(folder, model_class, mismatch))
    return model


def fill_strictly(model: nn.Module, source: Path) -> nn.Module:
    """Fill a model from a weights file, or from the one file or the shards of a folder in the hub's layout.

    Raises:
        ValueError: keys are missing, unexpected, or of another shape; the message names them.
    """
    own, state = model.state_dict(), {}
    for file in [source] if source.is_file() else _weight_files(source):
        state.update(load_state(file))
    shapes = {key: (state[key].shape, own[key].shape) for key in own.keys() & state.keys()}
    mismatch = describe_mismatch(
        own.keys() - state.keys(),
        state.keys() - own.keys(),
        {key: (found, wanted) for key, (found, wanted) in shapes.items() if found != wanted},
    )
    if mismatch:
        raise ValueError(_misfit(source, type(model), mismatch))
    model.load_state_dict(state)
    return model


def tensor_shapes(source: Path) -> dict[str, list[int]]:
    """Shape of each tensor in a ``.safetensors`` file or in those of a folder, from their headers; unreadable ones add
    none."""
    shapes: dict[str, list[int]] = {}
    for file in [source] if source.is_file() else sorted(source.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as content:
                shapes |= {key: content.get_slice(key).get_shape() for key in content.keys()}
        except (SafetensorError, OSError):
            continue  # said when it is loaded
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    whole = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    for file in (file for file in whole if file.is_file()):
        return [file]
    index = min(folder.glob("*.index.json"))  # by name, so safetensors first
    shards = read_settings(index)["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def _misfit(source: Path | None, model_class: type, mismatch: str) -> str:
    return (
        f"the weights in {source or 'the file'} are not those of {model_class.__name__}: {mismatch}; "
        "give a model of that kind"
    )


def describe_mismatch(
    missing: Collection[str], unexpected: Collection[str], shapes: Mapping[str, tuple[Sequence, Sequence]]
) -> str:
    """What keeps weights from filling a model, in words; empty when they fit.

    Args:
        shapes: of the keys that differ in it, (shape found, the model's own).
    """
    reshaped = [f"{key} {tuple(found)} instead of {tuple(own)}" for key, (found, own) in shapes.items()]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return "; ".join(f"{len(keys)} {fault}: {_some(keys)}" for fault, keys in faults.items() if keys)


def _some(keys: Collection[str], limit: int = 5) -> str:
    more = f", … ({len(keys) - limit} more)" if len(keys) > limit else ""
    return ", ".join(sorted(keys)[:limit]) + more
