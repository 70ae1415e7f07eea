"""Every random draw as a function of (seed, name, numbers) alone, so that no draw depends on how work is split.

Draws are made on the CPU, where they are the same on every machine.
"""

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor


def generator(seed: int, name: str, *index: int | str) -> Generator:
    """A CPU generator for one purpose (``name``) at one place (``index``: step, sample number, …)."""
    text = "/".join(map(str, (seed, name, *index)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def noise(generators: Sequence[Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal [B, *shape], row b from generator b."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def training_indices(seed: int, samples: Sequence[int], count: int) -> list[int]:
    """Which of ``count`` prompts each global sample number trains on: a new shuffle for every pass."""
    orders: dict[int, list[int]] = {}
    for epoch in {sample // count for sample in samples}:
        orders[epoch] = torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()
    return [orders[sample // count][sample % count] for sample in samples]


def seed_globals(seed: int, name: str, *index: int | str) -> None:
    """Set the process-wide generators, which only foreign code (a user's reward, say) may draw from."""
    value = generator(seed, name, *index).initial_seed()
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)
