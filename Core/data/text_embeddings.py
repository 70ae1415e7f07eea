"""Prompt embeddings: each caption is encoded once, kept on disk, and the encoder is freed.

Axes: L text tokens, D text width.
"""

import gc
import hashlib
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from Core.backbones import Backbone

logger = logging.getLogger("vader")
ENCODE_BATCH = 8


def embed_captions(backbone: Backbone, captions: Iterable[str], cache: str | Path) -> dict[str, Tensor]:
    """Features [L, D] of each caption, on the CPU; the text encoder is loaded only for those not in ``cache``.

    Each batch is written as soon as it is encoded, so that a run that is killed meanwhile continues from there. A
    cache that cannot be written costs a warning, and the encoding anew next time.
    """
    captions = list(dict.fromkeys(captions))
    identity = backbone.text_identity
    files = {caption: _cache_file(cache, identity, caption) for caption in captions}
    found = {caption: _read(file) for caption, file in files.items()}
    missing = [caption for caption in captions if found[caption] is None]
    failure = None
    for caption, features in _encode(backbone, missing):
        found[caption] = features
        try:
            _write(files[caption], features)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
            failure = error
    if failure:
        logger.warning(
            "text_cache: captions could not be kept in %s, and are encoded anew next time: %s", cache, failure
        )
    return found


def uncached(backbone: Backbone, captions: Iterable[str], cache: str | Path) -> list[str]:
    """Captions that the encoder is needed for."""
    identity = backbone.text_identity
    return [caption for caption in captions if not _is_whole(_cache_file(cache, identity, caption))]


def _encode(backbone: Backbone, captions: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Each caption with its features; the encoder is there only while there are captions."""
    if not captions:
        return
    encoder = backbone.text_encoder()
    for start in range(0, len(captions), ENCODE_BATCH):
        batch = captions[start : start + ENCODE_BATCH]
        yield from zip(batch, encoder.encode(batch), strict=True)
    del encoder
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cache_file(cache: str | Path, identity: str, caption: str) -> Path:
    digest = hashlib.sha256(f"{identity}\0{caption}".encode()).hexdigest()
    return Path(cache).expanduser() / digest[:2] / f"{digest}.safetensors"


def _read(file: Path) -> Tensor | None:
    """None where the file is missing or damaged: it is written anew then."""
    try:
        return load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None


def _is_whole(file: Path) -> bool:
    """What ``_read`` would find, from the header and the size alone."""
    try:
        with safe_open(file, "pt") as content:
            return "features" in content.keys()  # noqa: SIM118 (no container)
    except (OSError, SafetensorError):
        return False


def _write(file: Path, features: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share the cache may write the same caption at once.
    partial = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        save_file({"features": features.contiguous()}, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
