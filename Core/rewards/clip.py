"""CLIP towers shared by the scorers: loading, image features, cached text features.

Axes: N images or texts, L tokens, D features.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Core.rewards.preprocess import Fit, ImageTransform, transform_from_folder
from Core.rewards.tokens import Tokens
from Core.utils.hub import Weight
from Core.utils.state_dict import load_strictly, load_tokenizer

CLIP_L14 = Weight(
    source="openai/clip-vit-large-patch14",
    parts=("tokenizer", "processor"),
    size=1_710_000_000,
    licence="MIT",
)
TEXT_HALF = r"text_model\..*|text_projection\.weight|logit_scale"
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

    @property
    def width(self) -> int:
        """Number of features, D."""
        projected = not isinstance(self.projection, nn.Identity)
        return len(self.projection.weight) if projected else self.model.config.hidden_size

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] → unit features [N, D], float32 or better."""
        weight = self.model.embeddings.patch_embedding.weight
        pixels = self.transform(images).to(weight.dtype)
        return unit(self.projection(self.model(pixel_values=pixels).pooler_output))


class CachedText(nn.Module):
    """Text features, computed once per text and kept; a subclass says how in ``encode``."""

    def __init__(self):
        super().__init__()
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
        # One by one: a batch's rounding depends on what is in it, and a text must score the same in every run.
        self._cache.update((text, self.encode([text])[0]) for text in unseen)
        return torch.stack([self._cache[text] for text in texts])

    @abstractmethod
    def encode(self, texts: list[str]) -> Tensor:
        """``forward`` without the cache."""


class TextTower(CachedText):
    """Tokenizer, text transformer and projection.

    Args:
        padding: "longest" for causal text models, whose pooled token never sees the padding; "max_length" for
            those trained on padded text.
        clean: what is done to a text before the tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: nn.Module,
        tokenizer: Any,
        padding: str = "longest",
        clean: Callable[[str], str] = str,
    ):
        super().__init__()
        self.clean = clean
        self.model = model
        self.projection = projection
        # The table of positions tells what a model reads; a tokenizer's own limit is that of plain CLIP even where
        # the model reads more (Long-CLIP).
        self.tokens = Tokens(tokenizer, model.config.max_position_embeddings, padding)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        tokens = self.tokens([self.clean(text) for text in texts])
        ids = tokens.input_ids.to(self.model.embeddings.token_embedding.weight.device)
        return unit(self.projection(self.model(input_ids=ids).pooler_output))


def clip_transform(folder: Path, image_size: int, resize: Fit | None) -> ImageTransform:
    """Transform of a CLIP folder, with another ``fit`` if ``resize`` asks for one."""
    default = ImageTransform(height=image_size, width=image_size)
    return transform_from_folder(folder, image_size, default).with_fit(resize)


def load_image_tower(folder: Path, resize: Fit | None = None, **changes: Any) -> ImageTower:
    """Vision half of a CLIP folder in the transformers layout.

    Args:
        **changes: of the folder's ``ImageTransform``, where a head was trained on another.
    """
    from transformers import CLIPVisionModelWithProjection

    model = load_strictly(CLIPVisionModelWithProjection, folder, unused=TEXT_HALF)
    transform = replace(clip_transform(folder, model.config.image_size, resize), **changes)
    return ImageTower(model.vision_model, model.visual_projection, transform)


def load_clip(folder: Path, resize: Fit | None = None) -> tuple[ImageTower, TextTower, float]:
    """Both halves of a CLIP folder in the transformers layout, and exp(logit_scale)."""
    from transformers import CLIPModel

    model = load_strictly(CLIPModel, folder)
    tokenizer = load_tokenizer(folder)
    transform = clip_transform(folder, model.config.vision_config.image_size, resize)
    image = ImageTower(model.vision_model, model.visual_projection, transform)
    return (
        image,
        TextTower(model.text_model, model.text_projection, tokenizer),
        model.logit_scale.exp().item(),
    )
