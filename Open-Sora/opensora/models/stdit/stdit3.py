"""STDiT3, the spatial-temporal diffusion transformer of Open-Sora 1.2.

Axes: B batch, C channels, T frames, H rows, W columns, S patches of a frame, L text tokens, D width,
N heads, d head dimension. F is T where frames are modulated one by one, else 1.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora.acceleration.checkpoint import auto_grad_checkpoint, set_grad_checkpoint
from opensora.models.layers.blocks import NORM_EPS, Attention, CrossAttention, Mlp
from opensora.models.layers.embeddings import (
    CaptionEmbedder,
    PatchEmbed3D,
    PositionEmbedding2D,
    RotaryEmbedding,
    SizeEmbedder,
    TimestepEmbedder,
    at_least_float32,
)
from opensora.registry import MODELS
from opensora.utils.ckpt_utils import load_pretrained, read_config, save_pretrained


@dataclass(kw_only=True)
class STDiT3Config:
    """Sizes and switches of an STDiT3; the defaults are those of STDiT3-XL/2.

    ``enable_flash_attn`` and ``enable_layernorm_kernel`` stand in upstream's configs and checkpoints and are
    read for their sake: PyTorch picks the fused kernels by itself here.
    """

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True
    enable_flash_attn: bool = False
    enable_layernorm_kernel: bool = False

    def __post_init__(self):
        self.patch_size = tuple(self.patch_size)  # type: ignore[assignment]
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})"
            )

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    @classmethod
    def from_dict(cls, values: dict) -> "STDiT3Config":
        """From a hub ``config.json``, whose book-keeping keys do not concern the architecture."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class TextContext:
    """A batch of captions, ready for every block's text attention; valid for all timesteps of a sample.

    keys_values: for each block, in the order they run, keys and values [B, N, L, d].
    attn_mask: [B, 1, 1, L], True where a caption has a token; None when all captions are equally long.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    attn_mask: Tensor | None

    def let_length_vary(self) -> None:
        """Tell the compiler that L differs between batches, so that it makes one program for all of them."""
        for keys, values in self.keys_values:
            torch._dynamo.maybe_mark_dynamic(keys, 2)
            torch._dynamo.maybe_mark_dynamic(values, 2)
        if self.attn_mask is not None:
            torch._dynamo.maybe_mark_dynamic(self.attn_mask, 3)


class STDiT3Block(nn.Module):
    """One transformer block: attention within a frame (spatial) or along time (temporal), text, MLP."""

    def __init__(self, config: STDiT3Config, rope: RotaryEmbedding | None = None):
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attn = Attention(dim, config.num_heads, config.qk_norm, rope)
        self.cross_attn = CrossAttention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, modulation: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None
    ) -> Tensor:
        """x [B, T, S, D]; modulation [B, F, 6, D]; k, v [B, N, L, d]; attn_mask [B, 1, 1, L] or None."""
        table = (self.scale_shift_table + modulation)[:, :, :, None]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = table.unbind(2)
        attended = self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        x = gated_sum(x, gate_attn, attended)
        x = x + self.cross_attn(x.flatten(1, 2), k, v, attn_mask).view_as(x)
        return gated_sum(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Tokens [B, T, S, D] → patches [B, T, S, patch volume · C_out]."""

    def __init__(self, config: STDiT3Config):
        super().__init__()
        dim = config.hidden_size
        volume = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm_final = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, volume * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, t: Tensor, t0: Tensor | None, x_mask: Tensor | None) -> Tensor:
        """t, t0 [B, D]: embeddings of the timestep and of timestep 0, which holds where x_mask is False."""
        x = self._modulated(x, t)
        if x_mask is not None:
            # The released model normalises what it has already modulated; its weights expect it.
            x = torch.where(x_mask[:, :, None, None], x, self._modulated(x, t0))
        return self.linear(x)

    def _modulated(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None])[:, :, None, None].unbind(1)
        return modulate(self.norm_final(x), shift, scale)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def gated_sum(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return torch.addcmul(x, gate, branch)


class STDiT3(nn.Module):
    """Velocity network of Open-Sora 1.2; ``STDiT3Config`` gives its sizes.

    ``accepts_text_context`` tells callers that ``forward`` takes what ``encode_text`` made of the captions; the
    release has an ``encode_text`` too, whose result its ``forward`` does not take.
    """

    accepts_text_context = True

    def __init__(self, config: STDiT3Config):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.rope = RotaryEmbedding(dim // config.num_heads)
        self.pos_embed = PositionEmbedding2D(dim)
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.fps_embedder = SizeEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, dim, config.class_dropout_prob, config.model_max_length
        )
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, self.rope) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialisation for training from scratch: temporal blocks and the output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.fps_embedder.mlp[0], self.fps_embedder.mlp[2], self.t_block[1]):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        for block in self.temporal_blocks:
            for linear in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def blocks(self) -> list[STDiT3Block]:
        """All blocks in the order they run: each spatial block, then the temporal one of the same depth."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair]

    def encode_text(self, y: Tensor, mask: Tensor | None = None) -> TextContext:
        """Keys and values of a batch of captions for every block.

        Args:
            y: text features [B, 1, L, D_text].
            mask: [B or fewer, L], non-zero where a caption has a token; rows repeat to fill the batch, so that
                the null caption of guidance uses as many tokens as its prompt. None attends to all.
        """
        y = y.to(self.x_embedder.proj.weight.dtype)
        attn_mask = None
        if mask is not None:
            valid = (mask.flatten(1) != 0).repeat(y.shape[0] // mask.shape[0], 1)
            used = valid.any(0)
            y, valid = y[:, :, used], valid[:, used]
            attn_mask = None if bool(valid.all()) else valid[:, None, None]
        text = self.y_embedder(y).squeeze(1)
        context = TextContext(tuple(block.cross_attn.keys_values(text) for block in self.blocks), attn_mask)
        context.let_length_vary()
        return context

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | TextContext,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Predict the velocity (and an unused variance) of a noisy latent.

        Args:
            x: latent [B, C, T, H, W].
            timestep: [B] in [0, 1000]; 1000 is pure noise.
            y: text features [B, 1, L, D_text] with their ``mask`` [B or fewer, L], or what ``encode_text``
                made of them.
            x_mask: [B, T] bool; a False frame is given, not generated, and is modulated as at timestep 0.
            fps: [B], frames per second.
            height, width: [B], size of the video in pixels, the same for the whole batch. Kept on the CPU
                they cost no synchronisation.
            **kwargs: ``num_frames`` and ``ar`` of the multi-resolution info, which this model does not use.

        Returns:
            [B, 2·C, T, H, W] in float32 or wider; the first C channels are the velocity.
        """
        B, _, *size = x.shape
        context = y if isinstance(y, TextContext) else self.encode_text(y, mask)
        tokens, grid = self._embed(x, float(height[0]), float(width[0]))  # type: ignore[index]
        t, modulation = self._time(timestep, fps)
        t0 = None
        if x_mask is not None:
            t0, modulation0 = self._time(torch.zeros_like(timestep), fps)
            modulation = torch.where(x_mask[:, :, None, None], modulation, modulation0)
        for block, (k, v) in zip(self.blocks, context.keys_values, strict=True):
            tokens = auto_grad_checkpoint(block, tokens, modulation, k, v, context.attn_mask)
        tokens = self.final_layer(tokens, t, t0, x_mask)
        return at_least_float32(self._unpatchify(tokens, grid, size))

    def _embed(self, x: Tensor, height: float, width: float) -> tuple[Tensor, tuple[int, int, int]]:
        """Patch tokens [B, T, S, D] with their positions, and the grid of patches (T, H', W')."""
        grid = self.get_dynamic_size(x)
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        scale = (height * width) ** 0.5 / self.config.input_sq_size
        position = self.pos_embed(grid[1], grid[2], scale, like=tokens)
        return tokens.unflatten(1, (grid[0], -1)) + position[:, None], grid

    def _time(self, timestep: Tensor, fps: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding of timestep and fps [B, D], and the blocks' modulation [B, 1, 6, D]."""
        t = self.t_embedder(timestep) + self.fps_embedder(fps, timestep.shape[0])
        return t, self.t_block(t).unflatten(-1, (1, 6, -1))

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int, int], size: list[int]) -> Tensor:
        pt, ph, pw = self.config.patch_size
        x = rearrange(
            tokens,
            "B T (H W) (pt ph pw C) -> B C (T pt) (H ph) (W pw)",
            H=grid[1], W=grid[2], pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
        return x[:, :, : size[0], : size[1], : size[2]]

    def get_dynamic_size(self, x: Tensor) -> tuple[int, int, int]:
        """Number of patches of a latent [B, C, T, H, W] along T, H and W."""
        return tuple(-(-n // p) for n, p in zip(x.shape[2:], self.config.patch_size, strict=True))

    def enable_gradient_checkpointing(self) -> None:
        set_grad_checkpoint(self)

    def save_pretrained(self, folder: str | Path) -> None:
        save_pretrained(self, self.config.to_dict(), folder)


def build_stdit3(
    sizes: dict, from_pretrained: str | None, force_huggingface: bool = False, **kwargs
) -> STDiT3:
    """An STDiT3 with fresh weights, or with those of a hub id, a folder in the hub's layout, or one file.

    A folder's ``config.json`` gives the sizes; ``kwargs`` of the caller's config override it.
    ``force_huggingface`` is upstream's name for "this is a hub id"; what exists on disk is used first.
    """
    if kwargs.pop("enable_sequence_parallelism", False):
        raise ValueError("enable_sequence_parallelism=True is not supported; remove it from `model`")
    stored = read_config(from_pretrained) if from_pretrained else {}
    unknown = set(kwargs) - {field.name for field in fields(STDiT3Config)}
    if unknown:
        known = ", ".join(field.name for field in fields(STDiT3Config))
        raise ValueError(f"unknown keys in `model`: {', '.join(sorted(unknown))}; allowed: {known}")
    config = STDiT3Config.from_dict({**sizes, **stored, **kwargs})
    if from_pretrained is None:
        return STDiT3(config)
    with torch.device("meta"):
        model = STDiT3(config)
    return load_pretrained(model, from_pretrained)


@MODELS.register_module("STDiT3-XL/2")
def STDiT3_XL_2(from_pretrained: str | None = None, **kwargs) -> STDiT3:
    """STDiT3 with 1.1 billion parameters (hub: ``hpcai-tech/OpenSora-STDiT-v3``)."""
    return build_stdit3(dict(depth=28, hidden_size=1152, num_heads=16), from_pretrained, **kwargs)


@MODELS.register_module("STDiT3-3B/2")
def STDiT3_3B_2(from_pretrained: str | None = None, **kwargs) -> STDiT3:
    """STDiT3 with 3 billion parameters."""
    return build_stdit3(dict(depth=28, hidden_size=1872, num_heads=26), from_pretrained, **kwargs)
