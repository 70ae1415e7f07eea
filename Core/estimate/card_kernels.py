"""What a CUDA card does otherwise than the CPU whose operators the estimate follows: autocast, norms and attention.

Tensors without content must say they are on the CPU, since a build of PyTorch without CUDA has no gradient for others.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)
# Computed in float32 under CUDA's autocast, and as they come under the CPU's: those of AT_FORALL_FP32 and
# AT_FORALL_FP32_SET_OPT_DTYPE in PyTorch's ATen/autocast_mode.h that networks and losses use.
IN_FLOAT32: set[Callable[..., Any]] = {
    *(F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.rms_norm, torch.rms_norm),
    *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.square, Tensor.square, torch.rsqrt, Tensor.rsqrt),
    *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.reciprocal, Tensor.reciprocal),
    *(torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod, torch.norm, Tensor.norm),
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.softplus, F.interpolate, F.cosine_similarity),
}
RMS_NORMS = {F.rms_norm, torch.rms_norm}
# Of PyTorch's flash attention, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp: the gradient of the
# queries is summed in float32, rows and columns rounded up.
FLASH_ROWS, FLASH_COLUMNS = 128, 32


class CudaArithmetic(TorchFunctionMode):
    """CUDA's autocast in place of the CPU's, and its norm in one kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_widened(value) for value in args)
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        if func in RMS_NORMS:
            return _RmsNorm.apply(*_norm_inputs(*args, **kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _norm_inputs(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor | None, int]:
    return input, weight, len(normalized_shape)


class _RmsNorm(torch.autograd.Function):
    """Memory of CUDA's fused kernel, without its numbers: it keeps its input and one float32 for each row."""

    @staticmethod
    def forward(ctx, x, weight, axes):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-axes], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        return torch.empty_like(x), torch.empty_like(weight) if wanted else None, None


def attention_workspace(func: Any, args: tuple) -> int:
    """Bytes that the kernel of attention's backward pass takes beside its results."""
    if func is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    query = args[1]
    if query.dtype not in HALF:
        return 0
    batch, heads, rows, columns = query.shape
    rows, columns = (-(-n // unit) * unit for n, unit in ((rows, FLASH_ROWS), (columns, FLASH_COLUMNS)))
    return batch * heads * rows * (columns + 1) * torch.float32.itemsize
