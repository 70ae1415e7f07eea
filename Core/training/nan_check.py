"""Values that are not finite, found before they are applied."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from Core.utils.distributed import Distributed

logger = logging.getLogger("vader")
NAMED_PARAMETERS = 3


@dataclass(frozen=True)
class Fault:
    """What is not finite in a process's share of a step: samples (number, prompt) and parameters by name."""

    samples: tuple[tuple[int, str], ...]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        if self.samples:
            listed = ", ".join(f"{prompt!r} (sample {number})" for number, prompt in self.samples)
            parts.append(f"reward or loss of {listed}")
        if self.parameters:
            parts.append(f"gradient of {', '.join(self.parameters)}, …")
        return "; ".join(parts)


def find_fault(
    samples: Sequence[tuple[int, str]], values: Tensor, parameters: Mapping[str, nn.Parameter]
) -> Fault | None:
    """The fault of a share of a step, before gradients are averaged; None when all is finite.

    Args:
        samples: (number, prompt) of each video.
        values: [videos, …], what was computed of each.
    """
    finite = values.isfinite().flatten(1).all(1).tolist()
    bad = tuple(sample for sample, good in zip(samples, finite, strict=True) if not good)
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norms = torch._foreach_norm(list(grads.values())) if grads else []
    good = torch.stack(norms).isfinite().tolist() if grads else []
    names = [name for name, finite in zip(grads, good, strict=True) if not finite]
    return Fault(bad, tuple(names[:NAMED_PARAMETERS])) if bad or names else None


def report_skip(
    distributed: Distributed, step: int, seed: int, fault: Fault | None, calibrating: bool
) -> None:
    """Say why a step was not applied, naming what was not finite on whichever process; called by all.

    Args:
        step: optimiser steps before it.
        calibrating: it was skipped while fp16's scaler looks for its scale.
    """
    if calibrating:
        logger.info("step %d was skipped while fp16's scaler looks for its scale", step + 1)
        return
    faults = distributed.gather_objects([str(fault) if fault else ""])
    named = [f"process {rank}: {text}" for rank, text in enumerate(faults) if text]
    if distributed.is_main:
        logger.warning(
            "step %d was skipped on all processes, seed %d: not finite: %s",
            step + 1, seed, "; ".join(named) or "the norm of the averaged gradient",
        )  # fmt: skip
