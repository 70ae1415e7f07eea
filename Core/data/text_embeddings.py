"""Prompt embeddings: each caption is encoded once, kept on disk, and the encoder is freed."""

import gc
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from Core.backbones import Backbone, EncodedPrompt, Features, Prompt
from Core.utils.files import replacing
from Core.utils.terminal import progress_bar

logger = logging.getLogger("vader")
ENCODE_BATCH = 8
HELD_BYTES = 4 << 30  # of features; more are read from the cache when they are used
SHOWN_CAPTIONS = 64  # fewer are encoded before a progress bar tells anything
DIGEST = "sha256"


class FeatureStore:
    """Features by caption: in memory up to ``limit`` bytes, beyond that in the cache's files."""

    def __init__(self, limit: int):
        self.room = limit
        self.held: dict[str, Features] = {}
        self.files: dict[str, Path] = {}

    def add(self, caption: str, features: Features, file: Path | None) -> None:
        """Keep the features of a caption; ``file`` holds them too, or None does."""
        size = sum(tensor.nbytes for tensor in features.values())
        if file is None or size <= self.room:
            self.held[caption] = features
            self.room -= size
        else:
            self.files[caption] = file

    def __getitem__(self, caption: str) -> Features:
        """ValueError where a file has been removed or damaged since."""
        if caption in self.held:
            return self.held[caption]
        if (features := _read(self.files[caption])) is None:
            raise ValueError(
                f"text_cache: {self.files[caption]} was removed or damaged while it was in use; repeat the command, "
                "which makes it again"
            )
        return features


class EncodedPrompts(Sequence[EncodedPrompt]):
    """Prompts with their features, which are read when asked for where memory does not hold all."""

    def __init__(self, prompts: Sequence[Prompt], captions: Mapping[str, str], store: FeatureStore):
        self.prompts, self.captions, self.store = prompts, captions, store

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> EncodedPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> "EncodedPrompts": ...
    def __getitem__(self, index: int | slice) -> "EncodedPrompt | EncodedPrompts":
        if isinstance(index, slice):
            return EncodedPrompts(self.prompts[index], self.captions, self.store)
        prompt = self.prompts[index]
        return EncodedPrompt(prompt, tuple(self.store[self.captions[text]] for text in prompt.texts))


def encode_prompts(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    cache: str | Path,
    used: Sequence[Prompt] | None = None,
    show_progress: bool = False,
) -> EncodedPrompts:
    """The prompts with their features; the text encoder is loaded only for captions that are not in ``cache``.

    Each batch is written as soon as it is encoded, so that a run that is killed meanwhile continues from there. A
    cache that cannot be written costs a warning, and the encoding anew next time.

    Args:
        used: those whose features will be asked for; by default all.
    """
    captions = {text: backbone.caption(text) for prompt in used or prompts for text in prompt.texts}
    store = _embed(backbone, _needed(backbone, captions.values()), cache, show_progress)
    if backbone.negative_caption is not None:
        backbone.negative = store[backbone.negative_caption]
    return EncodedPrompts(prompts, captions, store)


def _embed(
    backbone: Backbone, captions: Iterable[str], cache: str | Path, show_progress: bool
) -> FeatureStore:
    identity = backbone.text_identity
    files = {caption: _cache_file(cache, identity, caption) for caption in captions}
    store, missing, failure = FeatureStore(HELD_BYTES), [], None
    for caption, file in files.items():
        if (features := _read(file)) is None:
            missing.append(caption)
        else:
            store.add(caption, features, file)
    if damaged := [file for caption in missing if (file := files[caption]).exists()]:
        logger.warning(
            "text_cache: %d entries are damaged or of an earlier version, and are made again, such as %s",
            len(damaged),
            damaged[0],
        )
    for caption, features in _encode(backbone, missing, show_progress):
        error = _write(files[caption], features)
        failure = failure or error
        store.add(caption, features, None if error else files[caption])
    if failure:
        logger.warning(
            "text_cache: captions could not be kept in %s, and are encoded anew next time: %s", cache, failure
        )
    return store


def _needed(backbone: Backbone, captions: Iterable[str]) -> list[str]:
    """The captions, and the one that guidance leads away from."""
    return [*captions, *([] if backbone.negative_caption is None else [backbone.negative_caption])]


def all_cached(backbone: Backbone, prompts: Sequence[Prompt], cache: str | Path) -> bool:
    """Whether the prompts can be encoded without the text encoder."""
    identity = backbone.text_identity
    captions = _needed(backbone, {backbone.caption(text) for prompt in prompts for text in prompt.texts})
    return all(_read(_cache_file(cache, identity, caption)) is not None for caption in captions)


def _encode(
    backbone: Backbone, captions: Sequence[str], show_progress: bool
) -> Iterator[tuple[str, Features]]:
    """Each caption with its features; the encoder is there only while there are captions."""
    if not captions:
        return
    with backbone.loading("the text encoder", backbone.text_weights):
        encoder = backbone.text_encoder()
    with progress_bar(hidden=not show_progress or len(captions) < SHOWN_CAPTIONS) as bar:
        task = bar.add_task("encoding captions", total=len(captions))
        for start in range(0, len(captions), ENCODE_BATCH):
            batch = captions[start : start + ENCODE_BATCH]
            yield from zip(batch, encoder.encode(batch), strict=True)
            bar.advance(task, len(batch))
    del encoder
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cache_file(cache: str | Path, identity: str, caption: str) -> Path:
    digest = hashlib.sha256(f"{identity}\0{caption}".encode()).hexdigest()
    return Path(cache).expanduser() / digest[:2] / f"{digest}.safetensors"


def _write(file: Path, features: Features) -> Exception | None:
    """Keep features with a hash of them; what went wrong if that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.contiguous() for name, tensor in features.items()}
        with replacing(file) as partial:
            save_file(whole, partial, {DIGEST: _digest(whole)})
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        return error
    return None


def _read(file: Path) -> Features | None:
    """None where the file is missing, or its content is not what was written: it is made again then."""
    try:
        with safe_open(file, "pt") as content:
            features = {name: content.get_tensor(name) for name in content.keys()}
            stated = (content.metadata() or {}).get(DIGEST)
    except (OSError, SafetensorError):
        return None
    return features if stated == _digest(features) else None


def _digest(features: Features) -> str:
    """Hash of names, dtypes, shapes and content."""
    digest = hashlib.sha256()
    for name in sorted(features):
        tensor = features[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
