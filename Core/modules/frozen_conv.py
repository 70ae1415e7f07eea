"""Convolutions whose weights are frozen, without what only a weight's gradient would need.

PyTorch has one backward formula for a convolution's input and weight, and so keeps the input even where only the
input's gradient will be asked for, which takes the weight alone. Linear layers have two, and keep nothing.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CONV2D = F.conv2d, torch.nn.grad.conv2d_input
CONV3D = F.conv3d, torch.nn.grad.conv3d_input


def forget_conv_inputs(model: nn.Module) -> None:
    """Let the frozen 2-D and 3-D convolutions of ``model`` keep no input for the backward pass."""
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Conv3d) and _replaceable(module):
            # On the instance, so that the module stays of its own class for whoever looks.
            module.forward = partial(convolve_input, module)


def _replaceable(conv: nn.Module) -> bool:
    """Frozen, and padded by numbers of zeros, as the formula of the input's gradient takes them."""
    frozen = not any(p.requires_grad for p in conv.parameters())
    return frozen and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def convolve_input(conv: Any, x: Tensor, padding: tuple[int, ...] | None = None) -> Tensor:
    """What the frozen ``conv`` makes of ``x``, with a gradient to ``x`` alone.

    Args:
        padding: zeros on either side of each axis; None = the convolution's own.
    """
    settings = (conv.stride, conv.padding if padding is None else padding, conv.dilation, conv.groups)
    functions = CONV2D if isinstance(conv, nn.Conv2d) else CONV3D
    return _InputGradient.apply(x, conv.weight, conv.bias, settings, *functions)


class _InputGradient(torch.autograd.Function):
    """A convolution that is differentiable by its input only."""

    @staticmethod
    def forward(ctx, x, weight, bias, settings, convolve, input_gradient):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.settings, ctx.input_gradient = settings, input_gradient
        return convolve(x, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        # Autocast may have computed in a dtype other than the weight's.
        found = ctx.input_gradient(ctx.shape, weight.to(grad.dtype), grad, *ctx.settings)
        return found.to(ctx.dtype), None, None, None, None, None
