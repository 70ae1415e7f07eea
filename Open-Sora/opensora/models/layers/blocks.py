"""Attention and feed-forward layers of STDiT3.

Axes: B batch, T frames, S patches of a frame, N heads, Q query tokens, L key tokens, D width, d head dimension.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .embeddings import RotaryEmbedding

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Computed in float32 inside (one kernel on a GPU); the weight is multiplied in the dtype of ``x``, as the
        # release does.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


class Attention(nn.Module):
    """Self-attention of ``x`` [B, T, S, D] along S, or with a rotary position along T."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, rope: RotaryEmbedding | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.along_time = rope is not None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        # Kept out of the module tree: one table serves all blocks and stands once in the checkpoint.
        self._rope = (rope,)

    def forward(self, x: Tensor) -> Tensor:
        rows, heads = ("(B S) T D", "(B S) N T d") if self.along_time else ("(B T) S D", "(B T) N S d")
        # One video's rows along time are a strided view, for which PyTorch would run a small product per row.
        qkv = self.qkv(rearrange(x, f"B T S D -> {rows}").contiguous())
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if (rope := self._rope[0]) is not None:
            q, k = rope(q), rope(k)
        out = F.scaled_dot_product_attention(q, k, v)
        # Merged in the order of ``x``, so that what follows reads memory in one go.
        return self.proj(rearrange(out, f"{heads} -> B T S (N d)", B=x.shape[0]))


class CrossAttention(nn.Module):
    """Attention of the video's tokens to the caption's, whose keys and values are computed ahead."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Caption tokens [B, L, D] → keys and values [B, N, L, d]."""
        k, v = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        """``x`` [B, Q, D]; ``attn_mask`` [B, 1, 1, L], True where a caption has a token, or None for all."""
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)))


def merge_heads(x: Tensor) -> Tensor:
    """[B, N, Q, d] → [B, Q, N·d]."""
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
