"""Positions, timesteps, sizes and captions as vectors.

Axes: B batch, T frames, S patches of a frame, L text tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10000.0
SINUSOID_BASE = 10000.0


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself in float32 or wider, else a float32 copy."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PatchEmbed3D(nn.Module):
    """Cut a latent into patches: [B, C, T, H, W] → [B, T·H'·W', D], zero-padded at the end of each axis."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        pads = [-size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        if any(pads):
            x = F.pad(x, (0, pads[2], 0, pads[1], 0, pads[0]))
        # In memory as it is read from here on: a transposed view would pass its order on to every sum along the blocks.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class PositionEmbedding2D(nn.Module):
    """Sin/cos embedding of patch positions, stretched to the resolution the model was trained at.

    The first half of the channels holds the column, the second half the row.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim % 4:
            raise ValueError(f"hidden_size must be divisible by 4, got {dim}")
        self.dim = dim
        self._cache: dict[tuple, Tensor] = {}

    def forward(self, rows: int, cols: int, scale: float, like: Tensor) -> Tensor:
        """[1, S, D] in the device and dtype of ``like``; ``scale`` is sqrt(height · width) / 512."""
        key = (rows, cols, scale, like.device, like.dtype)
        if key not in self._cache:
            self._cache = {key: self._table(rows, cols, scale, like.device).to(like.dtype)}
        return self._cache[key]

    def _table(self, rows: int, cols: int, scale: float, device: torch.device) -> Tensor:
        base = round((rows * cols) ** 0.5)
        row = torch.arange(rows, device=device) / scale * (base / rows)
        col = torch.arange(cols, device=device) / scale * (base / cols)
        row, col = torch.meshgrid(row, col, indexing="ij")
        return torch.cat([self._sin_cos(col), self._sin_cos(row)], dim=-1)[None]

    def _sin_cos(self, position: Tensor) -> Tensor:
        half = self.dim // 2
        frequency = SINUSOID_BASE ** -(torch.arange(0, half, 2, device=position.device) / half)
        angle = position.flatten()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class RotaryEmbedding(nn.Module):
    """Rotary position over the whole head dimension, pairs of neighbouring channels (RoFormer, 2021)."""

    freqs: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        exponent = torch.arange(0, head_dim, 2).float() / head_dim
        self.register_buffer("freqs", 1.0 / ROTARY_BASE**exponent)
        self._cache: dict[tuple, Tensor] = {}

    def _apply(self, fn, recurse: bool = True):
        """Move, but stay in float32: half-precision frequencies would turn late frames by a wrong angle."""
        freqs = self.freqs
        super()._apply(fn, recurse)
        if not freqs.is_meta:
            self.freqs = freqs.to(self.freqs.device, torch.float32)
        self._cache.clear()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._cache.clear()

    def _turns(self, length: int, device: torch.device) -> Tensor:
        """Unit complex numbers [T, head_dim / 2]."""
        if (length, device) not in self._cache:
            angle = torch.arange(length, device=device)[:, None] * self.freqs.float()
            self._cache = {(length, device): torch.polar(torch.ones_like(angle), angle)}
        return self._cache[length, device]

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x`` [..., T, head_dim] by its position along T."""
        pairs = torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self._turns(x.shape[-2], x.device)).flatten(-2).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Scalars [B] → [B, D]: sinusoid of 256 channels, then a two-layer MLP."""

    channels = 256

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.channels, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    @classmethod
    def sinusoid(cls, value: Tensor) -> Tensor:
        half = cls.channels // 2
        steps = torch.arange(half, device=value.device, dtype=torch.float32)
        angle = value.float()[:, None] * torch.exp(-math.log(SINUSOID_BASE) / half * steps)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, value: Tensor) -> Tensor:
        return self.mlp(self.sinusoid(value).to(self.mlp[0].weight.dtype))


class SizeEmbedder(TimestepEmbedder):
    """The same for a size, here frames per second: [B] or [1] → [B, D]."""

    def forward(self, value: Tensor, batch: int) -> Tensor:  # type: ignore[override]
        return super().forward(value.flatten().expand(batch))


class CaptionProjection(nn.Module):
    def __init__(self, in_features: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(y), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text features [B, 1, L, D_text] → [B, 1, L, D], replaced by the learned null caption at random in training.

    ``y_embedding`` [L, D_text] is the null caption; guidance reads it too.
    """

    def __init__(self, in_channels: int, hidden_size: int, uncond_prob: float, token_num: int):
        super().__init__()
        self.y_proj = CaptionProjection(in_channels, hidden_size)
        self.register_buffer("y_embedding", torch.randn(token_num, in_channels) / in_channels**0.5)
        self.uncond_prob = uncond_prob

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.uncond_prob > 0:
            drop = torch.rand(y.shape[0], device=y.device) < self.uncond_prob
            y = torch.where(drop[:, None, None, None], self.y_embedding[: y.shape[2]].to(y.dtype), y)
        return self.y_proj(y)
