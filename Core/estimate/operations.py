"""Operations and bytes of everything PyTorch runs, counted operator by operator.

Operations are multiplications and additions of matrix products and convolutions. Bytes are the inputs and outputs of
every operator, as if nothing were cached in between; what is expanded counts once, views and bare allocations not at
all.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

FUSED_ATTENTION = re.compile(r"_scaled_dot_product_\w*attention\w*")
UNMOVED = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "device"}
BACKWARD_ATTENTION = 2.5  # five matrix products, against two in the forward pass


@dataclass(frozen=True)
class Work:
    """What one call of an operator does.

    kind: the dtype it computes in, and whether it is a convolution.
    """

    operations: float
    bytes: int
    kind: tuple[torch.dtype, bool]


def work_of(func: Any, args: tuple, kwargs: dict, out: Any) -> Work | None:
    """None where nothing is computed or moved."""
    name = func._overloadpacket.__name__
    if func.is_view or name in UNMOVED:
        return None
    # The target of a copy is among its arguments but is not read.
    read = args[1:] if name == "copy_" else (*args, *kwargs.values())
    kind = (_dtype(out) or _dtype(args) or torch.float32, "convolution" in name)
    return Work(count_operations(func, args, kwargs, out), _bytes(read) + _bytes(out), kind)


def count_operations(func: Any, args: tuple, kwargs: dict, out: Any) -> float:
    """Multiplications and additions in one operator call."""
    packet = func._overloadpacket
    name = packet.__name__
    if FUSED_ATTENTION.fullmatch(name):
        # (q, k, v, …); in the backward pass (gradient, q, k, v, …)
        backward = name.endswith("backward")
        q, k = args[1:3] if backward else args[:2]
        return (BACKWARD_ATTENTION if backward else 1) * 4 * q.numel() * k.shape[-2]
    if name == "addmm_":
        _, left, right = args[:3]
        return 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
    if name == "_linear_pointwise":
        x, weight = args[:2]
        return 2.0 * x.numel() * weight.shape[0]
    formula = flop_registry.get(packet)
    return float(formula(*args, **kwargs, out_val=out)) if formula else 0.0


def _bytes(values: Any) -> int:
    if isinstance(values, Tensor):
        axes = zip(values.shape, values.stride(), strict=True)
        # What is expanded lies in memory once.
        return math.prod(size for size, stride in axes if stride) * values.element_size()
    return sum(map(_bytes, values)) if isinstance(values, (tuple, list)) else 0


def _dtype(values: Any) -> torch.dtype | None:
    """Of the first floating-point tensor."""
    if isinstance(values, Tensor):
        return values.dtype if values.is_floating_point() else None
    if isinstance(values, (tuple, list)):
        return next((found for value in values if (found := _dtype(value))), None)
    return None


class WorkCounter(TorchDispatchMode):
    """How often each piece of work was done, split into phases by ``lap``."""

    def __init__(self):
        super().__init__()
        self.phases: dict[str, Counter[Work]] = {}
        self.now: Counter[Work] = Counter()

    def lap(self, name: str) -> None:
        """Add the counts since the last lap to phase ``name``."""
        self.phases.setdefault(name, Counter()).update(self.now)
        self.now = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.note(func, args, kwargs or {}, out)
        return out

    def note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Count a call of an operator."""
        if work := work_of(func, args, kwargs, out):
            self.now[work] += 1


def operations_in(work: Counter[Work]) -> float:
    return sum(one.operations * count for one, count in work.items())
