"""Prompt embeddings: each caption is encoded once, kept on disk, and the encoder is freed.

Axes: L text tokens, D text width.
"""

import gc
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from Core.backbones import Backbone


def embed_captions(backbone: Backbone, captions: Iterable[str], cache: str | Path) -> dict[str, Tensor]:
    """Features [L, D] of each caption, on the CPU; the text encoder is loaded only for those not in ``cache``."""
    captions = list(dict.fromkeys(captions))
    files = {caption: _cache_file(cache, backbone.text_identity, caption) for caption in captions}
    found = {caption: _read(file) for caption, file in files.items()}
    missing = [caption for caption in captions if found[caption] is None]
    if missing:
        for caption, features in zip(missing, _encode(backbone, missing), strict=True):
            found[caption] = features
            _write(files[caption], features)
    return found


def _encode(backbone: Backbone, captions: list[str]) -> list[Tensor]:
    encoder = backbone.text_encoder()
    features = encoder.encode(captions)
    del encoder
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return features


def _cache_file(cache: str | Path, identity: str, caption: str) -> Path:
    digest = hashlib.sha256(f"{identity}\0{caption}".encode()).hexdigest()
    return Path(cache).expanduser() / digest[:2] / f"{digest}.safetensors"


def _read(file: Path) -> Tensor | None:
    """None where the file is missing or damaged: it is written anew then."""
    try:
        return load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write(file: Path, features: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    save_file({"features": features.contiguous()}, partial)
    os.replace(partial, file)
