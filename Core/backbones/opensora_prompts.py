"""Open-Sora's prompt grammar: JSON suffixes, ``|0|…|1|…`` segments and score suffixes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from opensora.utils.inference_utils import extract_json_from_prompts, merge_prompt, split_prompt

from .base import Prompt

# What `append_score_to_prompts` adds for the denoiser; a reward must not read it.
SCORE_SUFFIX = re.compile(r"\s*(aesthetic score|motion score|camera motion):[^.]*(\.\d+)?\.", re.IGNORECASE)


@dataclass(frozen=True)
class OpenSoraPrompt(Prompt):
    """A prompt with segments, references and a mask strategy; ``text`` is its first segment.

    Attributes:
        segments: (first clip it holds for, text); a plain prompt has one, from clip 0.
        reference: paths to condition on, separated by ``;``; empty for none.
        mask_strategy: which of their frames go where; empty for none.
    """

    segments: tuple[tuple[int, str], ...] = ()
    reference: str = ""
    mask_strategy: str = ""

    @property
    def reward_text(self) -> str:
        return SCORE_SUFFIX.sub("", self.text).strip()

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.segments)

    def text_number(self, clip: int) -> int:
        return max(0, sum(start <= clip for start, _ in self.segments) - 1)

    @property
    def written(self) -> str:
        starts, texts = zip(*self.segments, strict=True)
        return merge_prompt(texts, starts if len(texts) > 1 else None)

    @property
    def identity(self) -> dict[str, str]:
        own = {"reference_path": self.reference, "mask_strategy": self.mask_strategy}
        return super().identity | own


def parse_prompts(
    texts: Sequence[str],
    references: Sequence[str] | None = None,
    strategies: Sequence[str] | None = None,
) -> list[OpenSoraPrompt]:
    """Prompts from raw lines.

    Args:
        references, strategies: those of prompts whose JSON suffix names none.

    Raises:
        ValueError: a malformed suffix or segment, or lists of unequal length.
    """
    columns = [list(column or [""] * len(texts)) for column in (references, strategies)]
    for name, column in zip(("reference_path", "mask_strategy"), columns, strict=True):
        if len(column) != len(texts):
            raise ValueError(
                f"{name} needs one entry per prompt: {len(texts)} prompts, {len(column)} entries"
            )
    parsed = []
    for text, reference, strategy in zip(*extract_json_from_prompts(list(texts), *columns), strict=True):
        parts, starts = split_prompt(text)
        segments = tuple(zip(starts or [0], parts, strict=True))
        parsed.append(OpenSoraPrompt(parts[0], segments, reference, strategy))
    return parsed
