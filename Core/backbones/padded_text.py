"""Captions through an encoder that takes all of them at one length.

Axes: L text tokens, D text width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import Features, TextEncoder


class PaddedText(TextEncoder):
    """Last hidden states of captions: ``features`` [L, D].

    Args:
        length: tokens that a caption is padded or cut to before it is encoded.
        masked: hide the padding from the encoder; else a caption's features depend on it.
        trim: leave the features of the padding out.
    """

    def __init__(
        self,
        tokenizer: Any,
        network: nn.Module,
        length: int,
        device: torch.device,
        *,
        masked: bool,
        trim: bool,
    ):
        self.tokenizer, self.network, self.length, self.device = tokenizer, network, length, device
        self.masked, self.trim = masked, trim

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Features]:
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = [tokens.attention_mask] if self.masked else []
        hidden = self.network(tokens.input_ids, *mask).last_hidden_state.cpu()
        if not self.trim:
            return [{"features": row} for row in hidden]
        lengths = tokens.attention_mask.sum(1).tolist()
        return [{"features": row[:length]} for row, length in zip(hidden, lengths, strict=True)]
