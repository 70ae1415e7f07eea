"""Measure a step by phase (seconds, peak memory, operations, bytes) and the machine's peak rates."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from Core.utils.timing import Stopwatch

CEILING_SIZE = {"cpu": 1024, "cuda": 8192}
BANDWIDTH_BYTES = {"cpu": 2**28, "cuda": 2**31}
REPEATS = 5
FUSED_ATTENTION = re.compile(r"_scaled_dot_product_\w*attention\w*")
UNMOVED = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
BACKWARD_ATTENTION = 2.5  # five matrix products, against two in the forward pass
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak bytes since the last ``take``: tensors on a GPU, the process's resident memory on a CPU.

    If the high-water mark cannot be reset (this needs Linux and permission), the peak since the process started.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.take()

    def take(self) -> int:
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        try:
            found = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())
            CLEAR.write_text("5")  # resets the high-water mark on Linux
        except OSError:
            found = None
        if found:
            return int(found[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class OperationCounter(TorchDispatchMode):
    """Count operations and bytes of everything PyTorch runs, split into phases by ``lap``.

    Operations are counted for matrix products and convolutions. Bytes are the inputs and outputs of every operator, as
    if nothing were cached in between; views and bare allocations move none. ``roofline_seconds`` sums, over operators,
    the larger of operations / ``ceiling`` and bytes / ``bandwidth``; with caching, a step may take less.
    """

    def __init__(self, ceiling: float, bandwidth: float):
        super().__init__()
        self.ceiling, self.bandwidth = ceiling, bandwidth
        self.phases: dict[str, dict[str, float]] = {}
        self._start()

    def _start(self) -> None:
        self.now = {"operations": 0.0, "bytes": 0.0, "roofline_seconds": 0.0}

    def lap(self, name: str) -> None:
        """Add the counts since the last lap to phase ``name``."""
        total = self.phases.setdefault(name, dict.fromkeys(self.now, 0.0))
        for key, value in self.now.items():
            total[key] += value
        self._start()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if not (func.is_view or name in UNMOVED):
            operations = count_operations(func, args, kwargs or {}, out)
            # The target of a copy is among its arguments but is not read.
            read = args[1:] if name == "copy_" else (*args, *(kwargs or {}).values())
            moved = _bytes(read) + _bytes(out)
            self.now["operations"] += operations
            self.now["bytes"] += moved
            self.now["roofline_seconds"] += max(operations / self.ceiling, moved / self.bandwidth)
        return out


def count_operations(func, args: tuple, kwargs: dict, out) -> float:
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


def _bytes(values) -> int:
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(_bytes, values)) if isinstance(values, (tuple, list)) else 0


class MeteredStopwatch(Stopwatch):
    """A stopwatch that notifies ``listeners`` of each lap."""

    def __init__(self, device: torch.device, listeners: list[Callable[[str], None]]):
        super().__init__(device)
        self.listeners = listeners

    def lap(self, name: str) -> None:
        super().lap(name)
        for listener in self.listeners:
            listener(name)


def _best_seconds(action: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    best = math.inf
    for _ in range(REPEATS):
        wait()
        started = time.perf_counter()
        action()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second in a large square matrix product, best of a few runs."""
    size = CEILING_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a large copy, best of a few runs."""
    source = torch.ones(BANDWIDTH_BYTES[device.type], device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source), device)
