import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from transformers import PretrainedConfig, PreTrainedModel

from opensora.acceleration.checkpoint import auto_grad_checkpoint
from opensora.registry import MODELS
from opensora.utils.ckpt_utils import load_checkpoint

try:
    import xformers.ops
except ImportError:
    xformers = None


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "B N (K H D) -> K B H N D", K=3, H=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "B H N D -> B N (H D)"))


class MultiHeadCrossAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, dim * 2)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cond, y_lens):
        B, N, C = x.shape
        q = self.q_linear(x).view(1, -1, self.num_heads, C // self.num_heads)
        k, v = self.kv_linear(cond).view(1, -1, 2, self.num_heads, C // self.num_heads).unbind(2)
        if xformers is not None and x.is_cuda:
            bias = xformers.ops.fmha.BlockDiagonalMask.from_seqlens([N] * B, y_lens)
            out = xformers.ops.memory_efficient_attention(q, k, v, attn_bias=bias)
        else:
            parts = zip(q.split(N, dim=1), k.split(y_lens, dim=1), v.split(y_lens, dim=1), strict=True)
            heads = [F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in part)) for part in parts]
            out = torch.cat([head.transpose(1, 2) for head in heads], dim=1)
        return self.proj(out.reshape(B, -1, C))


class STDiT3Block(nn.Module):
    def __init__(self, hidden_size, num_heads, temporal=False):
        super().__init__()
        self.temporal = temporal
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = MultiHeadCrossAttention(hidden_size, num_heads)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size * 2), nn.GELU(), nn.Linear(hidden_size * 2, hidden_size)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x, y, t, y_lens, x_mask=None, t0=None, T=None, S=None):
        shift, scale = (self.scale_shift_table[None] + t.reshape(len(x), 2, -1)).chunk(2, dim=1)
        x_m = self.norm(x) * (1 + scale) + shift
        if x_mask is not None:
            shift0, scale0 = (self.scale_shift_table[None] + t0.reshape(len(x), 2, -1)).chunk(2, dim=1)
            kept = self.norm(x) * (1 + scale0) + shift0
            x_m = torch.where(x_mask.repeat_interleave(S, dim=1)[..., None], x_m, kept)
        if self.temporal:
            x_m = rearrange(
                self.attn(rearrange(x_m, "B (T S) C -> (B S) T C", T=T)), "(B S) T C -> B (T S) C", S=S
            )
        else:
            x_m = rearrange(
                self.attn(rearrange(x_m, "B (T S) C -> (B T) S C", T=T)), "(B T) S C -> B (T S) C", T=T
            )
        x = x + x_m
        x = x + self.cross_attn(x, y, y_lens)
        return x + self.mlp(self.norm(x))


class CaptionEmbedder(nn.Module):
    def __init__(self, in_channels, hidden_size, token_num):
        super().__init__()
        self.y_proj = nn.Sequential(
            nn.Linear(in_channels, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.register_buffer("y_embedding", torch.randn(token_num, in_channels) / in_channels**0.5)

    def forward(self, caption, train):
        if train:
            assert caption.shape[2:] == self.y_embedding.shape
        return self.y_proj(caption)


class STDiT3Config(PretrainedConfig):
    model_type = "STDiT3"

    def __init__(
        self,
        input_size=(None, None, None),
        input_sq_size=512,
        in_channels=4,
        patch_size=(1, 2, 2),
        hidden_size=1152,
        depth=28,
        num_heads=16,
        caption_channels=4096,
        model_max_length=300,
        qk_norm=True,
        enable_flash_attn=False,
        enable_layernorm_kernel=False,
        **kwargs,
    ):
        self.input_size = input_size
        self.input_sq_size = input_sq_size
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.caption_channels = caption_channels
        self.model_max_length = model_max_length
        self.qk_norm = qk_norm
        self.enable_flash_attn = enable_flash_attn
        self.enable_layernorm_kernel = enable_layernorm_kernel
        super().__init__(**kwargs)


class STDiT3(PreTrainedModel):
    config_class = STDiT3Config

    def __init__(self, config):
        super().__init__(config)
        dim = config.hidden_size
        self.hidden_size = dim
        self.register_buffer("seconds", torch.tensor(1 / 1000), persistent=False)
        self.x_embedder = nn.Conv3d(config.in_channels, dim, (1, 2, 2), stride=(1, 2, 2))
        self.t_embedder = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.fps_embedder = nn.Linear(1, dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        self.spatial_blocks = nn.ModuleList([STDiT3Block(dim, config.num_heads) for _ in range(config.depth)])
        self.temporal_blocks = nn.ModuleList(
            [STDiT3Block(dim, config.num_heads, temporal=True) for _ in range(config.depth)]
        )
        self.final_layer = nn.Linear(dim, 4 * 2 * config.in_channels)

    def encode_text(self, y, mask=None):
        """All captions' tokens in a row [1, tokens, D], and how many each has."""
        text = self.y_embedder(y, self.training).squeeze(1)
        if mask is None:
            return text.flatten(0, 1)[None], [text.shape[1]] * len(text)
        valid = mask.repeat(len(text) // len(mask), 1) != 0
        return text[valid][None], valid.sum(1).tolist()

    def embed_time(self, timestep, fps):
        return self.t_block(
            self.t_embedder(timestep[:, None] * self.seconds) + self.fps_embedder(fps.unsqueeze(1) / 120)
        )

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs):
        dtype = self.x_embedder.weight.dtype
        x, timestep, y = x.to(dtype), timestep.to(dtype), y.to(dtype)
        assert height[0].item() > 0 and width[0].item() > 0
        x = self.x_embedder(x)
        _, _, T, H, W = x.shape
        x = rearrange(x, "B C T H W -> B (T H W) C")
        t = self.embed_time(timestep, fps.to(dtype))
        t0 = None if x_mask is None else self.embed_time(torch.zeros_like(timestep), fps.to(dtype))
        y, y_lens = self.encode_text(y, mask)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = auto_grad_checkpoint(spatial, x, y, t, y_lens, x_mask, t0, T, H * W)
            x = auto_grad_checkpoint(temporal, x, y, t, y_lens, x_mask, t0, T, H * W)
        x = rearrange(self.final_layer(x), "B (T H W) (p q C) -> B C T (H p) (W q)", T=T, H=H, W=W, p=2, q=2)
        return x.to(torch.float32)


@MODELS.register_module("STDiT3-XL/2")
def STDiT3_XL_2(from_pretrained=None, **kwargs):
    if from_pretrained is not None and not os.path.isdir(from_pretrained):
        return STDiT3.from_pretrained(from_pretrained, **kwargs)
    config = STDiT3Config(depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16, **kwargs)
    model = STDiT3(config)
    if from_pretrained is not None:
        load_checkpoint(model, from_pretrained)
    return model
