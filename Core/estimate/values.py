"""Tensors without content, of which small ones keep their values, so that code that reads them runs unchanged.

Sizes, masks, frame numbers and timesteps are read in Python all along a training step. PyTorch's fake tensors keep the
value of a single number; here they keep those of up to ``KEPT_VALUES``, and follow them through every operator.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

KEPT_VALUES = 8192  # numbers of a tensor
# Warnings that real tensors do not give: pixel values out of range, and a norm over no elements.
OF_FAKES = ("Passing `image` as torch tensor with value range", r"var_mean\(\): degrees of freedom")
aten = torch.ops.aten
# Operators without a tensor among their arguments, whose values code may read.
FACTORIES = {
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default),
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.eye.default, aten.scalar_tensor.default),
    *(aten.rand.default, aten.rand.generator, aten.randint.default, aten.randint.generator),
    *(aten.randint.low, aten.randint.low_generator, aten.randperm.default, aten.randperm.generator),
}
# Operators whose result has one value, whatever their tensor holds.
FILLED = {
    **{aten.ones_like.default: 1, aten.new_ones.default: 1},
    **{aten.zeros_like.default: 0, aten.new_zeros.default: 0},
}
# Operators whose result has an entry for each True of a mask.
MASKED = {aten.index.Tensor, aten.nonzero.default, aten.masked_select.default}


class SmallValues(TorchDispatchMode):
    """Gives small new tensors their values, and a plausible one to whatever else is read: 1, that is True."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and _is_unknown(args[0]):
            return _one(args[0].dtype)
        if func in MASKED:
            args = tree_map(self._mask, args)
        out = func(*args, **kwargs)
        if func not in FACTORIES and func not in FILLED:
            return out
        if out.numel() > KEPT_VALUES or out.device.type == "meta":
            return out
        with no_dispatch():
            filled = func in FILLED
            real = torch.full(out.shape, FILLED[func], dtype=out.dtype) if filled else func(*args, **kwargs)
        return self._with_values(real)

    def _mask(self, value: Any) -> Any:
        """All True in place of a mask whose values are not known."""
        if not _is_unknown(value) or value.dtype != torch.bool:
            return value
        with no_dispatch():
            real = torch.ones(value.shape, dtype=torch.bool)
        return self._with_values(real)

    def _with_values(self, real: Tensor) -> FakeTensor:
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, real, make_constant=True)


def _is_unknown(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _one(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


@contextmanager
def tensors_without_content() -> Iterator[FakeTensorMode]:
    """Within this context new tensors have a shape and a dtype, and no memory."""
    before = fake_tensor.CONSTANT_NUMEL_LIMIT, torch.utils.swap_tensors
    fake_tensor.CONSTANT_NUMEL_LIMIT, torch.utils.swap_tensors = KEPT_VALUES, _swap
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode, SmallValues(mode):
            for message in OF_FAKES:
                warnings.filterwarnings("ignore", message)
            yield mode
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT, torch.utils.swap_tensors = before


def _swap(one: Tensor, other: Tensor) -> None:
    """What ``module.to(…)`` does to a fake parameter; torch's own refuses those of which it keeps weak references."""
    one.__dict__, other.__dict__ = dict(other.__dict__), dict(one.__dict__)
    torch._C._swap_tensor_impl(one, other)


def without_content(mode: FakeTensorMode, module: torch.nn.Module) -> torch.nn.Module:
    """``module`` whose parameters and buffers have been replaced by tensors without content."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach())
                child._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if isinstance(buffer, Tensor):
                child._buffers[name] = mode.from_tensor(buffer)
    return module
