"""The videos of a training step: which noise, which frames, which sampling steps keep their gradient.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from Core.backbones import Backbone, EncodedPrompt, Features
from Core.modules import lora
from Core.sampling.euler import DenoisingStep, Predict, run_steps
from Core.sampling.frame_choice import choose_frames
from Core.sampling.gradient_window import first_gradient_step, thin_no_grad_steps
from Core.training.objectives.base import ObjectiveSettings
from Core.utils import rng
from Core.utils.options import option
from Core.utils.timing import Stopwatch


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(ObjectiveSettings):
    """Keys of an objective that samples with a gradient window."""

    backprop_mode: Literal["last", "rand", "specific"] = option(
        "last",
        "sampling steps that keep gradients: the `last` ones, from a uniformly drawn step on (`rand`), or from step 15 "
        "on (`specific`)",
    )
    backprop_steps: int = option(
        1, "number of gradient steps of backprop_mode `last`", minimum=1, maximum=1000
    )
    guidance_grad: Literal["both", "cond"] = option(
        "both", "guidance branches that keep gradients; `cond` saves the memory of the null branch"
    )
    detach_input: bool = option(False, "stop the gradient at each step's latent input (DRTune)")
    kl_weight: float = option(
        0.0,
        "weight of the squared difference between the predictions with and without the adapter",
        minimum=0,
    )
    decode_frame: str | int = option(
        -1,
        "latent frames to score: -1 one at random, `fml` first, middle, last, `all`, `alt` every other, or an index",
    )
    prefix_steps: int | None = option(
        None, "number of no-gradient steps, spread evenly over those of the schedule; None = all", minimum=1
    )


class KlToBase:
    """Mean squared difference between the adapted prediction for the captions and the base model's.

    Observes the gradient steps of one sampling run. For Gaussian steps of equal width this is the KL divergence
    between the two samplers up to a factor (DPOK, Fan et al., 2023).

    Args:
        predict: for the captions alone, without guidance; must not have been called yet.
    """

    def __init__(self, denoiser: torch.nn.Module, predict: Predict):
        self.denoiser, self.predict = denoiser, predict
        self.terms: list[Tensor] = []

    def observe(self, z: Tensor, t: Tensor, prediction: Tensor) -> None:
        """Add a step: latent ``z`` [B, C, T, h, w], timesteps ``t`` [B], the adapted prediction like ``z``."""
        with torch.no_grad(), lora.base_only(self.denoiser):
            base = self.predict(z.detach(), t)
        self.terms.append((prediction - base).square().flatten(1).mean(1))

    def per_sample(self) -> Tensor:
        """[B], averaged over the observed steps."""
        return torch.stack(self.terms).mean(0)


class Rollout:
    """Sampling with a gradient window; every draw follows from seed, step and global sample number."""

    def __init__(self, settings: RolloutSettings, backbone: Backbone, seed: int):
        self.settings, self.backbone, self.seed = settings, backbone, seed

    def first_grad_step(self, step: int) -> int:
        """First sampling step with a gradient; one draw per optimiser step, the same on every process."""
        generator = rng.generator(self.seed, "window", step)
        return first_gradient_step(
            self.settings.backprop_mode,
            len(self.backbone.timesteps(1)),
            lambda n: int(torch.randint(n, (), generator=generator)),
            self.settings.backprop_steps,
        )

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        samples: Sequence[int],
        first_grad_step: int,
        timer: Stopwatch,
    ) -> tuple[Tensor, Tensor | None]:
        """Latents [B, C, T, h, w] whose graph begins at step ``first_grad_step``, and their KL [B] to the base model.

        There is no KL unless ``kl_weight`` asks for it.
        """
        backbone, settings = self.backbone, self.settings
        timesteps, first = thin_no_grad_steps(
            backbone.timesteps(len(samples)), first_grad_step, settings.prefix_steps
        )
        features = self.features(prompts)
        kl = None
        if settings.kl_weight:
            kl = KlToBase(backbone.denoiser, backbone.predictor(features, guided=False))
        predict = backbone.predictor(
            features,
            null_grad=settings.guidance_grad == "both",
            observe=kl.observe if kl else None,
        )
        step = DenoisingStep(predict, backbone.process, timesteps, settings.detach_input)
        with torch.no_grad(), backbone.no_grad_steps():
            z = run_steps(step, self.noise(samples), 0, first)
        timer.lap("prefix")
        z = run_steps(step, z, first, len(timesteps))
        timer.lap("gradient_steps")
        return z, kl.per_sample() if kl else None

    def features(self, prompts: Sequence[EncodedPrompt]) -> list[Features]:
        return [encoded.features_of() for encoded in prompts]

    def noise(self, samples: Sequence[int]) -> Tensor:
        """[B, C, T, h, w], each video's own."""
        return rng.noise(self._generators("noise", samples), self.backbone.latent_shape()).to(
            self.backbone.device
        )

    def frame_numbers(self, samples: Sequence[int]) -> Tensor:
        """Latent frames [B, F] to decode; on the CPU, where reading them waits for no GPU."""
        frames = self.backbone.latent_shape()[1]
        return choose_frames(self.settings.decode_frame, frames, self._generators("frame", samples))

    def _generators(self, name: str, samples: Sequence[int]) -> list[torch.Generator]:
        # The last number told repeats of a video apart; it stays, as every draw follows from it.
        return [rng.generator(self.seed, name, sample, 0) for sample in samples]
