"""Captions through T5 without an attention mask, as CogVideoX and LTX-Video were trained.

Axes: L text tokens, D text width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import Features, TextEncoder


class T5Text(TextEncoder):
    """T5 features of captions: ``features`` [L, D].

    Args:
        length: tokens that a caption is padded or cut to before it is encoded; its features depend on the padding.
        trim: leave the features of the padding out.
    """

    def __init__(self, tokenizer: Any, network: nn.Module, length: int, device: torch.device, *, trim: bool):
        self.tokenizer, self.network, self.length, self.device = tokenizer, network, length, device
        self.trim = trim

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Features]:
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        hidden = self.network(tokens.input_ids.to(self.device)).last_hidden_state.cpu()
        lengths = tokens.attention_mask.sum(1).tolist()
        if not self.trim:
            return [{"features": row} for row in hidden]
        return [{"features": row[:length]} for row, length in zip(hidden, lengths, strict=True)]
