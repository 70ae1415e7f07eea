"""Damaged model files, named in a sentence before a library stumbles over them."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open

from Core.utils.errors import memory_errors
from Core.utils.files import read_object

# Of a model folder in the hub's layout; other JSON files may hold anything.
OBJECTS = ("config.json", "*_config.json", "*.index.json", "tokenizer.json", "vocab.json")
REASON_LIMIT = 200
REMEDY = "fetch it again"


def refuse_damaged(place: Path) -> None:
    """Look at the settings and the headers in a model folder, or at one file; weights are not read.

    Raises:
        ValueError: one is damaged; the message names it.
    """
    if place.is_dir():
        for pattern in OBJECTS:
            for path in place.glob(pattern):
                content = read_settings(path)
                if path.name.endswith(".index.json"):
                    _refuse_index(path, content)
        for path in place.glob("*.safetensors"):
            refuse_weights(path)
    elif place.suffix == ".safetensors":
        refuse_weights(place)


def refuse_weights(path: Path) -> None:
    """Raise ValueError where a ``.safetensors`` file cannot be read, or weights in it are no floating-point numbers."""
    try:
        with safe_open(path, "pt") as content:
            kinds = {key: content.get_slice(key).get_dtype() for key in content.keys() if is_weight(key)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({reason_of(error)}); {REMEDY}") from error
    refuse_integers(path, [key for key, kind in kinds.items() if kind.startswith(("I", "U", "BOOL"))])


def is_weight(key: str) -> bool:
    return key.endswith((".weight", ".bias"))


def refuse_integers(path: Path, keys: list[str]) -> None:
    if keys:
        raise ValueError(
            f"{path} holds whole numbers where weights belong ({keys[0]}, {len(keys)} in all): it is damaged or "
            "quantised; give the weights as floating-point numbers"
        )


def _refuse_index(path: Path, content: dict) -> None:
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path} must have a weight_map of file names; {REMEDY}")
    if outside := [name for name in shards.values() if Path(name).name != name]:
        raise ValueError(f"{path} names the file {outside[0]!r}, which is not beside it; {REMEDY}")


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model or an adapter.

    Raises:
        ValueError: it cannot be read, is damaged, or holds something else; the message names it.
    """
    try:
        return read_object(path)
    except (OSError, ValueError) as error:  # a folder; no JSON, no UTF-8, or another kind of JSON
        raise ValueError(f"{path} is no JSON object or is damaged ({reason_of(error)}); {REMEDY}") from error


@contextmanager
def loading(what: str, places: Iterable[Path | str]) -> Iterator[None]:
    """What a library raises in the block becomes a sentence that names ``what`` and where it is loaded from.

    Our own sentences and missing files pass, and so does a memory that is too small.

    Raises:
        ValueError: instead of anything else.
    """
    named = [str(place) for place in places]
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # libraries raise anything on a damaged file
        if isinstance(error, memory_errors()):
            raise
        text = str(error)
        if isinstance(error, ValueError) and text and "\n" not in text and "weights_only" not in text:
            raise
        raise ValueError(
            f"{what} cannot be loaded from {', '.join(named)}: {reason_of(error)}; if a file there is damaged, {REMEDY}"
        ) from error


def reason_of(error: Exception) -> str:
    """The first line of what an error says, with its kind where it says nothing of use."""
    text = str(error).strip()
    if "weights_only" in text:
        return "it holds more than tensors, which could run code"
    if isinstance(error, json.JSONDecodeError):
        return "it is no JSON"
    line = shorten(text.splitlines()[0], REASON_LIMIT, placeholder=" …") if text else "no reason given"
    return f"{type(error).__name__}: {line}"
