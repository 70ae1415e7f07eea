"""Cards and their published rates: what fits, and a lower bound of the time.

Rates are those of matrix products without sparsity, half precision summed in float32, from NVIDIA's data sheets and
architecture white papers, half of it where only the rate with sparsity is printed; memory is what ``nvidia-smi`` gives
as total.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from Core.estimate.operations import Work

MIB = 1 << 20
# Beside tensors: the context with the kernels it loads, assumed, since no card was there to measure it, and PyTorch's
# workspace for cuBLAS on Hopper (CUBLAS_WORKSPACE_CONFIG in its notes on CUDA; 8 MiB on other cards).
CUDA_CONTEXT = 500 * MIB
CUBLAS_WORKSPACE = 32 * MIB
# Of the tensors' bytes, what the caching allocator cannot hand out again, assumed; PyTorch's default segments are of
# 20 MiB at least, and of a whole tensor from 10 MiB on, so that large networks leave little.
FRAGMENTATION = 0.05
# A step's roofline seconds over the measured ones of `cpu-twin`, whose peaks were measured on the same machine
# (docs/benchmarks/cpu-twin-default.json). No card was there to measure it; peaks that are published are seldom reached.
EFFICIENCY = 0.8


@dataclass(frozen=True, kw_only=True)
class Card:
    """memory: bytes. half, tf32, float32: operations per second. bandwidth: bytes per second."""

    name: str
    memory: int
    half: float
    tf32: float
    float32: float
    bandwidth: float
    source: str

    def seconds(self, work: Counter[Work]) -> float:
        """Of all operators one after the other, each as long as its operations or its bytes take."""
        total = sum(
            count * max(one.operations / self.rate(*one.kind), one.bytes / self.bandwidth)
            for one, count in work.items()
        )
        return total / EFFICIENCY

    def rate(self, dtype: torch.dtype, is_convolution: bool) -> float:
        if dtype in (torch.bfloat16, torch.float16):
            return self.half
        # PyTorch lets convolutions in float32 take TF32, and matrix products not.
        return self.tf32 if is_convolution else self.float32


def card(name: str, mib: int, half: float, tf32: float, float32: float, gb: float, source: str) -> Card:
    """Rates in tera-operations and gigabytes per second."""
    return Card(
        name=name, memory=mib * MIB, half=half * 1e12, tf32=tf32 * 1e12, float32=float32 * 1e12,
        bandwidth=gb * 1e9, source=source,
    )  # fmt: skip


AMPERE, ADA = "NVIDIA Ampere GA102 white paper", "NVIDIA Ada GPU architecture white paper"
CARDS = {
    one.name: one
    for one in (
        card("rtx3090", 24576, 71, 35.6, 35.6, 936, AMPERE),
        card("l4", 23034, 121, 60, 30.3, 300, "NVIDIA L4 data sheet"),
        card("rtx4090", 24564, 165.2, 82.6, 82.6, 1008, ADA),
        card("rtx5090", 32607, 209.5, 104.8, 104.8, 1792, "NVIDIA RTX Blackwell white paper"),
        card("a100-40", 40960, 312, 156, 19.5, 1555, "NVIDIA A100 data sheet, SXM"),
        card("l40s", 46068, 362, 183, 91.6, 864, "NVIDIA L40S data sheet"),
        card("a6000", 49140, 154.8, 77.4, 38.7, 768, "NVIDIA RTX A6000 data sheet"),
        card("a100", 81920, 312, 156, 19.5, 2039, "NVIDIA A100 data sheet, 80 GB SXM"),
        card("h100", 81559, 989.4, 494.7, 66.9, 3350, "NVIDIA H100 data sheet, SXM"),
        card("h200", 143771, 989.4, 494.7, 66.9, 4800, "NVIDIA H200 data sheet, SXM"),
    )
}


def device_bytes(tensors: int) -> int:
    """What a card must have for so many bytes of tensors."""
    return int(tensors * (1 + FRAGMENTATION)) + CUDA_CONTEXT + CUBLAS_WORKSPACE
