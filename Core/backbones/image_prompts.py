"""Prompts that may name a first frame: ``a cat wakes up {"reference_path": "cat.png"}``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Prompt, file_identity

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

    @property
    def identity(self) -> dict[str, str]:
        picture = {} if self.reference is None else {"picture": file_identity(self.reference)}
        return {**super().identity, **picture}


def parse_image_prompts(texts: Sequence[str]) -> list[ImagePrompt]:
    """Captions, each with its first frame where a JSON suffix names one.

    Raises:
        ValueError: a suffix that is no JSON object with the key ``reference_path`` alone.
    """
    return [_parse(text) for text in texts]


def _parse(text: str) -> ImagePrompt:
    start = text.find("{")
    if start < 0 or not text.rstrip().endswith("}"):
        return ImagePrompt(text)
    suffix = _json(text[start:])
    if suffix is None and KEY not in text:
        return ImagePrompt(text)  # braces of the caption's own
    if not isinstance(suffix, dict) or list(suffix) != [KEY] or not _is_name(suffix[KEY]):
        raise ValueError(
            f'the prompt {text!r} must end in {{"{KEY}": "picture"}} or have no such suffix; mend its JSON'
        )
    return ImagePrompt(text[:start].strip(), suffix[KEY])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def picture_errors(prompts: Sequence[ImagePrompt]) -> list[str]:
    """Sentences on pictures that cannot be opened, and on prompts of which only some have one."""
    named = [prompt.reference for prompt in prompts if prompt.reference is not None]
    errors = []
    if 0 < len(named) < len(prompts):
        errors.append(
            f"{KEY}: {len(named)} of {len(prompts)} prompts name a first frame; name one in all of them, or in none"
        )
    for source in dict.fromkeys(named):
        try:
            _open(source)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: an unknown home folder
            errors.append(f"{KEY}: {source!r} cannot be read as a picture: {error}; give a PNG or JPEG file")
    return errors


def refuse_pictures(prompts: Sequence[Prompt]) -> list[str]:
    """Sentences on prompts that name a first frame, for a family that takes none."""
    named = [prompt.text for prompt in prompts if f'"{KEY}"' in prompt.text]
    return [f"this model takes no first frame, which {named[0]!r} names; remove {KEY}"] if named else []


def _open(source: str) -> Any:
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
