"""Which sampling steps keep their gradient: always a suffix, since a later step without it cuts the chain."""

from collections.abc import Callable

import torch
from torch import Tensor

BACKPROP_MODES = ("last", "rand", "specific")
SPECIFIC_STEP = 15


def first_gradient_step(
    mode: str | None, num_steps: int, randint: Callable[[int], int], backprop_steps: int = 1
) -> int:
    """Index of the first sampling step that keeps its gradient; ``num_steps`` when none does.

    Args:
        mode: ``last`` for the last ``backprop_steps`` steps, ``rand`` for a cut-off drawn uniformly,
            ``specific`` for the cut-off at step 15, None for no gradient at all.
        randint: n → integer drawn uniformly from [0, n).
    """
    if mode is None:
        return num_steps
    if mode not in BACKPROP_MODES:
        raise ValueError(f"backprop_mode must be one of {', '.join(BACKPROP_MODES)}, got {mode!r}")
    if mode == "last" and not 1 <= backprop_steps <= num_steps:
        raise ValueError(
            f"backprop_steps must be between 1 and num_sampling_steps ({num_steps}), got {backprop_steps}"
        )
    if mode == "specific" and num_steps <= SPECIFIC_STEP:
        raise ValueError(
            f"backprop_mode='specific' keeps gradients from step {SPECIFIC_STEP}, but num_sampling_steps is "
            f"{num_steps}; take more than {SPECIFIC_STEP} steps or another mode"
        )
    if mode == "rand":
        return randint(num_steps)
    return SPECIFIC_STEP if mode == "specific" else num_steps - backprop_steps


def thin_no_grad_steps(timesteps: Tensor, first: int, steps: int | None) -> tuple[Tensor, int]:
    """Leave at most ``steps`` of the timesteps before index ``first``, evenly spread and with the first among them.

    Args:
        timesteps: [N, B], falling.
        steps: None leaves all.

    Returns:
        The timesteps that are left, and the index of what was ``first`` among them.
    """
    if steps is None or steps >= first:
        return timesteps, first
    kept = [first * number // steps for number in range(steps)]
    return torch.cat([timesteps[kept], timesteps[first:]]), steps
