"""Frozen linear layers kept in 8-bit float or 4 bits, computed in the model's own dtype."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
NF4_BLOCK = 64


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weight is stored as float8_e4m3fn with one scale per output row.

    A subclass of ``nn.Linear``, so that adapters attach to it. Half the memory of bf16; the rounding error of
    a weight is at most 1/16 of its magnitude, or 1/458752 of the row's largest where that is more.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "Fp8Linear":
        with torch.device("meta"):
            stored = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        weight = linear.weight.detach()
        largest = weight.abs().amax(1, keepdim=True).clamp(min=1e-12).float()
        # Divided by the scale as it is stored, so that its own rounding adds no error.
        scale = (largest / FP8_MAX).to(weight.dtype)
        stored.weight = nn.Parameter((weight.float() / scale.float()).to(FP8), requires_grad=False)
        stored.register_buffer("scale", scale)
        stored.bias = linear.bias
        return stored

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenLinear.apply(x, self.bias, self.widened, self.weight, self.scale)

    @staticmethod
    def widened(weight: Tensor, scale: Tensor) -> Tensor:
        return weight.to(scale.dtype) * scale


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose weight is stored in the 4-bit format of QLoRA, one float32 scale per 64 values.

    A subclass of ``nn.Linear``, so that adapters attach to it. Computes in ``dtype``. bitsandbytes packs and widens the
    weight; its own layer has no gradient on a CPU (Dettmers et al., 2023).
    """

    scale: Tensor
    code: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, linear: nn.Linear) -> "Nf4Linear":
        from bitsandbytes.functional import quantize_4bit

        with torch.device("meta"):
            stored = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        packed, state = quantize_4bit(linear.weight.detach(), quant_type="nf4", blocksize=NF4_BLOCK)
        stored.weight = nn.Parameter(packed, requires_grad=False)
        stored.register_buffer("scale", state.absmax)
        stored.register_buffer("code", state.code)
        stored.dtype = linear.weight.dtype
        stored.bias = linear.bias
        return stored

    def _apply(self, fn, recurse=True):
        exact = self.scale, self.code
        super()._apply(fn, recurse)
        # A cast changes the type computed in, and must not round what the weight is restored from.
        self.scale, self.code = (value.to(self.weight.device) for value in exact)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=exact[0].device)).dtype
        return self

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenLinear.apply(x, self.bias, self.widened, self.weight, self.scale, self.code)

    def widened(self, packed: Tensor, scale: Tensor, code: Tensor) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(scale, shape, code, NF4_BLOCK, "nf4", self.dtype)
        return dequantize_4bit(packed, state)


class _FrozenLinear(torch.autograd.Function):
    """F.linear that keeps the ``stored`` weight for the backward pass, and widens it anew there.

    Differentiable with respect to ``x`` alone. Left to autograd, every layer would keep its weight in full.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, bias: Tensor | None, widened: Callable[..., Tensor], *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.widened = widened
        return F.linear(x, widened(*stored), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors  # checkpointing lets them be asked for once
        return grad @ ctx.widened(*stored).to(grad.dtype), *[None] * (2 + len(stored))


def store_linears_in_fp8(blocks: Iterable[nn.Module]) -> None:
    """Keep every linear layer of ``blocks`` in 8 bits; what lies outside them, embedders and output, stays exact."""
    _replace_linears(blocks, Fp8Linear.of)


def store_linears_in_nf4(blocks: Iterable[nn.Module]) -> None:
    """The same in 4 bits."""
    _replace_linears(blocks, Nf4Linear.of)


def _replace_linears(blocks: Iterable[nn.Module], make: Callable[[nn.Linear], nn.Linear]) -> None:
    for block in blocks:
        for parent in block.modules():
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, make(child))
