"""CLIP towers shared by the scorers: loading, image features, cached text features.

Axes: N images or texts, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Core.rewards.preprocess import Fit, ImageTransform, transform_from_folder
from Core.rewards.weights import Weight

CLIP_L14 = Weight(source="openai/clip-vit-large-patch14", size=1_710_000_000, licence="MIT")
TEXT_CACHE_LIMIT = 8192  # texts; a float32 feature of ViT-H takes 4 kB


def unit(features: Tensor) -> Tensor:
    """Scale [N, D] to length 1, in float32 or better."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


class ImageTower(nn.Module):
    """Preprocessing, vision transformer and projection."""

    def __init__(self, model: nn.Module, projection: nn.Module, transform: ImageTransform):
        super().__init__()
        self.model = model
        self.projection = projection
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → unit features [N, D], float32 or better."""
        weight = self.model.get_input_embeddings().weight
        pixels = self.transform(images).to(weight.dtype)
        return unit(self.projection(self.model(pixel_values=pixels).pooler_output))


class TextTower(nn.Module):
    """Tokenizer, text transformer and projection; features are computed once per text and kept.

    padding: "longest" for causal text models, whose pooled token never sees the padding; "max_length" for
    those trained on padded text.
    """

    def __init__(self, model: nn.Module, projection: nn.Module, tokenizer: Any, padding: str = "longest"):
        super().__init__()
        self.model = model
        self.projection = projection
        self.tokenizer = tokenizer
        self.padding = padding
        self.max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        self._cache: dict[str, Tensor] = {}

    def _apply(self, fn, recurse=True):
        self._cache.clear()  # its features are of the old device and type
        return super()._apply(fn, recurse)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """N texts → unit features [N, D], float32 or better, without gradient."""
        unseen = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if len(self._cache) + len(unseen) > TEXT_CACHE_LIMIT:
            self._cache.clear()
            unseen = list(dict.fromkeys(texts))
        if unseen:
            self._cache.update(zip(unseen, self.encode(unseen), strict=True))
        return torch.stack([self._cache[text] for text in texts])

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """`forward` without the cache."""
        tokens = self.tokenizer(
            texts, padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.model.get_input_embeddings().weight.device)
        return unit(self.projection(self.model(input_ids=ids).pooler_output))


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


def load_strictly(model_class: Any, folder: Path, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(folder)`, refusing weights that leave any parameter uninitialised."""
    with quiet_transformers():
        model, report = model_class.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, dtype=torch.float32, **kwargs
        )
    missing = sorted(report["missing_keys"]) + sorted(str(item) for item in report["mismatched_keys"])
    if missing:
        raise ValueError(
            f"the weights in {folder} do not fit {model_class.__name__}: {len(missing)} tensors are missing "
            f"or of another shape, first {', '.join(missing[:3])}; give a folder of that architecture"
        )
    return model


def clip_transform(folder: Path, image_size: int, resize: Fit) -> ImageTransform:
    """Transform of a CLIP folder; for a `resize` other than `crop`, the official one fitted that way."""
    official = transform_from_folder(folder, image_size, ImageTransform(height=image_size, width=image_size))
    if resize == "crop":
        return official
    return ImageTransform(
        height=official.height,
        width=official.width,
        fit=resize,
        interpolation=official.interpolation,
        mean=official.mean,
        std=official.std,
    )


def load_image_tower(folder: Path, resize: Fit = "crop") -> ImageTower:
    """Vision half of a CLIP folder in the transformers layout."""
    from transformers import CLIPVisionModelWithProjection

    model = load_strictly(CLIPVisionModelWithProjection, folder)
    transform = clip_transform(folder, model.config.image_size, resize)
    return ImageTower(model.vision_model, model.visual_projection, transform)


def load_clip(folder: Path, resize: Fit = "crop") -> tuple[ImageTower, TextTower, float]:
    """Both halves of a CLIP folder in the transformers layout, and exp(logit_scale)."""
    from transformers import AutoTokenizer, CLIPModel

    model = load_strictly(CLIPModel, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    transform = clip_transform(folder, model.config.vision_config.image_size, resize)
    image = ImageTower(model.vision_model, model.visual_projection, transform)
    return (
        image,
        TextTower(model.text_model, model.text_projection, tokenizer),
        model.logit_scale.exp().item(),
    )
