"""Tiny random-weight twins of the scorers' networks, saved in the layout of the published ones.

Each differs from its model in sizes only. Every builder is deterministic and returns the folder it was given.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

SIZE = 16  # pixels a twin's vision tower takes
LETTERS = "abcdefghijklmnopqrstuvwxyz,.'0123456789"


def randomize(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Random weights of a size at which every layer matters; norms keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP tokenizer of single letters, a letter ending a word being a token of its own."""
    tokens = [letter + end for letter, end in itertools.product(LETTERS, ("", "</w>"))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=24)


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """CLIP: 16×16 pixels, patches of 8, projection to 12, text of at most 24 tokens."""
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=12,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    randomize(CLIPModel(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": SIZE}
    CLIPImageProcessorPil(size=size, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def head_file(path: Path, widths: tuple[int, ...], indices: tuple[int, ...], seed: int = 0) -> Path:
    """A head `layers.<i>` of the given widths, saved as the published ones are (a pickled state dict)."""
    state = {}
    generator = torch.Generator().manual_seed(seed)
    for i, (width_in, width_out) in zip(indices, itertools.pairwise(widths), strict=True):
        state[f"layers.{i}.weight"] = torch.randn(width_out, width_in, generator=generator) / width_in**0.5
        state[f"layers.{i}.bias"] = torch.randn(width_out, generator=generator) * 0.1
    torch.save(state, path)
    return path


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")
