"""Measure a step by phase (seconds, peak memory, operations, bytes) and the machine's peak rates."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from Core.estimate.operations import work_of
from Core.utils.timing import Stopwatch

CEILING_SIZE = {"cpu": 1024, "cuda": 8192}
BANDWIDTH_BYTES = {"cpu": 2**28, "cuda": 2**31}
REPEATS = 5
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

    ``Core.estimate.operations`` says what counts. ``roofline_seconds`` sums, over operators,
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
        if work := work_of(func, args, kwargs or {}, out):
            self.now["operations"] += work.operations
            self.now["bytes"] += work.bytes
            self.now["roofline_seconds"] += max(work.operations / self.ceiling, work.bytes / self.bandwidth)
        return out


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
