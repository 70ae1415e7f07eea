"""Gradient checkpointing, switched on per model and applied once, per block."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

# What F.scaled_dot_product_attention runs as, by device and kernel.
ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
KEEP_ATTENTION = partial(create_selective_checkpoint_contexts, ATTENTION)


def set_grad_checkpoint(model: nn.Module, enabled: bool = True, keep_attention: bool = False) -> None:
    """Recompute the activations of every checkpointed block of ``model`` in the backward pass.

    Args:
        keep_attention: all but the outputs of attention.
    """
    for module in model.modules():
        module.grad_checkpointing = enabled
        module.checkpoint_context = KEEP_ATTENTION if keep_attention else noop_context_fn


def auto_grad_checkpoint(module: nn.Module, *args):
    """Call ``module``, without keeping its activations when checkpointing is on for it."""
    if torch.is_grad_enabled() and getattr(module, "grad_checkpointing", False):
        return checkpoint(module, *args, use_reentrant=False, context_fn=module.checkpoint_context)
    return module(*args)
