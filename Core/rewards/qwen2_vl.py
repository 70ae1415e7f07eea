"""Qwen2-VL as the scorers built on it use it: pixels to patches, chat text, hidden states of marked tokens.

The layers are transformers'; the order they run in is written out here, because a scorer needs every layer recomputed
in the backward pass, exact float64, and the positions its reward was trained with: 0, 1, 2, … on all three axes, since
both authors call the language model with embeddings and no position ids (transformers 4.45).

Axes: B clips, F frames, H, W pixels, t, h, w patches of a clip (time, rows, columns), S = h·w, L tokens of a text,
D features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from Core.modules.sharding import Part
from Core.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalize, resize

MAX_RATIO = 200  # of the longer side to the shorter
VISION_THETA = 10_000.0
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


def smart_resize(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """Size that Qwen2-VL brings a picture to: multiples of ``factor`` near its own, its area within the bounds.

    Sides are rounded; where the area is then too large they are scaled down and rounded down, where it is too small
    scaled up and rounded up (qwen-vl-utils 0.0.8).

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"Qwen2-VL takes pictures up to {MAX_RATIO} times as long as wide, got {height}x{width}; "
            "choose another size of the video"
        )
    rounded = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if rounded[0] * rounded[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        height, width = (max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width))
        return height, width
    if rounded[0] * rounded[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


@dataclass(frozen=True, kw_only=True)
class Patches:
    """What Qwen2-VL does to the frames of a clip before its first layer; differentiable.

    min_pixels, max_pixels: bounds of a frame's area. patch: side of a patch, merge: patches a token has along a side,
    frames: those a patch spans.
    """

    min_pixels: int
    max_pixels: int
    patch: int = 14
    merge: int = 2
    frames: int = 2
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, clips: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, F, 3, H, W] in [0, 1] → patches [B, t, S, 3·frames·patch²] in the order of tokens, and (t, h, w).

        Where F is no multiple of ``frames``, the last frame is repeated.
        """
        spare = -clips.shape[1] % self.frames
        if spare:
            clips = torch.cat([clips, clips[:, -1:].expand(-1, spare, -1, -1, -1)], dim=1)
        height, width = clips.shape[-2:]
        size = smart_resize(height, width, self.min_pixels, self.max_pixels, self.patch * self.merge)
        pixels = normalize(resize(clips.flatten(0, 1), *size), self.mean, self.std)
        t, h, w = clips.shape[1] // self.frames, size[0] // self.patch, size[1] // self.patch
        blocks = pixels.view(
            len(clips), t, self.frames, 3, h // self.merge, self.merge, self.patch, w // self.merge, self.merge,
            self.patch,
        )  # fmt: skip
        # → clip, time, row and column of the token, row and column in it, channel, frame, row and column of the pixel
        blocks = blocks.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
        return blocks.reshape(len(clips), t, h * w, -1), (t, h, w)


def chat(kind: Literal["image", "video"], tokens: int, text: str) -> str:
    """The user turn with a picture or video of so many tokens first, then ``text``; the answer is to follow."""
    vision = f"<|vision_start|>{PADS[kind] * tokens}<|vision_end|>"
    return f"{SYSTEM}<|im_start|>user\n{vision}{text}<|im_end|>\n<|im_start|>assistant\n"


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of [..., L, D] by angles [L, D/2], in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (f(angles).repeat(1, 2).to(wide.dtype) for f in (torch.cos, torch.sin))
    half = wide.shape[-1] // 2
    turned = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


def frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies [size / 2], always float32: other types would turn late positions elsewhere."""
    return 1.0 / theta ** (torch.arange(0, size, 2, device=device).float() / size)


