"""Gradient checkpointing, switched on per model and applied once, per block."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def set_grad_checkpoint(model: nn.Module, enabled: bool = True) -> None:
    """Recompute the activations of every checkpointed block of ``model`` in the backward pass."""
    for module in model.modules():
        module.grad_checkpointing = enabled


def auto_grad_checkpoint(module: nn.Module, *args):
    """Call ``module``, without keeping its activations when checkpointing is on for it."""
    if torch.is_grad_enabled() and getattr(module, "grad_checkpointing", False):
        return checkpoint(module, *args, use_reentrant=False)
    return module(*args)
