"""Sampling steps without a gradient, which are most of a training step and all of inference: what they leave out.

The adapter is added into its layer's output in place, by one product. PEFT's layer copies its input to float32, scales
the adapter's output and adds it, each a pass over memory of its own; that is there for the gradient. So is autocast,
where the frozen weights are in its dtype.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from Core.modules.lora import ADAPTER, lora_layers


@contextmanager
def lean_steps(denoiser: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within this context ``denoiser`` runs without what only a gradient needs; ``dtype`` is that of its weights."""
    with fused_adapter(denoiser), without_needless_autocast(device, dtype):
        yield


@contextmanager
def fused_adapter(model: nn.Module) -> Iterator[None]:
    """Within this context every adapted linear layer of ``model`` computes W x + s B (A x) without a gradient.

    Products are in the dtype of the layer's output, as they are under autocast. Scale, dropout mask and weights
    are those at entry. A model without an adapter is left alone.
    """
    layers = [
        layer
        for layer in lora_layers(model).values()
        if ADAPTER in layer.lora_A and isinstance(layer.base_layer, nn.Linear)
    ]
    try:
        for layer in layers:
            # On the instance, where it hides the class's own until it is removed.
            layer.forward = partial(_fused, layer.base_layer, *_factors(layer), {})
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A [rank, in] with the dropout's mask on its inputs, and scale times B, [out, rank]."""
    down = layer.lora_dropout[ADAPTER](layer.lora_A[ADAPTER].weight.detach())
    return down, layer.scaling[ADAPTER] * layer.lora_B[ADAPTER].weight.detach()


def _fused(
    base: nn.Module, down: Tensor, up: Tensor, low: dict[torch.dtype, tuple[Tensor, Tensor]], x: Tensor
) -> Tensor:
    """``low`` keeps the factors in the dtype of the output, once it is known."""
    out = base(x)
    if out.dtype not in low:
        low[out.dtype] = down.to(out.dtype), up.to(out.dtype)
    a, b = low[out.dtype]
    out.view(-1, out.shape[-1]).addmm_(x.to(out.dtype).flatten(0, -2) @ a.T, b.T)
    return out


def without_needless_autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast off where it would compute in the weights' own ``dtype``; it would only widen norms between products."""
    if torch.get_autocast_dtype(device.type) == dtype:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
