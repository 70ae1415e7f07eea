"""The optimiser and the learning-rate schedule."""

import math
from collections.abc import Sequence

import torch

from Core.config.schema import OptimizerSettings


def build_optimizer(
    settings: OptimizerSettings, parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW
    if settings.use_AdamW8bit:
        from bitsandbytes.optim import AdamW8bit as kind
    return kind(
        parameters, lr=settings.lr, betas=tuple(settings.adam_betas), weight_decay=settings.weight_decay
    )


def state_bytes(settings: OptimizerSettings, parameters: Sequence[torch.nn.Parameter]) -> int:
    """Size of the two moments that the optimiser will keep."""
    small = 4096  # bitsandbytes leaves smaller tensors in 32 bits
    in_8_bits = [settings.use_AdamW8bit and p.numel() >= small for p in parameters]
    return sum(2 * p.numel() * (1 if short else 4) for p, short in zip(parameters, in_8_bits, strict=True))


def lr_factor(settings: OptimizerSettings, step: int, total: int) -> float:
    """Learning rate of a step relative to ``lr``: linear warm-up, then constant, or down to 0 by the end."""
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, total - warmup)
    shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return shapes[settings.lr_schedule]


def set_learning_rate(
    optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int, total: int
) -> float:
    """Give every parameter group the learning rate of a step, and return it."""
    lr = settings.lr * lr_factor(settings, step, total)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
