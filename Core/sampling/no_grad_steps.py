"""Sampling steps without a gradient, which are most of a training step and all of inference: what they need not do.

The adapter is added into its layer's output in place, by one product. PEFT's layer copies its input to float32, scales
the adapter's output and adds it, each a pass over memory of its own; that is there for the gradient. So is autocast,
where the frozen weights are in its dtype.

With ``prefix_cache``, attention and MLP outputs are used for several steps, since they change slowly from one to the
next (FORA, Selvaraju et al., 2024). That is no longer the same video.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from Core.backbones import Backbone
from Core.modules.lora import ADAPTER


@contextmanager
def lean_steps(backbone: Backbone, compiled: bool) -> Iterator[None]:
    """Within this context ``backbone`` takes steps without a gradient, and without what is there for one.

    ``compiled`` blocks are left alone: the compiler fuses PEFT's layer itself, which needs autocast, and would compile
    anew for one that changes with each step.
    """
    if compiled:
        yield
        return
    with fused_adapter(backbone.denoiser), without_needless_autocast(backbone.device, backbone.dtype):
        yield


@contextmanager
def fused_adapter(model: nn.Module) -> Iterator[None]:
    """Within this context every adapted layer of ``model`` computes W x + s B (A x) without a gradient.

    Products are in the dtype of the layer's output, as they are under autocast. Scale, dropout mask and weights
    are those at entry. A model without an adapter is left alone.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and ADAPTER in m.lora_A]
    try:
        for layer in layers:
            # On the instance, where it hides the class's own until it is removed.
            layer.forward = partial(_fused, layer.base_layer, *_factors(layer), {})
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
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


@contextmanager
def reused_outputs(model: nn.Module, branches: Sequence[nn.Module], every: int) -> Iterator[None]:
    """Within this context each of ``branches`` runs in every ``every``-th call of ``model``, beginning with the first.

    In the calls between it gives its last output again; all those outputs are in memory until the end.
    """
    outputs: dict[nn.Module, Tensor] = {}
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        if calls % every == 0:
            outputs.clear()
        calls += 1

    def kept(branch: nn.Module, *args: Tensor | None) -> Tensor:
        if branch not in outputs:
            outputs[branch] = type(branch).forward(branch, *args)
        return outputs[branch]

    counter = model.register_forward_pre_hook(count)
    for branch in branches:
        branch.forward = partial(kept, branch)
    try:
        yield
    finally:
        counter.remove()
        for branch in branches:
            del branch.forward
