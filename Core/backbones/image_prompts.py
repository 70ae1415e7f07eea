"""Prompts that may name a first frame: ``a cat wakes up {"reference_path": "cat.png"}``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .base import Prompt

KEY = "reference_path"


@dataclass(frozen=True)
class ImagePrompt(Prompt):
    """A caption and the picture that its video begins with."""

    reference: str | None = None

    @property
    def written(self) -> str:
        if self.reference is None:
            return self.text
        return f"{self.text} {json.dumps({KEY: self.reference}, ensure_ascii=False)}"


def parse_image_prompts(texts: Sequence[str]) -> list[ImagePrompt]:
    """Captions, each with its first frame where a JSON suffix names one.

    Raises:
        ValueError: a suffix that is no JSON object with the key ``reference_path`` alone.
    """
    return [_parse(text) for text in texts]


def _parse(text: str) -> ImagePrompt:
    start = text.find(f'{{"{KEY}"')
    if start < 0:
        return ImagePrompt(text)
    try:
        suffix = json.loads(text[start:])
    except ValueError:
        suffix = None
    if not isinstance(suffix, dict) or list(suffix) != [KEY] or not isinstance(suffix[KEY], str):
        raise ValueError(
            f'the prompt {text!r} must end in {{"{KEY}": "picture"}} or have no such suffix; mend its JSON'
        )
    return ImagePrompt(text[:start].strip(), suffix[KEY])


def picture_errors(prompts: Sequence[ImagePrompt]) -> list[str]:
    """A sentence for each picture that does not exist or cannot be opened."""
    errors = []
    for source in dict.fromkeys(prompt.reference for prompt in prompts if prompt.reference):
        try:
            _open(source)
        except (OSError, ValueError) as error:
            errors.append(f"{KEY}: {source!r} cannot be read as a picture: {error}; give a PNG or JPEG file")
    return errors


def _open(source: str):
    from PIL import Image

    with Image.open(Path(source).expanduser()) as picture:
        return picture.convert("RGB")


def first_frame(source: str, size: tuple[int, int]) -> Tensor:
    """A picture [3, H, W] in [-1, 1], squashed to ``size`` as the pipelines of diffusers do.

    Raises:
        OSError: missing, or no picture.
    """
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=1).preprocess(_open(source), *size)[0].to(torch.float32)
