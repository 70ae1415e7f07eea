"""What keeps a step from doing harm: distance to the base model, and faults found before they are applied.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from Core.modules import lora

NAMED_PARAMETERS = 3


class BaseDistance:
    """Mean squared difference between the adapted velocity of the captions and the base model's.

    Observes the gradient steps of one sampling run. For Gaussian steps of equal width this is the KL
    divergence between the two samplers up to a factor (DPOK, Fan et al., 2023).

    Args:
        denoiser: the network with its adapter.
        velocity: of the captions alone, without guidance; must not have been called yet.
    """

    def __init__(self, denoiser: nn.Module, velocity: Callable[[Tensor, Tensor], Tensor]):
        self.denoiser, self.velocity = denoiser, velocity
        self.terms: list[Tensor] = []

    def observe(self, z: Tensor, t: Tensor, v_text: Tensor) -> None:
        """Add a step: latent ``z`` [B, C, T, h, w], timesteps ``t`` [B], the adapted velocity like ``z``."""
        with torch.no_grad(), lora.base_only(self.denoiser):
            v_base = self.velocity(z.detach(), t)
        self.terms.append((v_text - v_base).square().flatten(1).mean(1))

    def per_sample(self) -> Tensor:
        """[B], averaged over the observed steps."""
        return torch.stack(self.terms).mean(0)


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
    norms = torch.stack(torch._foreach_norm(list(grads.values())))
    names = [name for name, good in zip(grads, norms.isfinite().tolist(), strict=True) if not good]
    return Fault(bad, tuple(names[:NAMED_PARAMETERS])) if bad or names else None
