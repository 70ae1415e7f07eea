"""Prompt embeddings: each caption is encoded once, kept on disk, and the encoder is freed."""

import gc
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from Core.backbones import Backbone, EncodedPrompt, Features, Prompt
from Core.utils.files import replacing

logger = logging.getLogger("vader")
ENCODE_BATCH = 8


def encode_prompts(backbone: Backbone, prompts: Sequence[Prompt], cache: str | Path) -> list[EncodedPrompt]:
    """The prompts with their features; the text encoder is loaded only for captions that are not in ``cache``.

    Each batch is written as soon as it is encoded, so that a run that is killed meanwhile continues from there. A
    cache that cannot be written costs a warning, and the encoding anew next time.
    """
    captions = {text: backbone.caption(text) for prompt in prompts for text in prompt.texts}
    features = _embed(backbone, captions.values(), cache)
    return [
        EncodedPrompt(prompt, tuple(features[captions[text]] for text in prompt.texts)) for prompt in prompts
    ]


def _embed(backbone: Backbone, captions: Iterable[str], cache: str | Path) -> dict[str, Features]:
    identity = backbone.text_identity
    files = {caption: _cache_file(cache, identity, caption) for caption in captions}
    found = {caption: features for caption, file in files.items() if (features := _read(file))}
    missing = [caption for caption in files if caption not in found]
    failure = None
    for caption, features in _encode(backbone, missing):
        found[caption] = features
        try:
            files[caption].parent.mkdir(parents=True, exist_ok=True)
            with replacing(files[caption]) as partial:
                save_file({name: tensor.contiguous() for name, tensor in features.items()}, partial)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
            failure = error
    if failure:
        logger.warning(
            "text_cache: captions could not be kept in %s, and are encoded anew next time: %s", cache, failure
        )
    return found


def all_cached(backbone: Backbone, prompts: Sequence[Prompt], cache: str | Path) -> bool:
    """Whether the prompts can be encoded without the text encoder."""
    identity = backbone.text_identity
    captions = {backbone.caption(text) for prompt in prompts for text in prompt.texts}
    return all(_is_whole(_cache_file(cache, identity, caption)) for caption in captions)


def _encode(backbone: Backbone, captions: Sequence[str]) -> Iterator[tuple[str, Features]]:
    """Each caption with its features; the encoder is there only while there are captions."""
    if not captions:
        return
    with backbone.loading("the text encoder", backbone.text_weights):
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


def _read(file: Path) -> Features | None:
    """None where the file is missing or damaged: it is written anew then."""
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return None


def _is_whole(file: Path) -> bool:
    """What ``_read`` would find, from the header and the size alone."""
    try:
        with safe_open(file, "pt") as content:
            return bool(list(content.keys()))
    except (OSError, SafetensorError):
        return False
