"""Prompts to token ids, without cutting a long one in silence."""

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("vader")
SHOWN = 60  # characters of a cut prompt that a message shows


class CutNotice:
    """Says once that a prompt is longer than what a text encoder reads.

    Args:
        reader: what reads the prompts, in words.
        limit: tokens it reads.
    """

    def __init__(self, reader: str, limit: int):
        self.reader, self.limit, self.given = reader, limit, False

    def check(self, text: str, count: int) -> None:
        """Warn if ``text`` has more tokens, ``count``, than are read, unless a warning has been given."""
        if self.given or count <= self.limit:
            return
        self.given = True
        logger.warning(
            "a prompt has %d tokens, but %s reads %d: the last %d are cut (%r…), and so with other long prompts; "
            "shorten them, or use clip_score with a model for long captions (Long-CLIP)",
            *(count, self.reader, self.limit, count - self.limit, text[:SHOWN]),
        )


class Tokens:
    """A tokenizer and the number of tokens its text encoder reads.

    Args:
        padding: "longest" or "max_length".
    """

    def __init__(self, tokenizer: Any, limit: int, padding: str):
        self.tokenizer, self.limit, self.padding = tokenizer, limit, padding
        self.notice = CutNotice(f"the text encoder of {tokenizer.name_or_path!r}", limit)

    def __call__(self, texts: Sequence[str]) -> Any:
        """``input_ids`` and ``attention_mask`` [N, L] of N texts."""
        for text in texts:
            self.notice.check(text, len(self.tokenizer(text, verbose=False).input_ids))
        return self.tokenizer(
            list(texts), padding=self.padding, truncation=True, max_length=self.limit, return_tensors="pt"
        )