class WideRMSNorm(nn.Module):
    """transformers' Qwen2-VL norm, except that float64 stays float64."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        self.epsilon = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


class VisionBlock(nn.Module):
    """One layer of the vision tower, made of transformers' own."""

    def __init__(self, block: Any, heads: int):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.heads = heads

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """[N, S, D] with rotary angles [S, D / heads / 2] of the patches → the same shape."""
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, S, D / heads]
        seen = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        x = x + self.attn.proj(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Qwen2VL(nn.Module):
    """The vision tower and the language model, without cache or vocabulary head.

    Args:
        config: transformers' ``Qwen2VLConfig``; the weights are on the meta device until they are loaded.
    """

    def __init__(self, config: Any):
        from transformers import Qwen2VLModel

        super().__init__()
        with torch.device("meta"):
            model = Qwen2VLModel(config)
        self.visual = model.visual
        self.language_model = model.language_model
        # Both are computed here; theirs are buffers, which a cast to half precision would round.
        del self.visual.rotary_pos_emb, self.language_model.rotary_emb
        self.heads = config.vision_config.num_heads
        self.visual.blocks = nn.ModuleList(VisionBlock(block, self.heads) for block in self.visual.blocks)
        text = config.text_config
        self.head_size = text.hidden_size // text.num_attention_heads
        self.theta = float(text.rope_parameters["rope_theta"])
        for parent in (self.language_model, *self.language_model.layers):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "Qwen2VLRMSNorm":
                    setattr(parent, name, WideRMSNorm(child))

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of both, which hold nearly all weights."""
        return [*self.visual.blocks, *self.language_model.layers]

    @property
    def parts(self) -> list[Part]:
        """What is gathered by itself where the network is split over processes, see ``Core.modules.sharding``."""
        return [*((block, "") for block in (self.language_model.embed_tokens, *self.blocks)), (self, "see")]

    def see(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches [B, t, S, …] of a grid (t, h, w) → features of the merged tokens [B, t·S / merge², D].

        The patches of a time see each other, those of two times do not.
        """
        batch, times, count, _ = patches.shape
        x = self.visual.patch_embed(patches.flatten(0, 2)).view(batch * times, count, -1)
        angles = self.vision_angles(*grid[1:], x.shape[-1] // self.heads, x.device)
        for block in self.visual.blocks:
            x = checkpoint(block, x, angles, use_reentrant=False)
        return self.visual.merger(x.flatten(0, 1)).unflatten(0, (batch, -1))

    def vision_angles(self, rows: int, columns: int, size: int, device: torch.device) -> Tensor:
        """Rotary angles [S, size / 2] of a grid's patches in the order of tokens: row, then column."""
        merge = self.visual.spatial_merge_size
        grid = torch.stack(
            torch.meshgrid(
                torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
            ),
            dim=-1,
        )
        ordered = grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)
        return (ordered[..., None].float() * frequencies(size // 2, VISION_THETA, device)).flatten(1)

    def read(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, L, D] → last hidden states [B, L, D].

        Texts are padded on the right and each token sees only those before it, so the padding needs no mask.
        """
        length, device = embeddings.shape[1], embeddings.device
        positions = torch.arange(length, device=device)[:, None].float()
        angles = (positions * frequencies(self.head_size, self.theta, device)).repeat(1, 2)
        rotary = tuple(f(angles).to(embeddings.dtype).expand(1, -1, -1) for f in (torch.cos, torch.sin))
        for layer in self.language_model.layers:
            embeddings = checkpoint(
                layer, embeddings, attention_mask=None, position_embeddings=rotary, use_reentrant=False
            )
        return self.language_model.norm(embeddings)

    def forward(self, ids: Tensor, pads: Tensor, vision: Tensor) -> Tensor:
        """Hidden states [B, L, D] of texts ``ids`` [B, L] with ``vision`` [B, N, D] where ``pads`` [B, L] is True."""
        embeddings = self.language_model.embed_tokens(ids)
        filled = embeddings.masked_scatter(pads[..., None], vision.to(embeddings.dtype))
        return self.read(filled)


class Reader(nn.Module):
    """From clips with prompts to the hidden states at marked tokens.

    Args:
        network: the model.
        tokenizer: its tokenizer, with ``marks`` in it.
        patches: preprocessing.
        template: text of the user turn with {text_prompt}, in which every mark stands once.
        marks: special tokens that are read.
        kind: what a clip is to the model.
    """

    def __init__(
        self,
        network: Qwen2VL,
        tokenizer: Any,
        patches: Patches,
        template: str,
        marks: Sequence[str],
        kind: Literal["image", "video"],
    ):
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.patches = patches
        self.template = template
        self.marks = tuple(marks)
        self.mark_ids = tokenizer.convert_tokens_to_ids(list(marks))
        self.pad_id = tokenizer.convert_tokens_to_ids(PADS[kind])
        self.kind: Literal["image", "video"] = kind

    def forward(self, clips: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, F, 3, H, W] in [0, 1] and B prompts → hidden states [B, marks, D] in the order of the text."""
        patches, grid = self.patches(clips)
        tokens = math.prod(grid) // self.patches.merge**2
        ids = self.tokens(prompts, tokens).to(clips.device)
        dtype = self.network.language_model.norm.weight.dtype
        vision = self.network.see(patches.to(dtype), grid)
        hidden = self.network(ids, ids == self.pad_id, vision)
        marked = torch.isin(ids, torch.tensor(self.mark_ids, device=ids.device))
        return hidden[marked].view(len(clips), len(self.mark_ids), -1)

    def tokens(self, prompts: Sequence[str], count: int) -> Tensor:
        """Token ids [B, L] of the chats for ``prompts``, ``count`` of each standing for the clip.

        Raises:
            ValueError: a prompt holds special tokens of the model.
        """
        if errors := token_errors(prompts, self.kind, self.marks):
            raise ValueError("; ".join(errors))
        texts = [chat(self.kind, count, self.template.format(text_prompt=prompt)) for prompt in prompts]
        return self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids


def token_errors(prompts: Sequence[str], kind: Literal["image", "video"], marks: Sequence[str]) -> list[str]:
    """Sentences on prompts that hold tokens which stand for the clip or where the score is read."""
    return [
        f"the prompt {prompt!r} holds {token}, a special token of the reward; remove it"
        for prompt in prompts
        for token in (PADS[kind], *marks)
        if token in prompt
    ]
